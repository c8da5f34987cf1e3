"""Runs plans in forked children and has something befall them at an exact moment; `tests.crash.Runner` speaks to it.

Importing transformers takes seconds and a tiny run a fifth of one, so this process imports once and forks a child for
every run; it starts no thread itself. It reads one command a line, JSON:

    plan       the plan's file
    options    of the command line, such as --overwrite
    points     "module:attribute" of functions; each entry and each exit of one is an event
    at         the event (from 0) at which something happens in the child
    action     what: "kill" (SIGKILL), "stop" (SIGSTOP), "term", "int", "full" or "read-only"
    after      seconds after which the child gets the signal of `action`, instead of `at`
    place      the directory that runs full or becomes read-only
    spare      bytes that stay free as `place` runs full
    shadow     a directory in which to note what was made durable below `root` (`tests.crash.Shadow`)
    meanwhile  once the child has stopped, run the same command beside it, then let it go on

and answers {status, events, seconds, message}; with `meanwhile`, the other command's answer stands under it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import compress
import compress.barrier
import compress.calibration.plan_source
import compress.export.compressed_tensors
import compress.pipeline
from compress import cli
from tests.conftest import compile_report_once
from tests.crash import Shadow

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}
NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS of unshare(2)
PRIVATE, BIND, REMOUNT, READ_ONLY = 1 << 18 | 1 << 14, 1 << 12, 1 << 5, 1  # MS_PRIVATE with MS_REC, … of mount(2)
COUNTER = 4  # bytes

LIBC = ctypes.CDLL(None, use_errno=True)


def _call(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def make_read_only(place: Path) -> None:
    """Have every later opening of a file below `place` see a read-only disk, in this process."""
    path = str(place).encode()
    _call(LIBC.mount(path, path, None, BIND, None))
    _call(LIBC.mount(path, path, None, BIND | REMOUNT | READ_ONLY, None))


def fill(place: Path, spare: int) -> None:
    """Leave `spare` bytes free on the disk of `place`."""
    found = os.statvfs(place)
    handle = os.open(place / "filler", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(handle, 0, max(1, found.f_bavail * found.f_frsize - spare))
    os.close(handle)


class Events:
    """Counts events where the parent can read them, and has something happen at one."""

    def __init__(self, memory: int, command: dict[str, Any]) -> None:
        self.memory, self.command, self.count = memory, command, 0
        self.lock = threading.RLock()

    def tick(self) -> None:
        """One event."""
        with self.lock:
            if self.count == self.command.get("at", -1):
                self.happen(self.command.get("action", "kill"))
            self.count += 1
            os.pwrite(self.memory, self.count.to_bytes(COUNTER, "little"), 0)

    def happen(self, action: str) -> None:
        """What befalls the run."""
        place = Path(self.command.get("place", "."))
        if action == "full":
            fill(place, self.command.get("spare", 0))
        elif action == "read-only":
            make_read_only(place)
        else:
            os.kill(os.getpid(), SIGNALS[action])
            if action == "kill":
                time.sleep(60)

    def watch(self, point: str) -> None:
        """Have the entries and exits of a function be events."""
        module, _, path = point.partition(":")
        *parents, name = path.split(".")
        owner = functools.reduce(getattr, parents, importlib.import_module(module))
        original = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            try:
                return original(*args, **kwargs)
            finally:
                self.tick()

        setattr(owner, name, run)


def child(command: dict[str, Any], memory: int) -> int:
    """The run; returns its exit code."""
    events = Events(memory, command)
    if command.get("action") == "read-only":
        _call(LIBC.unshare(NEW_NAMESPACE))
        _call(LIBC.mount(b"none", b"/", None, PRIVATE, None))
    if "shadow" in command:
        shadow = Shadow(Path(command["shadow"]), Path(command["root"]))
        shadow.note_all()
        os.fsync = shadow.watched(os.fsync)  # type: ignore[assignment]
    for point in command.get("points", ()):
        events.watch(point)
    if command.get("at") == "start":
        events.happen(command["action"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    try:
        return cli.main([command["plan"], *command.get("options", ())])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(command: dict[str, Any], memory: int, told: int) -> int:
    """Fork a child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(told, 2)
        code = child(command, memory)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def carry_out(command: dict[str, Any]) -> dict[str, Any]:
    """One command, to its end."""
    began = time.monotonic()
    memory, answer = os.memfd_create("events"), dict[str, Any]()
    os.pwrite(memory, bytes(COUNTER), 0)
    with tempfile.TemporaryFile() as told:
        pid = start(command, memory, told.fileno())
        if "after" in command:
            time.sleep(command["after"])
            os.kill(pid, SIGNALS[command.get("action", "kill")])
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            if command.get("meanwhile"):
                plain = {key: command[key] for key in ("plan", "options") if key in command}
                answer["meanwhile"] = carry_out(plain)
            os.kill(pid, signal.SIGCONT)
            _, status = os.waitpid(pid, 0)
        told.seek(0)
        message = told.read().decode(errors="replace")
    count = int.from_bytes(os.pread(memory, COUNTER, 0), "little")
    os.close(memory)
    seconds = time.monotonic() - began
    return answer | {
        "status": os.waitstatus_to_exitcode(status),
        "events": count,
        "seconds": seconds,
        "message": message,
    }


def prepare() -> None:
    """Do once what every run would do anew."""
    compile_report_once()
    folder = jinja2.FileSystemLoader(Path(compress.__file__).parent)
    pages = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, extensions=["jinja2.ext.do"])
    for page in ("report.html.jinja", "report_tasks.html.jinja"):
        pages.get_template(page)
    torch.set_num_threads(1)


def main() -> None:
    """Until there are no more commands."""
    prepare()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
