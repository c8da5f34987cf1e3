"""Where a training keeps its state: two files in the work directory, written in turn, for which the journal vouches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint import Shard, lay_out, read_file, slots_of, write_shard
from compress.journal import file_checksum

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.execution import Execution


class TrainingStore:
    """A training's state in the work directory; the journal vouches for it."""

    def __init__(self, run: Execution, sweep: int, number: int, block: int | None = None) -> None:
        """`number`: of the pass in the plan; `block`: of a pass that trains block by block."""
        self.run = run
        self.training = {"sweep": sweep, "pass": number, "block": block}

    def _entries(self) -> list[dict[str, Any]]:
        return self.run.work.entries("training", **self.training)

    def files(self) -> list[Path]:
        """The two, whether they are there or not."""
        name = "-".join(str(part) for part in self.training.values())
        return [self.run.work.directory / f"training-{name}-{turn}.safetensors" for turn in (0, 1)]

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
        path = self.files()[len(self._entries()) % 2]
        (shard,) = lay_out(slots_of({name: t.cpu() for name, t in tensors.items()}), 1 << 62)
        checksum = write_shard(Shard(path.name, shard.slots), path.parent, {n: t.cpu() for n, t in tensors.items()})
        entry = {"kind": "training", **self.training, "file": path.name, "sha256": checksum, "numbers": dict(numbers)}
        self.run.work.append(entry, files=(path,))

    def report(self, step: int, steps: int, loss: float, held_out: float | None) -> None:
        """One line."""
        watched = "" if held_out is None else f"  held-out {held_out:.4f}"
        self.run.progress.say(f"  step {step}/{steps}  loss {loss:.4f}{watched}")

    def forget(self) -> None:
        """The result is in the journal: the files are not needed any more."""
        if self.run.world.rank:
            return
        for path in self.files():
            path.unlink(missing_ok=True)
