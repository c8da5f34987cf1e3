"""SparseGPT: prune and re-fit what is left, column by column (Frantar & Alistarh 2023, arXiv 2301.00774).

With ``H_λ = X Xᵀ + λ I``, ``λ = damping · mean(diag X Xᵀ)`` and ``H_λ⁻¹ = Uᵀ U``, the saliency of a weight that is
still free is ``w_ij² / U_jj²``. The mask is chosen group by group from the *current* weights: per `mask_block`
columns of the whole layer for a sparsity, per row and M columns for N:M. A pruned weight's error is spread over the
columns to its right (`column_solver`). Dead columns (never an input) have saliency 0 and go first; those that the
count spares keep their weight, because calibration says nothing about them.

With `bits`, the weights that are kept become codes of a grid in the same loop, so that each column's error holds both
what was pruned and what was rounded (section 3.5 of the paper; ours has groups of columns, as in `gptq`).

`least_squares` solves afterwards ``min ‖(W − Ŵ) X‖²`` on the final mask for all rows, by conjugate gradients on
``H_λ`` preconditioned with its diagonal, starting from SparseGPT's own solution, so the error never grows.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.passes.base import (
    Invariant,
    LinearState,
    Moments,
    Note,
    SettingError,
    Statistics,
)
from compress.passes.column_solver import OnGrid, solve_columns
from compress.passes.pruning import PruningPass
from compress.passes.quantizing import GridSettings
from compress.state import lowest_of_all, lowest_places, pruned_count


class SparseGPT(GridSettings, PruningPass):
    """Prune with second-order updates of the remaining weights; with `bits`, quantize them in the same loop."""

    damping: float = Field(default=0.01, gt=0, le=10, description="λ as a fraction of the mean diagonal of H")
    mask_block: int = Field(default=128, ge=1, description="columns among which a sparsity is met")
    block_size: int = Field(default=128, ge=1, description="columns per lazy update; speed only")
    least_squares: bool = Field(default=False, description="re-solve the kept weights on the final mask")

    statistics: ClassVar[Statistics] = Statistics.GRAM
    # The update moves kept weights off any grid.
    preserves: ClassVar[frozenset[Invariant]] = PruningPass.preserves - {Invariant.GRID}

    @model_validator(mode="after")
    def _one_solution(self) -> SparseGPT:
        if self.bits is not None and self.least_squares:
            problem = "least_squares moves weights off the grid of bits"
            raise SettingError(problem, "leave bits out, and quantize in a gptq pass after this one")
        unused = {"group_size", "symmetric", "clip", "scale_dtype"} & self.model_fields_set
        if self.bits is None and unused:
            raise SettingError(f"{min(unused)} has no meaning without bits", "add bits, or leave it out")
        return self

    def settings(self) -> dict[str, Any]:
        """Without `bits`, nothing of a grid."""
        unused = set() if self.bits is not None else set(GridSettings.model_fields)
        return {key: value for key, value in super().settings().items() if key not in unused}

    def provides(self) -> frozenset[Invariant]:
        """A grid too, when one is asked for."""
        return super().provides() | ({Invariant.GRID} if self.bits is not None else frozenset())

    def check_shape(self, out_features: int, in_features: int) -> None:
        """The group of a pattern and the group of a grid must divide the input width."""
        super().check_shape(out_features, in_features)
        self.check_group(in_features)

    def solving_bytes(self, out_features: int, in_features: int) -> int:
        """Least squares are solved in float64."""
        return 16 * out_features * in_features if self.least_squares else 0

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Prune one layer and update the weights it keeps."""
        factor = moments.factor(self.damping)
        mask = _Mask(self, linear, factor.dead)
        on_grid = OnGrid(self, mask.shape, linear.dtype, mask.preview) if self.bits is not None else None
        rules = (mask,) if on_grid is None else (mask, on_grid)
        weight, loss = solve_columns(linear.effective(), factor.upper, rules, block_size=self.block_size)
        linear.prune(mask.pruned.T)
        linear.weight = weight
        if on_grid is not None:
            linear.quantize(on_grid.grid())
        if self.least_squares:
            assert linear.mask is not None
            H = moments.gram()
            mean = float(H.diagonal().mean())
            H.diagonal().add_(factor.damping * mean if mean else 1.0)  # as in the factor
            linear.weight = restricted_least_squares(linear.dense, weight, linear.mask, H)
        linear.weight = linear.effective()
        # The loss of the column loop, in the norm of H_λ and against the weight this pass began with.
        return {"damping": factor.damping, "dead_columns": int(factor.dead.sum()), "damped_loss": loss}


