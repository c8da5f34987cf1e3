"""What every pass must leave true of a linear (decisions D3 and D4), checked after each one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.lock import Linear
    from compress.state import LinearState


def check_invariants(linear: Linear, index: int, state: LinearState, mask_before: Tensor | None) -> None:
    """Check a linear after pass `index` of the plan. Raises RunError that names pass and layer."""

    def broken(what: str) -> RunError:
        return RunError(
            f"{what} after pass[{index}]",
            where=f"{dict(linear.passes)[index].use()} on {linear.name}",
            fix="this is a mistake in the pass; nothing was written to the output",
        )

    weight = state.effective()
    if weight.shape != (linear.out_features, linear.in_features):
        raise broken(f"the weight has shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise broken("the weight holds NaN or infinity")
    if mask_before is not None and (state.mask is None or bool((state.mask & ~mask_before).any())):
        raise broken("pruned weights came back")
    if state.mask is not None and bool((state.weight[~state.mask] != 0).any()):
        raise broken("a pruned weight is not zero")
    for earlier, one in linear.passes:
        pattern = getattr(one, "pattern", None)
        if earlier > index or pattern is None:
            continue
        if (
            state.mask is None
            or int(state.mask.reshape(weight.shape[0], -1, pattern.group).sum(-1).max()) > pattern.kept
        ):
            raise broken(f"a group holds more than {pattern} allows")
