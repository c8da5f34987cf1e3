"""EoRA: a low-rank branch that makes up for what compression lost, in the norm of the inputs (arXiv 2410.21271).

With ``ΔW = W − Ŵ`` (out, in) and the second moment ``H = X Xᵀ`` of what the layer really reads, the rank-r branch
``B A`` that minimizes ``‖(ΔW − B A) X‖_F`` is, for any ``T Tᵀ = H``, the truncated SVD of ``ΔW T = U Σ Vᵀ``:
``B = U_r``, ``A = U_rᵀ ΔW``, and its squared error is ``Σ_{i>r} σ_i²`` (Liu et al. 2024). So no inverse of T is needed,
and a singular H (fewer tokens than columns) does no harm. U and σ come from whichever symmetric matrix is smaller, in
float64:

* out ≤ in: ``ΔW H ΔWᵀ = U Σ² Uᵀ``.
* out > in: ``H = Q Λ Qᵀ``, ``T = Q Λ^½`` with the modes below ``λ_max · in · ε`` (ε of float32) left out, and
  ``Tᵀ ΔWᵀ ΔW T = V Σ² Vᵀ``, ``U = ΔW T V Σ⁻¹``.

Where the rank is small beside the matrix, a block Krylov method (Musco & Musco 2015, arXiv 1504.05477) finds the same
vectors from products with ΔW and H alone, in a fraction of the time: `_krylov`.

Each pair of a column of B and a row of A is scaled to equal norms, so that both fit the checkpoint's dtype. It comes
last: the branch is never merged, so mask and codes stay.

`norm = "weight"` takes H = I, the plain SVD of ΔW, as a baseline. With `budget`, `rank` is the largest rank: when all
factors are known, the budget's parameters go to where Σσ², relative to ``‖W X‖²``, falls fastest per parameter; the
ledger then has the errors of the ranks that are left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.grid import GridSpec
from compress.passes.base import Invariant, LinearPass, LinearState, Moments, Note, SettingError, Statistics
from compress.passes.grid_search import fit_groups, grid_of
from compress.state import LowRank

# From this many times the rank on, the block Krylov method is faster, and stops when a block adds no more than this of
# what is held: then the error left is within 1e-5 of the least (docs/lab-log.md).
SMALL = 16
GAIN = 1e-4


class EoRA(LinearPass):
    """Compensate what is lost by a low-rank branch; weights, masks and codes stay."""

    rank: int = Field(default=64, ge=1, description="rank of the branch; with budget, the largest")
    budget: int | None = Field(default=None, ge=0, description="parameters of its branches together")
    norm: Literal["activation", "weight"] = Field(default="activation", description="weight: the plain SVD, a baseline")
    factor_bits: int | None = Field(default=None, description="round the factors to 8 or 4 bits, a scale per 64 values")

    rule: ClassVar[int] = 7
    establishes: ClassVar[frozenset[Invariant]] = frozenset({Invariant.LOW_RANK})
    preserves: ClassVar[frozenset[Invariant]] = frozenset(
        {Invariant.MASK, Invariant.PATTERN, Invariant.GRID, Invariant.SHAPES, Invariant.TIES}
    )
    statistics: ClassVar[Statistics] = Statistics.GRAM

    @model_validator(mode="after")
    def _bits_exist(self) -> EoRA:
        if self.factor_bits not in (None, 4, 8):
            problem = f"no grid of factors has {self.factor_bits} bits"
            raise SettingError(problem, "factor_bits is 4 or 8", ("factor_bits",))
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> EoRA:
        for index, table in enumerate(self.where):
            if "budget" in table.overrides():
                problem = "budget is one for all linears together"
                raise SettingError(problem, "write it in the [[pass]] itself", ("where", index, "budget"))
        return self

    def added_rank(self) -> int:
        """The branch's."""
        return self.rank

    def check_shape(self, out_features: int, in_features: int) -> None:
        """A branch of full rank would be the weight itself."""
        most = min(out_features, in_features)
        if self.rank > most:
            problem = f"rank {self.rank} is above {most}, the smaller side of a {out_features} × {in_features} linear"
            raise SettingError(problem, f"rank = {most} or less; a [[pass.where]] can give some linears another")

    def solving_bytes(self, out_features: int, in_features: int) -> int:
        """Products with H in float64, unless the rank is small."""
        smaller = min(out_features, in_features)
        if self.rank * SMALL <= smaller:
            return 0
        return (8 if smaller == out_features else 48) * in_features**2 + 16 * out_features * in_features

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Find the branch of one linear."""
        missing = linear.dense - linear.base()
        plain = self.norm == "weight"
        gram = None if plain and self.budget is None else moments.gram()
        vectors, squares = left_singular(missing, None if plain else gram, self.rank)
        up, down = balanced(vectors, vectors.T @ missing.double())
        branch = LowRank(up.float(), down.float())
        if self.factor_bits is not None:
            branch = LowRank(*(_rounded(one, self.factor_bits, linear.dtype) for one in (branch.up, branch.down)))
        branch = branch.rounded(linear.dtype)
        if self.budget is not None and gram is not None:  # the pass manager cuts the ranks when it knows all spectra
            whole = moments.error(linear.dense)
            errors = errors_by_rank(moments.error(missing), missing, branch, gram) / max(whole, 1e-30)
            size = float(linear.dense.square().sum()) if plain else whole
            branch = replace(branch, spectrum=(squares / max(size, 1e-30)).float(), errors=errors.cpu())
        linear.low_rank = branch
        return {"detail": f"rank {branch.rank}"}


def left_singular(missing: Tensor, H: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The first left singular vectors of ``ΔW T``, ``T Tᵀ = H``, and the squares of their singular values.

    Args:
        missing: (out, in) ΔW.
        H: (in, in) positive semi-definite; None is the identity.
        rank: how many.

    Returns:
        (out, rank) float64, orthonormal, largest first, and (rank,) float64.
    """
    if rank * SMALL <= min(missing.shape):
        return _krylov(missing, H, rank)
    delta = missing.double()
    out, width = delta.shape
    if out <= width:
        product = delta @ delta.T if H is None else delta @ H.double() @ delta.T
        values, vectors = torch.linalg.eigh((product + product.T) / 2)
        return vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp_min(0.0)
    if H is not None:
        values, Q = torch.linalg.eigh(H.double())
        kept = values > values[-1] * width * torch.finfo(torch.float32).eps
        delta = delta @ (Q[:, kept] * values[kept].sqrt())  # (out, modes)
    product = delta.T @ delta
    values, V = torch.linalg.eigh((product + product.T) / 2)
    values, V = values.flip(0)[:rank].clamp_min(0.0), V.flip(1)[:, :rank]
    # Directions of no error are not normalized; QR completes them, and keeps the others, to orthonormal ones.
    U, R = torch.linalg.qr(torch.nn.functional.pad(delta @ V, (0, rank - V.shape[1])))
    return U * torch.where(R.diagonal() < 0, -1.0, 1.0), torch.nn.functional.pad(values, (0, rank - len(values)))