class _Mask:
    """Chooses the mask group by group and projects pruned weights to zero."""

    def __init__(self, settings: SparseGPT, linear: LinearState, dead: Tensor) -> None:
        self.settings, self.dead = settings, dead if bool(dead.any()) else None
        self.group = settings.pattern.group if settings.pattern else min(settings.mask_block, linear.in_features)
        before = linear.mask
        self.pruned = (  # (in, out)
            torch.zeros_like(linear.weight.T, dtype=torch.bool) if before is None else ~before.T
        ).contiguous()
        self.shape = (linear.in_features, linear.out_features)
        self._zero = torch.zeros((), device=linear.weight.device)

    def begin(self, start: int, current: Tensor, diagonal: Tensor) -> None:
        span = slice(start, start + current.shape[0])
        self.pruned[span].logical_or_(self._chosen(start, current, diagonal))

    def preview(self, start: int, current: Tensor, diagonal: Tensor) -> Tensor:
        """What would be pruned of any group of columns (columns, out) if the choice were made now.

        The range of a grid's group is found before the mask of its last columns is.
        """
        size = self.group
        chosen = torch.zeros_like(current, dtype=torch.bool)
        for at in range(start - start % size, start + current.shape[0], size):
            lo, hi = max(at, start), min(at + size, start + current.shape[0])
            part = slice(lo - start, hi - start)
            if hi - lo == min(size, self.shape[0] - at):  # a whole group of the mask
                chosen[part] = self._chosen(at, current[part], diagonal[part])
        return chosen | self.pruned[start : start + current.shape[0]]

    def _chosen(self, start: int, current: Tensor, diagonal: Tensor) -> Tensor:
        """The lowest saliencies (group, out) of a group, as many as the pattern or the sparsity prunes."""
        saliency = (current / diagonal.unsqueeze(1)).square_()  # (group, out)
        span = slice(start, start + current.shape[0])
        if self.dead is not None:
            saliency.masked_fill_(self.dead[span].unsqueeze(1), 0.0)
        saliency.masked_fill_(self.pruned[span], -1.0)
        if self.settings.pattern is not None:
            return lowest_places(saliency, self.settings.pattern)
        # floor(s · all) over the whole layer: the fractions that blocks leave are carried on
        sparsity, rows = self.settings.sparsity or 0.0, current.shape[1]
        count = pruned_count(sparsity, span.stop * rows) - pruned_count(sparsity, span.start * rows)
        return lowest_of_all(saliency, count)

    def project(self, column: int, current: Tensor) -> Tensor:
        return torch.where(self.pruned[column], self._zero, current)


def restricted_least_squares(
    target: Tensor, start: Tensor, mask: Tensor, H: Tensor, *, tolerance: float = 1e-6, iterations: int = 200
) -> Tensor:
    """``argmin tr[(W − Ŵ) H (W − Ŵ)ᵀ]`` over Ŵ that is zero off the mask, for all rows at once.

    Args:
        target: (out, in) W.
        start: (out, in), zero where pruned; the objective never exceeds its value here.
        mask: (out, in) bool, True = free.
        H: (in, in) positive definite.
        tolerance: stop when every row's preconditioned residual has fallen by this factor.
        iterations: stop after so many.

    Returns:
        (out, in), zero off the mask.
    """
    zero = torch.zeros((), dtype=start.dtype, device=start.device)
    solution = start.clone()
    inverse = H.diagonal().reciprocal()  # Jacobi preconditioner
    residual = torch.where(mask, (target - solution) @ H, zero)
    z = residual * inverse
    direction = z.clone()
    rho = (residual * z).sum(1, keepdim=True)  # (out, 1)
    goal = rho * tolerance**2
    for _ in range(iterations):
        if bool((rho <= goal).all()):
            break
        product = torch.where(mask, direction @ H, zero)
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, rho / curvature, zero)
        solution += step * direction
        residual -= step * product
        z = residual * inverse
        fresh = (residual * z).sum(1, keepdim=True)
        direction = z + torch.where(rho > 0, fresh / rho, zero) * direction
        rho = fresh
    return solution
