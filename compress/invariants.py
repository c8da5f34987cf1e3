"""What every pass must leave true of a linear (decisions D3 and D4), checked after each one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.errors import RunError
from compress.passes.base import Invariant, LinearPass
from compress.state import all_finite, masked

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.lock import Linear
    from compress.passes.base import Pass
    from compress.state import LinearState


def check_invariants(
    linear: Linear, index: int, state: LinearState, mask_before: Tensor | None, applied: Pass | None = None
) -> None:
    """Check a linear after pass `index` of the plan, which was `applied` with what a survey had found.

    Raises:
        RunError: a promise is broken; names pass and layer.
    """
    one = applied or dict(linear.passes)[index]

    def broken(what: str) -> RunError:
        return RunError(
            f"{what} after pass[{index}]",
            where=f"{one.use()} on {linear.name}",
            fix="this is a mistake in the pass; nothing was written to the output",
        )

    weight = state.effective()
    if weight.shape != (linear.out_features, linear.in_features):
        raise broken(f"the weight has shape {tuple(weight.shape)}")
    if not all_finite(weight):
        raise broken("the weight holds NaN or infinity")
    if state.low_rank is not None and not all_finite(state.base()):
        raise broken("the weight beside the branch holds NaN or infinity")
    if mask_before is not None and (state.mask is None or bool((state.mask & ~mask_before).any())):
        raise broken("pruned weights came back")
    if state.mask is not None and bool((masked(state.weight, ~state.mask) != 0).any()):
        raise broken("a pruned weight is not zero")
    _check_grid(linear, index, one, state, broken)
    for earlier, one in linear.passes:
        pattern = getattr(one, "pattern", None)
        if earlier > index or pattern is None:
            continue
        if (
            state.mask is None
            or int(state.mask.reshape(-1, pattern.group).sum(1, dtype=torch.int16).max()) > pattern.kept
        ):
            raise broken(f"a group holds more than {pattern} allows")


def _check_grid(linear: Linear, index: int, one: Pass, state: LinearState, broken: Callable[[str], RunError]) -> None:
    """With a grid, the weight is the grid's value, and the grid the one that the lock promised to the exporter.

    Of a grid that an earlier pass chose during the run the plan says only that there is one.
    """
    earlier = [p for i, p in reversed(linear.passes) if i < index and Invariant.GRID in p.provides()]
    promised = one.grid() or next((spec for p in earlier if (spec := p.grid()) is not None), None)
    grid = state.grid
    chosen = promised is None and any(isinstance(p, LinearPass) and p.surveys() for p in earlier)
    if grid is None:
        if promised is not None or chosen:
            raise broken("there is no grid, though the pass declares one")
        return
    scales = (linear.out_features, grid.spec.groups(linear.in_features))
    if not chosen and (promised is None or promised[:3] != grid.spec[:3]):
        raise broken(f"the grid is {grid.spec[:3]}, but the plan says {promised and promised[:3]}")
    if grid.scale.shape != scales or grid.zero.shape != scales or grid.codes.shape != state.weight.shape:
        raise broken("scales, zero-points and codes of the grid do not fit the layer")
    if not bool((grid.scale > 0).all()) or not bool(torch.isfinite(grid.scale).all()):
        raise broken("a scale is not positive and finite")
    if int(grid.codes.max()) > grid.spec.largest or int(grid.zero.max()) > grid.spec.largest:
        raise broken(f"a code is above {grid.spec.largest}")
    if not torch.equal(state.weight, grid.dequantize(state.dtype)):
        raise broken("the weight is not the value of its codes")
