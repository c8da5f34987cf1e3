"""The moments of one block's linears, collected when `refresh` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.calibration.moments import Moments, Statistics
from compress.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.lock import Linear
    from compress.passes.base import BlockState
    from compress.sweep import Sweep
    from compress.walk import Walk


class BlockStatistics:
    """The moments of each subset's input in one block.

    With refresh = "block" all are collected in one forward before the first linear is changed; with "subset" each is
    when its turn comes. A block pass needs all beforehand, whatever `refresh` says; what it changed is taken into
    account, and what it trained is seen in a forward of its own.
    """

    def __init__(self, sweep: Sweep, subsets: list[list[Linear]], walk: Walk) -> None:
        """`subsets`: the linears of each subset that the walk stops at."""
        lock = sweep.lock
        self.subsets, self.walk = subsets, walk
        self.anew = lock.plan.run.refresh == "subset"
        self._masks = torch.split(sweep.run.share.mask, sweep.run.rows) if subsets else ()
        self._kinds = [max(lock.statistics(linear, sweep.number) for linear in subset) for subset in subsets]
        self._device, self._world = sweep.mode.device, sweep.run.world
        self._made: list[Moments] | None = None

    def _empty(self, stop: int) -> Moments:
        return Moments(self.subsets[stop][0].in_features, self._kinds[stop], self._device)

    def _add(self, moments: Moments, batch: int, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        mask = self._masks[batch].flatten().to(flat.device)
        moments.add(flat if bool(mask.all()) else flat[mask])

    def _observed(self) -> list[Moments]:
        """All moments by one forward that changes nothing."""
        if self._made is None:
            made = [self._empty(stop) for stop in range(len(self.subsets))]
            self.walk.observe(lambda stop, batch, inputs: self._add(made[stop], batch, inputs))
            for moments in made:
                moments.reduce(self._world)
            self._made = made
        return self._made

    def beforehand(self, linear: Linear) -> Moments:
        """The moments of a linear's input before anything of the block is changed."""
        stop = next((n for n, subset in enumerate(self.subsets) if linear in subset), None)
        if stop is None:
            return Moments(linear.in_features, Statistics.NONE)
        return self._checked(stop, self._observed()[stop])

    def changed(self, block: BlockState, *, learned: bool) -> None:
        """Take over the moments as a block pass left them; anew, or where it `learned`, they are collected again."""
        if self.anew or learned:
            self._made = None
        elif self._made is not None:
            for stop, subset in enumerate(self.subsets):
                leaf = next((name for name in block.moments if subset[0].name.endswith(f".{name}")), None)
                self._made[stop] = block.moments[leaf] if leaf else self._made[stop]

    def of(self, subset: list[Linear]) -> Moments:
        """The moments of a subset's input, none where no pass wants any; each subset is asked for once, in order."""
        if subset not in self.subsets:
            return Moments(0, Statistics.NONE)
        stop = self.subsets.index(subset)
        if not self.anew:
            moments = self._observed()[stop]
            self._observed()[stop] = Moments(0, Statistics.NONE)  # let the Gram matrix go afterwards
            return self._checked(stop, moments)
        moments = self._empty(stop)
        for batch, inputs in self.walk.inputs(stop):
            self._add(moments, batch, inputs)
        moments.reduce(self._world)
        return self._checked(stop, moments)

    def _checked(self, stop: int, moments: Moments) -> Moments:
        if not moments.is_finite():
            raise RunError(
                f"the input of {self.subsets[stop][0].name} holds NaN or infinity, or overflows when squared",
                fix="the model overflows on this text: try other calibration data, or except this layer",
            )
        return moments
