"""Second moments of a linear layer's input, as plain sums over real tokens.

``H = X Xᵀ`` with X (in_features, tokens) depends on the layer's *input* only, so every pass of a sweep and every
linear that reads the same tensor share one `Moments` and its factorization (METHODS section 0). Plain sums make the
result independent of the order of batches up to rounding, and two `Moments` mergeable by addition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import torch

from compress.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.distributed import World


class Statistics(IntEnum):
    """What a pass needs to know of its input: nothing, column norms, or the whole Gram matrix."""

    NONE = 0
    NORMS = 1
    GRAM = 2


# The fixed ladder of decision D5: the plan's damping, then ten and a hundred times as much, then failure.
DAMPING_LADDER = (1.0, 10.0, 100.0)
SMALLEST_HALF = 256  # columns; below, LAPACK's own solver is as fast


@dataclass(frozen=True)
class Factor:
    """``H_λ⁻¹ = Uᵀ U`` with U (in, in) upper-triangular; `damping` is the one that succeeded, `dead` (in,) bool.

    `order` (in,): the columns that the rows and columns of U stand for; None where they are in order.
    """

    upper: Tensor
    damping: float
    dead: Tensor
    order: Tensor | None = None


@dataclass
class Moments:
    """Sums over the tokens seen: `squares` (in,) = Σ x², and with GRAM `gram` (in, in) = Σ x xᵀ and `sums` (in,) = Σ x.

    float32 throughout; padding never enters (`add` takes real tokens only).
    """

    in_features: int
    statistics: Statistics
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: int = 0

    def __post_init__(self) -> None:
        self._squares = torch.zeros(self.in_features, device=self.device)
        self.sums = torch.zeros(self.in_features, device=self.device)
        self._lower: Tensor | None = None
        if self.statistics is Statistics.GRAM:
            self._lower = torch.zeros(self.in_features, self.in_features, device=self.device)
        self._factors: dict[tuple[float, bool], Factor] = {}

    def add(self, inputs: Tensor) -> None:
        """Add a batch. `inputs`: (tokens, in_features), real tokens only."""
        x = inputs.float()
        self.tokens += x.shape[0]
        self._factors.clear()
        if self._lower is None:
            self._squares += (x * x).sum(0)  # ten times as fast as vector_norm over rows
            return
        self.sums += x.sum(0)
        # Only the lower triangle, panel by panel: about half of the multiplications of XᵀX.
        for start, stop in self._panels():
            self._lower[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])

    def merge(self, other: Moments) -> None:
        """Add the sums of `other`, which saw other tokens of the same input."""
        self.tokens += other.tokens
        self._factors.clear()
        if self._lower is None:
            self._squares += other.squares
            return
        if other._lower is None:
            raise ValueError("a Gram matrix cannot be merged with column norms")
        self._lower += other._lower
        self.sums += other.sums

    def reduce(self, world: World) -> None:
        """Add up the sums over the processes of a run, each of which saw its own tokens of the same input."""
        if world.size == 1:
            return
        counted = torch.tensor(self.tokens, dtype=torch.int64, device=self.device)
        world.sum(counted)
        self.tokens = int(counted)
        self._factors.clear()
        if self._lower is None:
            world.sum(self._squares)
            return
        world.sum(self.sums)
        for start, stop in self._panels():  # about half of the matrix is above the diagonal, and need not travel
            panel = self._lower[start:stop, :stop].contiguous()
            world.sum(panel)
            self._lower[start:stop, :stop] = panel

    def rescaled(self, scale: Tensor) -> Moments:
        """The moments of ``x ⊙ scale``, scale (in,)."""
        other = Moments(self.in_features, self.statistics, self.device, self.tokens)
        if self._lower is None:
            other._squares = self._squares * scale.square()
        else:
            other._lower = (self._lower * scale).mul_(scale.unsqueeze(1))
            other.sums = self.sums * scale
        return other

    @property
    def squares(self) -> Tensor:
        """(in,) Σ x² per column."""
        return self._squares if self._lower is None else self._lower.diagonal().clone()

    @property
    def norms(self) -> Tensor:
        """(in,) ‖X_j‖₂ per column, over all tokens."""
        return self.squares.sqrt()

    def gram(self) -> Tensor:
        """(in, in) Σ x xᵀ, symmetric. Raises ValueError when only norms were collected."""
        if self._lower is None:
            raise ValueError("the Gram matrix was not collected; the pass must declare statistics = Statistics.GRAM")
        lower = self._lower.tril_()
        full = lower + lower.T
        full.diagonal().mul_(0.5)
        return full

    def is_finite(self) -> bool:
        """False when an input held NaN or infinity, or a sum overflowed."""
        return bool(torch.isfinite(self.squares).all())

    def factor(self, damping: float, *, by_activation: bool = False) -> Factor:
        """U of ``(H + λI)⁻¹ = Uᵀ U``, ``λ = damping · mean(diag H)`` (SparseGPT, arXiv 2301.00774, section 3).

        One Cholesky of the matrix read backwards and one triangular inverse: with ``J H J = L Lᵀ`` (J reverses the
        order), ``H = R Rᵀ`` for the upper-triangular ``R = J L J``, hence ``U = R⁻¹``. Dead columns (never a nonzero
        input) get a unit diagonal, so that they neither send nor receive updates. The result is kept: all passes of
        a sweep and all linears of a subset use it. `by_activation`: of H with its largest diagonal entries first.

        Raises:
            RunError: the matrix is not positive definite at any step of the ladder.
        """
        key = (damping, by_activation)
        if key in self._factors:
            return self._factors[key]
        diagonal = self.squares
        order = torch.argsort(diagonal, descending=True, stable=True) if by_activation else None
        mean = diagonal.mean().item()
        dead = diagonal == 0
        for step in DAMPING_LADDER:
            damped = self._backwards(order)
            damped.diagonal().add_(damping * step * mean)
            damped.diagonal()[(dead if order is None else dead[order]).flip(0)] = 1.0
            failed = torch.empty((), dtype=torch.int32, device=self.device)
            L, failed = torch.linalg.cholesky_ex(damped, out=(damped, failed))  # reads the lower triangle only
            if failed.item() == 0:
                upper = L.flip(0, 1).contiguous()  # R
                del L, damped
                _invert_upper(upper)
                if bool(torch.isfinite(upper).all()):
                    self._factors[key] = Factor(upper, damping * step, dead, order)
                    return self._factors[key]
        raise RunError(
            f"the second moment of the input ({self.in_features} columns, {self.tokens} tokens) is not positive "
            f"definite, even with damping {damping * DAMPING_LADDER[-1]:g}",
            fix="raise damping, or calibrate on more tokens",
        )

    def _backwards(self, order: Tensor | None) -> Tensor:
        """A copy of ``J H J``, of which the lower triangle counts; `order` puts H's rows and columns in another one."""
        if order is not None:
            return self.gram()[order][:, order].flip(0, 1)
        if self._lower is None:
            return self.gram().flip(0, 1)
        return self._lower.tril_().flip(0, 1).T  # the transpose of an upper triangle

    def error(self, difference: Tensor) -> float:
        """``‖Δ X‖²`` of a weight difference Δ (out, in): exact with the Gram matrix, its diagonal part with norms."""
        if self._lower is None:
            return float((difference.square() @ self.squares).sum())
        # With the lower triangle L of H and its diagonal D, H = L + Lᵀ − D, so tr(ΔHΔᵀ) = 2 Σ Δ∘(ΔL) − Σ Δ²D. Panel by
        # panel only the rows under the diagonal take part: half the multiplications of ΔH, and no matrix of its size.
        lower = self._lower.tril_()
        total = -(difference.square() @ lower.diagonal()).sum(dtype=torch.float64)
        for start, stop in self._panels():
            product = difference[:, start:] @ lower[start:, start:stop]
            total += 2.0 * product.mul_(difference[:, start:stop]).sum(dtype=torch.float64)
        return float(total)

    def _panels(self) -> Iterator[tuple[int, int]]:
        width = max(128, -(-self.in_features // 8))
        for start in range(0, self.in_features, width):
            yield start, min(start + width, self.in_features)


def _invert_upper(R: Tensor) -> None:
    """The inverse of an upper-triangular matrix (n, n), in its place.

    By halves, ``[[A, B], [0, C]]⁻¹ = [[A⁻¹, −A⁻¹ B C⁻¹], [0, C⁻¹]]``: two thirds of the multiplications of solving for
    the identity, and no second matrix.
    """
    n = R.shape[0]
    if n <= SMALLEST_HALF:
        identity = torch.eye(n, dtype=R.dtype, device=R.device)
        R.copy_(torch.linalg.solve_triangular(R, identity, upper=True))
        return
    half = n // 2
    _invert_upper(R[:half, :half])
    _invert_upper(R[half:, half:])
    R[:half, half:] = (R[:half, :half] @ R[:half, half:] @ R[half:, half:]).neg_()
