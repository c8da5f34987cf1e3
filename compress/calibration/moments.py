"""Second moments of a linear layer's input, as plain sums over real tokens.

``H = X Xᵀ`` with X (in_features, tokens) depends on the layer's *input* only, so every pass of a sweep and every
linear that reads the same tensor share one `Moments` and its factorization (METHODS section 0). Plain sums make the
result independent of the order of batches up to rounding, and two `Moments` mergeable by addition.
"""

from __future__ import annotations

import copy
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


def panels(in_features: int) -> list[tuple[int, int]]:
    """First and last column (exclusive) of each panel of a Gram matrix, which holds its rows from the diagonal down."""
    width = max(128, -(-in_features // 8))
    return [(start, min(start + width, in_features)) for start in range(0, in_features, width)]


def gram_entries(in_features: int) -> int:
    """How many entries of a Gram matrix its panels hold."""
    return sum((in_features - start) * (stop - start) for start, stop in panels(in_features))


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

    Padding never enters (`add` takes real tokens only). Of the Gram matrix about half is held, the `panels`: in float64
    until `reduce`, in float32 from then on.
    """

    in_features: int
    statistics: Statistics
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tokens: int = 0

    def __post_init__(self) -> None:
        self._squares, self._sums = self._zeros(self.in_features), self._zeros(self.in_features)
        self._panels: list[Tensor] | None = None  # (in − start, stop − start) each
        if self.statistics is Statistics.GRAM:
            edges = panels(self.in_features)
            self._panels = [self._zeros(self.in_features - start, stop - start) for start, stop in edges]
        self._factors: dict[tuple[float, bool], Factor] = {}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def add(self, inputs: Tensor) -> None:
        """Add a batch. `inputs`: (tokens, in_features), real tokens only."""
        x = inputs.float()
        self.tokens += x.shape[0]
        self._factors.clear()
        if self._panels is None:
            self._squares += (x * x).sum(0)  # ten times as fast as vector_norm over rows
            return
        self._sums += x.sum(0)
        for (start, stop), panel in self._each():
            panel += x[:, start:].T @ x[:, start:stop]

    def merge(self, other: Moments) -> None:
        """Add the sums of `other`, which saw other tokens of the same input."""
        self.tokens += other.tokens
        self._factors.clear()
        if self._panels is None:
            self._squares += other._diagonal
            return
        if other._panels is None:
            raise ValueError("a Gram matrix cannot be merged with column norms")
        for panel, more in zip(self._panels, other._panels, strict=True):
            panel += more
        self._sums += other._sums

    def reduce(self, world: World) -> None:
        """Add up the sums over the processes of a run, each of which saw its own batches; no batch comes after."""
        self._sum(world)
        self._panels = self._panels and [panel.float() for panel in self._panels]

    def reduced(self, world: World) -> Moments:
        """The sums over the processes of a run, in float64; itself where there is one."""
        if world.size == 1:
            return self
        other = copy.deepcopy(self)
        other._sum(world)
        return other

    def _sum(self, world: World) -> None:
        counted = torch.tensor(self.tokens, dtype=torch.int64, device=self.device)
        world.sum(counted)
        self.tokens = int(counted)
        self._factors.clear()
        for tensor in (self._squares, self._sums, *(self._panels or ())):
            world.sum(tensor)

    def state(self) -> dict[str, Tensor]:
        """All sums, by name."""
        panels = {f"panel.{index}": panel for index, panel in enumerate(self._panels or ())}
        return {"tokens": torch.tensor(self.tokens), "squares": self._squares, "sums": self._sums} | panels

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse."""
        self.tokens = int(state["tokens"])
        self._squares, self._sums = state["squares"].to(self.device), state["sums"].to(self.device)
        self._panels = self._panels and [state[f"panel.{i}"].to(self.device) for i in range(len(self._panels))]
        self._factors.clear()

    def rescaled(self, scale: Tensor) -> Moments:
        """The moments of ``x ⊙ scale``, scale (in,)."""
        other = Moments(self.in_features, Statistics.NONE, self.device, self.tokens)
        other.statistics = self.statistics
        other._squares, other._sums = self._squares * scale.square(), self._sums * scale
        if self._panels is not None:
            other._panels = [(panel * scale[a:b]).mul_(scale[a:].unsqueeze(1)) for (a, b), panel in self._each()]
        return other

    @property
    def sums(self) -> Tensor:
        """(in,) Σ x per column; zero when only norms were collected."""
        return self._sums.float()

    @property
    def squares(self) -> Tensor:
        """(in,) Σ x² per column."""
        return self._diagonal.float()

    @property
    def _diagonal(self) -> Tensor:
        return self._squares if self._panels is None else torch.cat([panel.diagonal() for panel in self._panels])

    @property
    def norms(self) -> Tensor:
        """(in,) ‖X_j‖₂ per column, over all tokens."""
        return self.squares.sqrt()

    def gram(self) -> Tensor:
        """(in, in) Σ x xᵀ, symmetric. Raises ValueError when only norms were collected."""
        full = torch.empty(self.in_features, self.in_features, device=self.device)
        for (start, stop), panel in self._each():
            full[start:, start:stop] = panel
            full[start:stop, stop:] = panel[stop - start :].T
            corner = full[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).T)
        return full

    def is_finite(self) -> bool:
        """False when an input held NaN or infinity, or a sum overflowed."""
        return bool(torch.isfinite(self.squares).all())

    def factor(self, damping: float, *, by_activation: bool = False) -> Factor:
        """U of ``(H + λI)⁻¹ = Uᵀ U``, ``λ = damping · mean(diag H)`` (SparseGPT, arXiv 2301.00774, section 3).

        One Cholesky of the matrix read backwards and one triangular inverse: with ``J H J = L Lᵀ`` (J reverses the
        order), ``H = R Rᵀ`` for the upper-triangular ``R = J L J``, hence ``U = R⁻¹``. Dead columns (never a nonzero
        input) have λ alone, so that they neither send nor receive updates, and count less than live ones however small
        the inputs are. The result is kept: all passes of a sweep and all linears of a subset use it. `by_activation`:
        of H with its largest diagonal entries first.

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
            damped.diagonal().add_(damping * step * mean if mean else 1.0)  # without any input, the identity
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
        n = self.in_features
        turned = torch.zeros(n, n, device=self.device)
        for (start, stop), panel in self._each():
            turned[: n - start, n - stop : n - start] = panel.flip(0, 1)
        return turned.T  # what is above the diagonal of `turned` is the lower triangle of its transpose

    def error(self, difference: Tensor) -> float:
        """``‖Δ X‖²`` of a weight difference Δ (out, in): exact with the Gram matrix, its diagonal part with norms.

        Never negative, as a sum of squares; the panels' rounding would leave some where Δ X is next to nothing.
        """
        if self._panels is None:
            return float((difference.square() @ self.squares).sum())
        # tr(ΔHΔᵀ) panel by panel: what is on the block diagonal of H once, what is below it twice. That is half of the
        # multiplications of ΔH, and no matrix of its size.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for (start, stop), panel in self._each():
            own, panel = difference[:, start:stop], panel.float()
            product = torch.addmm(own @ panel[: stop - start], difference[:, stop:], panel[stop - start :], alpha=2.0)
            total += product.mul_(own).sum(dtype=torch.float64)
        return float(total.clamp_min(0.0))

    def _each(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """The panels with their first and last columns. Raises ValueError when only norms were collected."""
        if self._panels is None:
            raise ValueError("the Gram matrix was not collected; the pass must declare statistics = Statistics.GRAM")
        return zip(panels(self.in_features), self._panels, strict=True)


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
