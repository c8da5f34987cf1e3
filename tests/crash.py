"""What befalls runs, for tests and for `benchmarks/crash_matrix.py`: kills, power cuts, full and read-only disks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.conftest import ROOT, files_of

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

WORK = ".out.compress"
COMMIT = "compress.journal:Workspace._commit"
COMMITS = [
    COMMIT,
    "compress.sweep:write_shard",
    "compress.export.huggingface:write_shard",
    "compress.journal:Workspace.publish",
]
EVERYTHING = [
    *COMMITS,
    "compress.barrier:write_shard",
    "compress.training_store:write_shard",
    "compress.export.scales:write_shard",
    "os:fsync",
    "compress.checkpoint:raw_bytes",
    "compress.flows:Activations._write",
    "compress.calibration.tokens:TokenSet.save",
    "pathlib:Path.rename",
    "pathlib:Path.replace",
    "pathlib:Path.unlink",
    "shutil:rmtree",
    "shutil:copyfile",
]
Loss = Literal["dropped", "empty", "zeros", "torn"]
LOSSES: tuple[Loss, ...] = ("dropped", "empty", "zeros", "torn")


class Runner:
    """The process that forks the runs (`tests.crash_driver`)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, folder: Path, **command: Any) -> dict[str, Any]:
        """Run the plan of a folder; see `tests.crash_driver` for what may befall it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"plan": str(folder / "plan.toml"), **command}, default=str) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of an output that must not differ between two runs."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files_of(directory).items()}


def journal_lines(work: Path) -> list[bytes]:
    """The whole lines of a journal; none where there is no file."""
    path = work / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if is_whole(line)]


def is_whole(line: bytes) -> bool:
    """Whether a line of a journal has its checksum and its end."""
    checksum, _, content = line.removesuffix(b"\n").partition(b" ")
    return line.endswith(b"\n") and hashlib.sha256(content).hexdigest()[:16].encode() == checksum


def entries_of(work: Path) -> list[dict[str, Any]]:
    """What the lines of a journal say."""
    return [json.loads(line.partition(b" ")[2]) for line in journal_lines(work)]


def broken_promises(directory: Path) -> list[str]:
    """Files that a journal below a directory vouches for, and that are not as it says.

    Blocks and what is outside of them are kept to the end; of activations and of trainings, what the last line names.
    """
    broken = []
    for work in [path.parent for path in directory.rglob("journal.jsonl")]:
        entries = entries_of(work)
        named = [entry for entry in entries if entry["kind"] in ("block", "outside")]
        named += [one for entry in entries[-1:] for one in (entry, entry.get("activations")) if one and "file" in one]
        for one in named:
            path = work / one["file"]
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != one["sha256"]:
                broken.append(one["file"])
    return broken


def flip_bit(path: Path, draw: random.Random) -> None:
    """Flip one bit of a file, anywhere in it."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


class Shadow:
    """What a disk holds for sure: of a file what its last fsync saw, of a directory the names that its last fsync saw.

    POSIX promises no more. Each inode bears its key as an extended attribute, so that neither a rename nor a reused
    number can mistake one for another.
    """

    ATTRIBUTE = "user.durable"

    def __init__(self, folder: Path, root: Path) -> None:
        """Note it in `folder`, which must be outside of `root`, the directory that is watched."""
        self.folder, self.root = folder, root
        folder.mkdir(parents=True, exist_ok=True)

    def _key(self, path: Path | int) -> str:
        try:
            return os.getxattr(path, self.ATTRIBUTE).decode()
        except OSError:
            key = uuid.uuid4().hex
            os.setxattr(path, self.ATTRIBUTE, key.encode())
            return key

    def note_all(self) -> None:
        """All that is there now is durable."""
        for directory, _, files in os.walk(self.root):
            self.note(Path(directory))
            for file in files:
                self.note(Path(directory) / file)

    def note(self, path: Path) -> None:
        """A file or a directory was synced."""
        if path.is_dir():
            names = {one.name: [self._key(one), one.is_dir()] for one in path.iterdir()}
            (self.folder / self._key(path)).write_text(json.dumps(names))
        else:
            (self.folder / self._key(path)).write_bytes(path.read_bytes())

    def watched(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        """An fsync that notes what it was called for."""

        def noting(handle: int) -> None:
            fsync(handle)
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if path.is_relative_to(self.root):
                self.note(path)

        return noting

    def _synced(self, key: str) -> bytes | None:
        path = self.folder / key
        return path.read_bytes() if path.is_file() else None

    def rebuild(self, target: Path, loss: Loss, draw: random.Random) -> None:
        """Make `target` what a disk may hold after a power cut now.

        Args:
            target: a new directory.
            loss: of what was not synced. "dropped": names and data are those of the last fsync. Else names are as the
                process saw them, and data that was not synced is "empty", that is cut off, or "zeros", of the right
                size, or "torn": cut off anywhere, and each directory has either all of its new names or none.
            draw: for "torn".
        """
        self._directory(self.root, self._key(self.root), target, loss, draw)

    def _directory(self, live: Path | None, key: str, target: Path, loss: Loss, draw: random.Random) -> None:
        """`live`: the directory as the process saw it, where its new names have reached the disk."""
        target.mkdir()
        if live is None or loss == "dropped" or (loss == "torn" and live != self.root and draw.random() < 0.5):
            names = json.loads(self._synced(key) or b"{}")
            for name, (inner, is_directory) in names.items():
                if is_directory:
                    self._directory(self._found(inner, live), inner, target / name, loss, draw)
                else:
                    (target / name).write_bytes(self._synced(inner) or b"")
            return
        for path in live.iterdir():
            inner = self._key(path)
            if path.is_dir():
                self._directory(path, inner, target / path.name, loss, draw)
            else:
                (target / path.name).write_bytes(self._data(path, inner, loss, draw))

    def _found(self, key: str, live: Path | None) -> Path | None:
        """Where a directory that was durable lies now."""
        if live is None:
            return None
        return next((path for path in live.iterdir() if path.is_dir() and self._key(path) == key), None)

    def _data(self, path: Path, key: str, loss: Loss, draw: random.Random) -> bytes:
        """Of a file, what may be left."""
        now, synced = path.read_bytes(), self._synced(key) or b""
        if now == synced:
            return now
        if loss == "empty":
            return synced if now.startswith(synced) else b""
        kept = len(synced) if now.startswith(synced) else 0
        if loss == "zeros":
            return now[:kept] + bytes(len(now) - kept)
        return now[: draw.randint(kept, len(now))]


def copy_tree(source: Path, target: Path) -> None:
    """A copy without extended attributes."""
    shutil.copytree(source, target, copy_function=shutil.copyfile, symlinks=True)
