"""Magnitude pruning: remove the smallest |W_ij| (Han et al. 2015, arXiv 1506.02626). The baseline of the others.

`scope` is the set within which weights compete: each output row, each layer, or all targeted layers of the model.
The global threshold is found exactly without holding the model: a histogram over the upper 16 bits of |w| as float32
(whose bit patterns order like the values), then one over the lower 16 bits within the bin of the threshold.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from compress.passes.base import LinearState, Moments, Note, SettingError, Survey
from compress.passes.pruning import PruningPass
from compress.state import lowest, lowest_in_groups, lowest_of_all, pruned_count


class Magnitude(PruningPass):
    """Prune by |W|; no calibration data is read."""

    scope: Literal["row", "layer", "global"] = Field(default="layer", description="within what weights compete")
    count: int | None = Field(default=None, ge=0, description="prune exactly this many weights of each layer")

    amounts: ClassVar[tuple[str, ...]] = (*PruningPass.amounts, "count")

    @model_validator(mode="after")
    def _scope_fits(self) -> Magnitude:
        if self.count is not None and self.scope != "layer":
            raise SettingError("count counts the weights of a layer", 'write scope = "layer" with count')
        if self.surveys() and any("sparsity" in t.overrides() and "scope" not in t.overrides() for t in self.where):
            raise SettingError(
                "a global sparsity cannot differ by linear", "except those linears; prune them in a second pass"
            )
        return self

    def check_shape(self, out_features: int, in_features: int) -> None:
        """A layer must have the weights that are counted."""
        super().check_shape(out_features, in_features)
        if self.count is not None and self.count > out_features * in_features:
            problem = f"a layer of {out_features} × {in_features} has fewer than {self.count} weights"
            raise SettingError(problem, "lower the count, or except these linears")

    def surveys(self) -> bool:
        """A global threshold needs the whole model."""
        return self.scope == "global" and self.pattern is None

    def survey(self, linears: Survey) -> dict[str, dict[str, Any]]:
        """How many weights of each linear lie under the global threshold; ties go by model order."""
        upper = torch.zeros(1 << 16, dtype=torch.int64)
        for linear in linears():
            upper += torch.bincount(_bits(linear) >> 16, minlength=1 << 16)
        total = int(upper.sum())
        count = pruned_count(self.sparsity or 0.0, total)
        # The bin that holds the (count+1)-th smallest value; everything in lower bins is pruned.
        high = int(torch.searchsorted(upper.cumsum(0), count, right=True))
        below = int(upper[:high].sum())
        lower = torch.zeros(1 << 16, dtype=torch.int64)
        for linear in linears():
            bits = _bits(linear)
            lower += torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
        low = int(torch.searchsorted(lower.cumsum(0), count - below, right=True))
        ties = count - below - int(lower[:low].sum())  # of the weights equal to the threshold, the first so many
        threshold = high << 16 | low
        allocation: dict[str, dict[str, Any]] = {}
        for linear in linears():
            bits = _bits(linear)
            here = min(ties, int((bits == threshold).sum()))
            ties -= here
            number = int((bits < threshold).sum()) + here
            allocation[linear.name] = {"scope": "layer", "count": number}
        return allocation

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Prune the lowest |W| of each group, row or the layer."""
        linear.prune(choose(linear, linear.weight.abs(), self))
        return {}


def choose(linear: LinearState, scores: torch.Tensor, settings: PruningPass) -> torch.Tensor:
    """The entries to prune (out, in): the lowest scores by pattern, row or layer, those already pruned first."""
    if linear.mask is not None:
        scores = scores.masked_fill(~linear.mask, -1.0)  # scores are never negative
    if settings.pattern is not None:
        return lowest_in_groups(scores, settings.pattern)
    if settings.sparsity is None:
        return lowest_of_all(scores, settings.count)  # type: ignore[attr-defined]
    if getattr(settings, "scope", "row") == "row":
        return lowest(scores, pruned_count(settings.sparsity, linear.in_features))
    return lowest_of_all(scores, pruned_count(settings.sparsity, scores.numel()))


def _bits(linear: LinearState) -> torch.Tensor:
    """|w| as int64 bit patterns plus one, (out · in,); 0 for pruned weights, which so come before live zeros."""
    bits = linear.effective().abs().contiguous().view(torch.int32).long() + 1
    if linear.mask is not None:
        bits.masked_fill_(~linear.mask, 0)
    return bits.flatten().cpu()
