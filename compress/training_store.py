"""Where a training keeps its state: two files in the work directory, written in turn, for which the journal vouches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint import Shard, lay_out, read_file, slots_of, write_shard
from compress.journal import file_checksum

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.pipeline import Execution


class TrainingStore:
    """A training's state in the work directory; the journal vouches for it."""

    def __init__(self, run: Execution, sweep: int, block: int | None = None) -> None:
        """`block`: of a pass that trains block by block."""
        self.run, self.sweep, self.block = run, sweep, block

    def _entries(self) -> list[dict[str, Any]]:
        return self.run.work.entries("training", sweep=self.sweep, block=self.block)

    def _file(self, number: int) -> Path:
        return self.run.work.directory / f"training-{self.sweep}-{self.block}-{number % 2}.safetensors"

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """The last state whose file is whole."""
        for entry in reversed(self._entries()[-2:]):
            path = self.run.work.directory / entry["file"]
            if file_checksum(path) == entry["sha256"]:
                return read_file(path), entry["numbers"]
        return None

    def save(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Write the state; the one before stays until the next. Only the first process does."""
        if self.run.world.rank:
            return
        path = self._file(len(self._entries()))
        (shard,) = lay_out(slots_of({name: t.cpu() for name, t in tensors.items()}), 1 << 62)
        checksum = write_shard(Shard(path.name, shard.slots), path.parent, {n: t.cpu() for n, t in tensors.items()})
        entry = {"kind": "training", "sweep": self.sweep, "block": self.block, "file": path.name, "sha256": checksum}
        self.run.work.append(entry | {"numbers": dict(numbers)}, files=(path,))

    def report(self, step: int, steps: int, loss: float, held_out: float | None) -> None:
        """One line."""
        watched = "" if held_out is None else f"  held-out {held_out:.4f}"
        self.run.progress.say(f"  step {step}/{steps}  loss {loss:.4f}{watched}")

    def forget(self) -> None:
        """The result is in the journal: the files are not needed any more."""
        if self.run.world.rank:
            return
        for number in (0, 1):
            self._file(number).unlink(missing_ok=True)