def _krylov(missing: Tensor, H: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """As `left_singular`, by the block Krylov method on ``M = ΔW H ΔWᵀ``, which is never made.

    An orthonormal basis Q of span(Ω, MΩ, M²Ω, …) grows block by block; the eigenvectors of ``QᵀMQ``, the best that
    the span has, are taken when a block adds less than `GAIN` to what they hold of tr M. Products with M are in
    float32 (an error of 1e-7 of its largest eigenvalue), the eigenvectors in float64.
    """
    size = max(8, -(-rank // 2))
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(missing.shape[0], size, generator=generator).to(missing.device)
    basis = images = block.new_empty(missing.shape[0], 0)
    held = -1.0
    while True:
        for _ in range(2):  # once leaves what the first rounding brought back
            block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
        read = missing.T @ block
        image = missing @ (read if H is None else H @ read)
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        inside = (basis.T @ images).double()
        values, vectors = torch.linalg.eigh((inside + inside.T) / 2)
        values, vectors = values.flip(0)[:rank].clamp_min(0.0), vectors.flip(1)[:, :rank]
        before, held = held, float(values.sum())
        if (len(values) == rank and held - before <= GAIN * held) or basis.shape[1] + size > missing.shape[0]:
            return torch.linalg.qr(basis.double() @ vectors).Q, values
        block = image


def errors_by_rank(error: float, missing: Tensor, branch: LowRank, H: Tensor) -> Tensor:
    """``‖(ΔW − B_k A_k) X‖²`` with the first k columns of B and rows of A, for k = 0 … r.

    Of the factors as they are, rounded, and in whatever norm they are the best: with ``R = A H`` it is
    ``‖ΔW X‖² − 2 Σ_{i≤k} (Bᵀ ΔW Rᵀ)_ii + Σ_{i,j≤k} (BᵀB)_ij (R Aᵀ)_ij``.

    Args:
        error: ``‖ΔW X‖²``.
        missing: (out, in) ΔW.
        branch: B (out, r) and A (r, in).
        H: (in, in) X Xᵀ.

    Returns:
        (r + 1,) float64.
    """
    B, A = branch.up, branch.down
    R = (A @ H).double()  # (r, in)
    gain = ((B.T @ missing) * R).sum(1)  # (r,)
    both = (B.T @ B) * (R @ A.T.double())  # (r, r)
    cost = both.cumsum(0).cumsum(1).diagonal()  # the sums of its leading squares
    return error - torch.nn.functional.pad(2 * gain.cumsum(0) - cost, (1, 0)).clamp_max(error)


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of `up` (out, r) and rows of `down` (r, in) of equal norms."""
    ratio = (down.norm(dim=1) / up.norm(dim=0).clamp_min(1e-30)).sqrt()  # (r,)
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return up * ratio, down / ratio.unsqueeze(1)


def _rounded(factor: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """A factor as the values of a symmetric grid, along its longer side, in groups of 64 where they divide it."""
    tall = factor.shape[0] > factor.shape[1]
    rows = factor.T.contiguous() if tall else factor
    spec = GridSpec(bits, 64 if rows.shape[1] % 64 == 0 else -1)
    scale, zero = fit_groups(rows, spec, dtype)
    width = spec.width(rows.shape[1])
    codes = spec.code(rows, scale.repeat_interleave(width, 1), zero.repeat_interleave(width, 1))
    values = grid_of(codes, scale, zero, spec, dtype).dequantize(dtype)
    return values.T.contiguous() if tall else values


def spend(spectra: dict[str, Tensor], sizes: dict[str, int], budget: int) -> dict[str, int]:
    """The ranks under a budget of parameters that leave the least ``Σ σ²``, greedily by σ² per parameter.

    Args:
        spectra: by linear, the squares of its singular values, largest first, relative to its output.
        sizes: by linear, the parameters of one rank (out + in).
        budget: parameters in all.
    """
    steps = [(-float(value) / sizes[name], name) for name, values in spectra.items() for value in values]
    ranks = dict.fromkeys(spectra, 0)
    closed: set[str] = set()
    for _, name in sorted(steps):
        if name in closed or sizes[name] > budget:
            closed.add(name)  # a later, smaller value of the same linear must not come before this one
            continue
        ranks[name] += 1
        budget -= sizes[name]
    return ranks
