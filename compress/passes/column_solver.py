"""The column loop of optimal brain surgery that SparseGPT and GPTQ share.

Given W (out, in) and the upper-triangular U (in, in) with ``H_λ⁻¹ = Uᵀ U``, columns are fixed from left to right:
column i becomes ``q_i``, the error ``e_i = (w_i − q_i) / U_ii`` is spread over the columns that are still free,
``W[:, i:] −= e_i U[i, i:]``. Then exactly ``W − Q = E U`` and ``‖E‖² = tr[(W − Q) H_λ (W − Q)ᵀ]``
(Frantar & Alistarh 2023, arXiv 2301.00774; Frantar et al. 2022, arXiv 2210.17323).

Updates are lazy, twice: within a few columns at once, for the rest of their block when these are done, for the columns
to its right when the block is. That changes the order of additions and nothing else.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch

from compress.passes.grid_search import fit, grid_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from compress.grid import Grid
    from compress.passes.quantizing import GridSettings


INNER = 16  # columns, at most, whose errors are spread one by one


class ColumnRule(Protocol):
    """How a column becomes its final value."""

    group: int
    """`begin` is called at every multiple of this many columns, with weights that include all updates so far."""

    def begin(self, start: int, current: Tensor, diagonal: Tensor) -> None:
        """Look at a group before its first column is fixed. `current`: (group, out), `diagonal`: (group,) of U."""

    def project(self, column: int, current: Tensor) -> Tensor:
        """The final value (out,) of a column whose weights are now `current` (out,)."""


class OnGrid:
    """The rule of GPTQ: a column becomes the nearest values of its groups' grids.

    Without `ranges`, a group's scale and zero-point are found when its first column is reached, from weights that
    carry all errors so far, so that nothing depends on the block size of the solver.
    """

    def __init__(
        self,
        settings: GridSettings,
        shape: tuple[int, int],
        dtype: torch.dtype,
        pruned: Callable[[int, Tensor, Tensor], Tensor | None],
        *,
        ranges: tuple[Tensor, Tensor] | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Prepare for one layer.

        Args:
            settings: bits and so on.
            shape: (in, out) of the transposed weight.
            dtype: of the checkpoint; values are rounded to it.
            pruned: the entries (group, out) of a group that are or will be pruned, from what `begin` gets.
            ranges: scales and zero-points (out, groups) fixed beforehand.
            columns: (in,) the layer's column at each place of the loop, where it is not that place itself.
        """
        spec = settings.grid()
        assert spec is not None
        self.spec, self.clip, self.dtype, self._pruned = spec, settings.clip, dtype, pruned
        self.width = spec.width(shape[0])
        self.group = self.width if ranges is None else shape[0]
        self._fixed, self._columns = ranges is not None, columns
        self._place = range(shape[0]) if columns is None else columns.tolist()
        if ranges is None:
            ranges = (torch.empty(shape[1], shape[0] // self.width), torch.empty(shape[1], shape[0] // self.width))
        self.scale, self.zero = (one.T.contiguous() for one in ranges)  # (groups, out)
        self.codes = torch.empty(shape, dtype=torch.uint8)  # in the order of the loop

    def begin(self, start: int, current: Tensor, diagonal: Tensor) -> None:
        """Find the range of a group: the columns matter as much as their errors cost, ``1 / U_jj²``."""
        if start == 0:
            self.scale, self.zero, self.codes = (x.to(current.device) for x in (self.scale, self.zero, self.codes))
            self._rows = self.scale.unbind(), self.zero.unbind(), self.codes.unbind()  # cheaper than indices
        if self._fixed:
            return
        pruned = self._pruned(start, current, diagonal)
        live = (current if pruned is None else current.masked_fill(pruned, 0.0)).T.contiguous()  # (out, group)
        scale, zero = fit(live, self.spec, self.dtype, clip=self.clip, importance=diagonal.square().reciprocal())
        self.scale[start // self.width], self.zero[start // self.width] = scale, zero

    def project(self, column: int, current: Tensor) -> Tensor:
        """The nearest values of the column's grids."""
        scales, zeros, codes = self._rows
        group = self._place[column] // self.width
        scale, zero = scales[group], zeros[group]
        code = self.spec.code(current, scale, zero)
        codes[column].copy_(code)
        return code.sub_(zero).mul_(scale).to(self.dtype).float()

    def grid(self) -> Grid:
        """Codes and ranges, when all columns are fixed."""
        codes = self.codes
        if self._columns is not None:
            codes = torch.empty_like(codes).index_copy_(0, self._columns, codes)
        return grid_of(codes.T.contiguous(), self.scale.T.contiguous(), self.zero.T.contiguous(), self.spec, self.dtype)


def solve_columns(
    weight: Tensor, upper: Tensor, rules: Sequence[ColumnRule], *, block_size: int
) -> tuple[Tensor, float]:
    """Fix every column by `rules`, each on what the one before it gives.

    Args:
        weight: (out, in) float32; not changed.
        upper: (in, in), U; taken in the weight's precision.
        rules: decide the final values.
        block_size: columns per lazy update, which must not influence the result beyond rounding.

    Returns:
        Q (out, in) and ``‖E‖²``, the error in the norm of ``H_λ``.
    """
    W = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of the layer is one contiguous row
    columns = W.shape[0]
    groups = [min(rule.group, columns) for rule in rules]
    block_size = _block_size(block_size, groups)
    inner_size = _block_size(min(INNER, block_size), [*groups, block_size])
    upper = upper.to(weight.dtype)
    diagonal = upper.diagonal()
    loss = 0.0
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.empty_like(W[start:stop])  # (b, out)
        for first in range(start, stop, inner_size):
            last = min(first + inner_size, stop)
            mine = errors[first - start : last - start]
            W[first:last] = _fix(W, first, last, upper, diagonal, rules, mine)
            if last < stop:
                W[last:stop].addmm_(upper[first:last, last:stop].T, mine, alpha=-1.0)
        loss += float(errors.square().sum(dtype=torch.float64))
        if stop < columns:
            W[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
    return W.T.contiguous(), loss


def _fix(
    W: Tensor, first: int, last: int, upper: Tensor, diagonal: Tensor, rules: Sequence[ColumnRule], errors: Tensor
) -> Tensor:
    """The final values (columns, out) of columns `first` to `last`, and their errors, one after another.

    Here an operation of torch costs more than what it computes, so there are few, on views that are made at once.
    """
    block, diagonals = W[first:last], diagonal[first:last].unsqueeze(1)
    rows = (upper[first:last, first:last] / diagonals).triu(1)  # columns that are fixed take 0 of an error
    finals = []
    for column, current, row, error in zip(
        range(first, last), block.unbind(), rows.unsqueeze(2).unbind(), errors.unsqueeze(1).unbind(), strict=True
    ):
        final = current
        for rule in rules:
            if column % rule.group == 0:
                ahead = slice(column, column + rule.group)
                rule.begin(column, W[ahead], diagonal[ahead])
            final = rule.project(column, final)
        torch.sub(current, final, out=error[0])
        finals.append(final)
        if column + 1 < last:
            block.addmm_(row, error, alpha=-1.0)
    errors.div_(diagonals)
    return torch.stack(finals)


def _block_size(wanted: int, groups: list[int]) -> int:
    """A block near `wanted` in which groups lie whole, or which whole blocks make up: else `begin` misses updates.

    Groups up to `wanted` must divide the block, and the block must divide the larger ones.
    """
    inside = math.lcm(*(group for group in groups if group <= wanted))
    outside = math.gcd(*(group for group in groups if group > wanted))  # 0 when there is none
    if inside <= wanted and outside % inside == 0:
        fitting = [inside * n for n in range(wanted // inside, 0, -1) if outside % (inside * n) == 0]
        return fitting[0]
    return math.gcd(*groups)
