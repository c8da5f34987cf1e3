"""GPTQ: quantize column by column, spreading each column's error over those to come (Frantar et al. 2022, 2210.17323).

With ``H_λ = X Xᵀ + λ I``, ``λ = damping · mean(diag X Xᵀ)`` and ``H_λ⁻¹ = Uᵀ U``, column i becomes ``q_i``, the nearest
values of its groups' grids, and ``e_i = (w_i − q_i) / U_ii`` changes the columns that are free by ``−e_i U[i, :]``
(`column_solver`). A pruned entry becomes exactly 0, and its error, what earlier columns have spread to it, is passed on
like any other: the mask stays, and its drift is not lost (METHODS 10.5).

`order`: "natural" takes columns as they stand and finds each group's range when it is reached, from the weights of that
moment. "activation" takes the largest diagonal entries of H first; ranges then are found beforehand, from the weights
as they come, so that groups stay groups of neighbours and no gather index is stored ("static groups").

`rescale`: with the codes found, the scales become the least-squares ones for the dense weight (`grid_search.rescaled`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from compress.passes.base import LinearState, Moments, Note, Statistics
from compress.passes.column_solver import ColumnRule, OnGrid, solve_columns
from compress.passes.grid_search import fit_groups, rescaled, rescaling_bytes
from compress.passes.quantizing import QuantizingPass

if TYPE_CHECKING:
    from torch import Tensor


class GPTQ(QuantizingPass):
    """Quantize with second-order updates of the columns to come; pruned weights keep their exact 0."""

    damping: float = Field(default=0.01, gt=0, le=10, description="λ as a fraction of the mean diagonal of H")
    order: Literal["natural", "activation"] = Field(default="natural", description="in which columns are fixed")
    block_size: int = Field(default=128, ge=1, description="columns per lazy update; speed only")
    rescale: bool = Field(default=False, description="fit the scales to the codes, by least squares")

    statistics: ClassVar[Statistics] = Statistics.GRAM

    def solving_bytes(self, out_features: int, in_features: int) -> int:
        """The systems of equations for the scales."""
        spec = self.grid()
        return rescaling_bytes(spec.groups(in_features)) if self.rescale and spec else 0

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Quantize one layer, under its mask."""
        spec = self.grid()
        assert spec is not None
        factor = moments.factor(self.damping, by_activation=self.order == "activation")
        weight = linear.effective()
        pruned = None if linear.mask is None else ~linear.mask.T  # (in, out)
        ranges = None
        if factor.order is not None:
            weighed = moments.squares + factor.damping * moments.squares.mean()  # the diagonal of H_λ: dead ones, too
            ranges = fit_groups(weight, spec, linear.dtype, clip=self.clip, importance=weighed)
            weight = weight[:, factor.order]
            pruned = None if pruned is None else pruned[factor.order]
        on_grid = OnGrid(
            self,
            (linear.in_features, linear.out_features),
            linear.dtype,
            lambda start, current, _: None if pruned is None else pruned[start : start + current.shape[0]],
            ranges=ranges,
            columns=factor.order,
        )
        rules: tuple[ColumnRule, ...] = (on_grid,) if pruned is None else (_Pruned(pruned), on_grid)
        _, loss = solve_columns(weight, factor.upper, rules, block_size=self.block_size)
        linear.quantize(on_grid.grid())
        if self.rescale and linear.grid is not None:
            linear.quantize(rescaled(linear.dense, linear.grid, moments.gram(), linear.dtype))
        # The loss of the column loop, in the norm of H_λ and against the weight this pass began with.
        return {"damping": factor.damping, "dead_columns": int(factor.dead.sum()), "damped_loss": loss}


class _Pruned:
    """Projects pruned entries to 0."""

    group = 1

    def __init__(self, pruned: Tensor) -> None:
        self._pruned = pruned.contiguous().unbind()  # (out,) of each column, in the order of the loop
        self._zero = torch.zeros((), device=pruned.device)

    def begin(self, start: int, current: Tensor, diagonal: Tensor) -> None:
        pass

    def project(self, column: int, current: Tensor) -> Tensor:
        return torch.where(self._pruned[column], self._zero, current)
