"""The activations between the blocks of a sweep: a file for each block and process, for which the journal vouches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compress.errors import RunError
from compress.journal import sync
from compress.stream import Activations

if TYPE_CHECKING:
    from pathlib import Path

    from compress.sweep import Sweep
    from compress.walk import Walk


class Flows:
    """Of this process's samples; the processes of a run share the disk."""

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
            if not bool(torch.isfinite(hidden).all()):
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
