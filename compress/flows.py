"""The activations between blocks: on disk, a file for each block and process, and in memory if they fit."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from compress.checkpoint import raw_bytes
from compress.errors import RunError
from compress.journal import sync
from compress.state import all_finite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from compress.sweep import Sweep
    from compress.walk import Walk


class Activations:
    """Hidden states between two blocks, batch by batch: on disk, and in memory too if they fit.

    The file holds the raw values in order; the journal keeps it verbatim, so that a resumed run is bit-identical.
    """

    def __init__(
        self,
        path: Path,
        shapes: list[tuple[int, int, int]],
        dtype: torch.dtype,
        *,
        keep: bool,
        later: Callable[..., object] | None = None,
    ) -> None:
        """Describe the file; nothing is read or written yet.

        Args:
            path: of the file.
            shapes: (rows, length, hidden) of each batch.
            dtype: of the values.
            keep: hold a copy in memory.
            later: runs a function with arguments in another thread, in the order of the calls; only with `keep`.
        """
        self.path, self.shapes, self.dtype, self.keep = path, shapes, dtype, keep
        self._later = later if keep and later else lambda function, *arguments: function(*arguments)
        self._held: list[Tensor | None] = [None] * len(shapes)
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._written = 0

    def put(self, batch: int, hidden: Tensor) -> None:
        """Append a batch; batches come in order."""
        assert batch == self._written
        assert tuple(hidden.shape) == self.shapes[batch]
        self._later(self._write, hidden)
        self._written += 1
        if self.keep:
            self._held[batch] = hidden

    def _write(self, hidden: Tensor) -> None:
        if self._file is None:
            self._file = self.path.open("wb")
        data = raw_bytes(hidden)
        self._hash.update(data)
        self._file.write(data)

    def close(self) -> None:
        """No more batches. Durability is the journal's business."""
        self._later(self._close)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def entry(self) -> dict[str, str]:
        """What a journal says of the file: its name, and the SHA-256 of what was written."""
        return {"file": self.path.name, "sha256": self._hash.hexdigest()}

    def get(self, batch: int, device: torch.device, *, last: bool = False) -> Tensor:
        """One batch, (rows, length, hidden). `last`: it is not asked for again, so memory may let it go."""
        hidden = self._held[batch]
        if hidden is None:
            size = self.dtype.itemsize
            offset = sum(r * n * h for r, n, h in self.shapes[:batch]) * size
            count = int(torch.Size(self.shapes[batch]).numel())
            flat = torch.empty(count, dtype=self.dtype)
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                if file.readinto(raw_bytes(flat)) != count * size:
                    fix = "run the same command again"
                    raise RunError(f"batch {batch} is truncated", where=str(self.path), fix=fix)
            hidden = flat.view(self.shapes[batch])
        if last:
            self._held[batch] = None
        return hidden.to(device)


class Flows:
    """Those of a sweep, for which the journal vouches: of this process's samples; all processes share the disk."""

    def __init__(self, sweep: Sweep) -> None:
        """Nothing is read yet."""
        self.run, self.number, self.mode = sweep.run, sweep.number, sweep.mode
        self.work, self.skeleton = sweep.work, sweep.skeleton

    def files(self, block: int) -> list[Path]:
        """What stands in front of a block, by rank of the process."""
        ranks = range(self.run.world.size)
        return [self.work.directory / f"activations-{self.number}-{block:05d}-{rank}.bin" for rank in ranks]

    def first(self, entries: list[dict[str, Any]]) -> Activations:
        """The activations in front of the next block: from the journal, or the embedded tokens."""
        if entries:
            path = self.work.directory / entries[-1]["activations"][self.run.world.rank]["file"]
            return Activations(path, self._shapes(), self.mode.dtype, keep=False)
        return self.embedded()

    def embedded(self) -> Activations:
        """The activations in front of the first block."""
        flow = self._begin(0)
        with self.skeleton.loaded(self.skeleton.embedding):
            for batch, ids in enumerate(torch.split(self.run.share.ids, self.run.rows)):
                flow.put(batch, self.skeleton.embed(ids))
        flow.close()
        return flow

    def outputs(self, index: int, walk: Walk) -> Activations:
        """Run a block to its end; what is in front of the next one."""
        after = self._begin(index + 1)
        for batch, hidden in walk.outputs():
            if not all_finite(hidden):
                raise RunError(
                    f"the output of block {index} ({self.skeleton.prefix(index)[:-1]}) holds NaN or infinity",
                    fix="the model overflows on this text, or a pass broke it; look at the ledger of this block",
                )
            after.put(batch, hidden)
        after.close()
        return after

    def settle(self, flow: Activations | None) -> list[dict[str, str]]:
        """Have the other processes' files on disk; what the first process's journal says of them, by rank."""
        mine = None
        if flow is not None and self.work.following:
            sync(flow.path)
            mine = flow.entry
        return self.run.world.collect(mine)[1:]

    def _begin(self, block: int) -> Activations:
        path = self.files(block)[self.run.world.rank]
        return Activations(path, self._shapes(), self.mode.dtype, keep=self.mode.keep, later=self.work.later)

    def _shapes(self) -> list[tuple[int, int, int]]:
        return [(rows, self.run.share.ids.shape[1], self.skeleton.width) for rows in self.run.rows]
