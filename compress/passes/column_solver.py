"""The column loop of optimal brain surgery that SparseGPT and GPTQ share.

Given W (out, in) and the upper-triangular U (in, in) with ``H_λ⁻¹ = Uᵀ U``, columns are fixed from left to right:
column i becomes ``q_i``, the error ``e_i = (w_i − q_i) / U_ii`` is spread over the columns that are still free,
``W[:, i:] −= e_i U[i, i:]``. Then exactly ``W − Q = E U`` and ``‖E‖² = tr[(W − Q) H_λ (W − Q)ᵀ]``
(Frantar & Alistarh 2023, arXiv 2301.00774; Frantar et al. 2022, arXiv 2210.17323).

Updates are lazy: within a block of columns at once, for the columns to its right when the block is done. That changes
the order of additions and nothing else.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class ColumnRule(Protocol):
    """How a column becomes its final value."""

    group: int
    """`begin` is called at every multiple of this many columns, with weights that include all updates so far."""

    def begin(self, start: int, current: Tensor, diagonal: Tensor) -> None:
        """Look at a group before its first column is fixed. `current`: (group, out), `diagonal`: (group,) of U."""

    def project(self, column: int, current: Tensor) -> Tensor:
        """The final value (out,) of a column whose weights are now `current` (out,)."""


def solve_columns(weight: Tensor, upper: Tensor, rule: ColumnRule, *, block_size: int) -> tuple[Tensor, float]:
    """Fix every column by `rule`.

    Args:
        weight: (out, in) float32; not changed.
        upper: (in, in) float32, U.
        rule: decides the final values.
        block_size: columns per lazy update, which must not influence the result beyond rounding.

    Returns:
        Q (out, in) and ``‖E‖²``, the error in the norm of ``H_λ``.
    """
    W = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of the layer is one contiguous row here
    columns = W.shape[0]
    # A group lies within a block or is made of whole blocks, or `begin` would miss updates.
    group = rule.group
    block_size = block_size // group * group if group <= block_size else math.gcd(group, block_size)
    loss = 0.0
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = W[start:stop]  # (b, out), a view
        U = upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        inverse = U.diagonal().reciprocal().tolist()
        for i in range(stop - start):
            column = start + i
            if column % group == 0:
                ahead = slice(column, min(column + group, columns))
                rule.begin(column, W[ahead], upper.diagonal()[ahead])
            current = block[i]
            final = rule.project(column, current)
            torch.sub(current, final, out=errors[i]).mul_(inverse[i])
            current.copy_(final)
            if column + 1 < stop:
                block[i + 1 :].addr_(U[i, i + 1 :], errors[i], alpha=-1.0)
        loss += float(errors.square().sum(dtype=torch.float64))
        if stop < columns:
            W[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
    return W.T.contiguous(), loss
