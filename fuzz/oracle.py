"""What must never happen, whatever a file holds: watched by Python's audit hooks, and judged at the end.

Audit hooks see what Python opens and executes. Native code (the Rust of tokenizers, Arrow) opens files unseen; it is
given the paths of the model directory only.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
LIBRARIES = tuple(
    {os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, ROOT, *filter(None, sys.path))}
    | {
        f"/proc/{os.getpid()}/",
        "/proc/meminfo",
        "/proc/cpuinfo",
        "/sys/",
        "/dev/null",
        "/dev/urandom",
        "/etc/mime.types",
    }
    | {"/usr/share/zoneinfo", "/usr/share/misc"}
)
FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn",
    "socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "pickle.find_class",
)  # fmt: skip
SLOW = 20.0  # seconds for one input of a few kilobytes, on a busy machine


class Broken(AssertionError):
    """A promise was broken."""


class Watch:
    """Watches this process while it is `armed`; there is one, because an audit hook cannot be removed."""

    def __init__(self) -> None:
        self.folders: tuple[str, ...] = ()
        self.found: list[str] = []
        self.armed = False
        self._busy = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or self._busy:
            return
        self._busy = True
        try:
            if event in FORBIDDEN:
                self.found.append(f"{event}{arguments!r:.300}")
            elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
                self._opened(os.fsdecode(arguments[0]))
            elif event == "exec":
                file = getattr(arguments[0], "co_filename", "")
                if file.startswith(self.folders):
                    self.found.append(f"ran {file}")
        finally:
            self._busy = False

    def _opened(self, path: str) -> None:
        real = os.path.realpath(path)
        temporary = os.path.realpath(tempfile.gettempdir()) + "/compress-check-"  # sketches of what is to be made
        if not real.startswith((*self.folders, *LIBRARIES, temporary)):
            self.found.append(f"opened {path}")


_watches: list[Watch] = []


@contextmanager
def judged(*folders: Path) -> Iterator[None]:
    """Run what handles a hostile file in `folders`, and judge it.

    Raises:
        Broken: it opened a file elsewhere, ran something, took too long, or refused in words that do not help.
    """
    if not _watches:
        _watches.append(Watch())
    (watch,) = _watches
    watch.folders = tuple(os.path.realpath(folder) for folder in folders)
    watch.found, watch.armed = [], True
    begun = time.monotonic()
    try:
        yield
    except CompressError as error:
        watch.armed = False
        _judge_message(error)
    finally:
        watch.armed = False
    taken = time.monotonic() - begun
    if watch.found:
        raise Broken("; ".join(dict.fromkeys(watch.found)))
    if taken > SLOW:
        raise Broken(f"took {taken:.0f} s")


def _judge_message(error: CompressError) -> None:
    text = str(error)
    if error.exit_code not in (2, 3) or not error.problem or not error.fix:
        raise Broken(f"a refusal without a fix: {text!r}") from error
    if not all(line.isprintable() for line in text.split("\n")) or text.count("\n") > 1:
        raise Broken(f"a refusal that a terminal obeys: {text!r}") from error
    if len(text) > 5000:
        raise Broken(f"a refusal of {len(text):,} characters: {text[:200]!r}") from error
