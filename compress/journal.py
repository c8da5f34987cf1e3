"""Crash safety: a work directory beside the output, and a journal of what in it is complete.

``.NAME.compress`` stands beside the output ``NAME`` and becomes it only by one final rename. Each journal line carries
its own checksum and names the files it vouches for with theirs; files are synced before the line that names them, so
a kill, a full disk or a power cut leaves a prefix of the run, never a lie. A line that is torn or damaged ends the
journal there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from compress.errors import OutputError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Entry = dict[str, Any]
FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of a disk on which the output may well be


class Workspace:
    """The work directory of one output, locked for one process."""

    def __init__(self, output: Path, *, following: bool = False) -> None:
        """Create or reopen the work directory, and lock it; `following`: only read what another process writes.

        Raises:
            OutputError: it cannot be created, or another run holds it.
            RunError: the disk is full or fails.
        """
        self.output = output
        self.directory = work_directory(output)
        self.staging = self.directory / "output"
        self.following = following
        try:
            if not following:
                self._make_directory()
            self._lock = -1 if following else self._acquire()
        except OSError as error:
            problem = f"cannot write beside the output: {error.strerror or error}"
            if error.errno in FAILING:
                fix = "free some space or mend the disk, then run the same command"
                raise RunError(problem, where=str(output), fix=fix) from None
            fix = "choose an output on a disk that can be written"
            raise OutputError(problem, where=str(output), fix=fix) from None
        self._entries: list[Entry] = [] if following else list(self._read())
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._pending: list[Future[object]] = []
        self._failure: BaseException | None = None  # of the writing thread

    def _make_directory(self) -> None:
        """Create the work directory, and have its name and those of new directories above it on the disk."""
        fresh = [place for place in (self.directory, *self.directory.parents) if not place.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        for place in fresh:
            sync(place.parent)

    def _acquire(self) -> int:
        """Lock ``lock``; what vanished meanwhile, since the other run ended, is created anew."""
        path = self.directory / "lock"
        while True:
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                if path.is_symlink():
                    raise
                self._make_directory()
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 32).decode(errors="replace").strip()
                os.close(handle)
                raise OutputError(
                    f"another run (process {holder or 'unknown'}) is writing this output",
                    where=str(self.output),
                    fix="wait for it, stop it, or choose another output",
                ) from None
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                try:
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()}\n".encode())
                except OSError:  # the lock goes with the handle; what was just made goes, too
                    os.close(handle)
                    if not self._journal.exists():
                        shutil.rmtree(self.directory, ignore_errors=True)
                    raise
                return handle
            os.close(handle)
            self._make_directory()

    # --------------------------------------------------------------- reading

    @property
    def _journal(self) -> Path:
        return self.directory / "journal.jsonl"

    def _read(self) -> Iterator[Entry]:
        """The lines up to the first damaged one, which is cut off with all that follows."""
        if not self._journal.exists():
            return
        good = 0
        with self._journal.open("rb") as file:
            for line in file:
                digest, _, payload = line.rstrip(b"\n").partition(b" ")
                if not line.endswith(b"\n") or digest.decode(errors="replace") != _checksum(payload):
                    break
                good += len(line)
                yield json.loads(payload)
        if good < self._journal.stat().st_size and not self.following:
            os.truncate(self._journal, good)

    def reread(self) -> None:
        """Take up what the process that writes has written since."""
        self._entries = list(self._read())

    def entries(self, kind: str, **wanted: Any) -> list[Entry]:
        """The lines of one kind that have these values, in order."""
        return [e for e in self._entries if e["kind"] == kind and all(e.get(k) == v for k, v in wanted.items())]

    def intact(self, entry: Entry) -> bool:
        """Whether the file that a line, or a part of one, vouches for is as it was."""
        return bool(file_checksum(self.directory / entry["file"]) == entry["sha256"])

    def identify(self, identity: dict[str, Any], plan: dict[str, Any], kind: str = "begin") -> bool:
        """Start the journal of this run, or check that the one found is of this run. True when it resumes.

        `kind`: of the line that says so; the last stage of several has one of its own.

        Raises:
            OutputError: the journal is of another plan, model, data or version; it is named and left alone.
        """
        begun = self.entries(kind)
        if not begun:
            self.append({"kind": kind, "identity": identity, "plan": plan})
            return False
        other = begun[0]["identity"]
        different = [name for name in identity if other.get(name) != identity[name]]
        if different:
            name = different[0]
            detail = (
                _difference(begun[0]["plan"], plan) if name == "plan" else f"{other.get(name)}, now {identity[name]}"
            )
            raise OutputError(
                f"holds the journal of a run with another {name} ({detail})",
                where=str(self.directory),
                fix="finish that run with what it began with, choose another output, or start over with --restart",
            )
        return True

    # --------------------------------------------------------------- writing

    def append(self, entry: Entry, *, files: tuple[Path, ...] = (), obsolete: tuple[Path, ...] = ()) -> None:
        """Commit a line now: sync `files`, write and sync the line, delete what it makes `obsolete`."""
        self.flush()
        self._commit(entry, files, obsolete)
        self._entries.append(entry)

    def later(self, function: Callable[..., object], *arguments: object) -> None:
        """Run a function in the writing thread, after what was handed to it before; `flush` raises its error.

        After an error nothing more is run, so that no line vouches for a file that was not written.
        """
        self._pending.append(self._writer.submit(self._unless_failed, function, *arguments))

    def _unless_failed(self, function: Callable[..., object], *arguments: object) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            function(*arguments)
        except BaseException as error:
            self._failure = error
            raise

    def append_later(self, entry: Callable[[], Entry], *, files: tuple[Path, ...], obsolete: tuple[Path, ...]) -> None:
        """Like `append`, in the writing thread; `entry` is made there, when the files before it are complete."""

        def commit() -> None:
            made = entry()
            self._commit(made, files, obsolete)
            self._entries.append(made)

        self.later(commit)

    def flush(self) -> None:
        """Wait until all that was handed to the writing thread is done; raises the first error."""
        pending, self._pending = self._pending, []
        for one in pending:
            one.result()

    def _commit(self, entry: Entry, files: tuple[Path, ...], obsolete: tuple[Path, ...]) -> None:
        for file in files:
            sync(file)
        if files:
            sync(self.directory)
        begins = not self._journal.exists()
        payload = json.dumps(entry, sort_keys=True).encode()
        with self._journal.open("ab") as journal:
            journal.write(_checksum(payload).encode() + b" " + payload + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        if begins:
            sync(self.directory)
        for file in obsolete:
            file.unlink(missing_ok=True)

    def forget(self) -> None:
        """Drop the journal and every file: the run starts over."""
        self.flush()
        for path in self.directory.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._entries.clear()

    def forget_sweep(self, sweep: int) -> None:
        """Drop a sweep and those after it, because a file it needs is damaged; not what it found of the dense model."""
        self.flush()
        kept = [e for e in self._entries if e.get("sweep", -1) < sweep + (e["kind"] == "fisher")]
        fresh = self.directory / "journal.fresh"
        with fresh.open("wb") as journal:
            for entry in kept:
                payload = json.dumps(entry, sort_keys=True).encode()
                journal.write(_checksum(payload).encode() + b" " + payload + b"\n")
        sync(fresh)
        fresh.replace(self._journal)
        sync(self.directory)
        self._entries = kept

    def publish(self) -> None:
        """Make the staged directory the output, by a rename, and remove the work directory."""
        self.flush()
        for path in self.staging.rglob("*"):
            sync(path)
        sync(self.staging)
        old = self.directory / "replaced"
        if self.output.exists() and any(self.output.iterdir()):
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed after it had replaced the output
            self.output.rename(old)
        self.staging.rename(self.output)
        with suppress(OSError):  # the output is complete and in place: what fails now must not look like a failed run
            sync(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Release the lock and remove the work directory."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Release the lock; the work directory stays for the next run."""
        self._writer.shutdown(wait=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard_without_blocks(self) -> None:
        """Remove the work directory of a run that compressed nothing yet."""
        if not self.entries("block") and not any(self.directory.glob("*stage-*")):
            shutil.rmtree(self.directory, ignore_errors=True)


def work_directory(output: Path) -> Path:
    """Where a run towards an output keeps its journal: beside it."""
    return output.parent / f".{output.name}.compress"


def sync(path: Path) -> None:
    """Fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_checksum(path: Path) -> str | None:
    """SHA-256 of a file, None if it is not there."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_checksums(directory: Path) -> dict[str, str | None]:
    """SHA-256 of every file below a directory, by its path in it."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): file_checksum(path) for path in paths}


def _checksum(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:16]


def _difference(there: Any, here: Any, path: str = "") -> str:
    """The first place where two plans differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for index, (old, new) in enumerate(zip(there, here, strict=True)):
            if old != new:
                return _difference(old, new, f"{path}[{index}]")
    if isinstance(there, list) and isinstance(here, list):
        return f"{path} has {len(there)} entries there, {len(here)} here"
    return f"{path} is {there!r} there, {here!r} here"
