"""LQ-LoRA: a weight as a NormalFloat grid and a low-rank branch, ``W ≈ Q + L₁ L₂`` (Guo et al. 2023, arXiv 2311.12023).

``min ‖√F ⊙ (W − Q − L₁ L₂)‖_F²`` over Q on the grid, L₁ (out, r) and L₂ (r, in), by turns from Q = 0:

* ``L₁ L₂`` is the truncated SVD of ``W − Q``, the optimum for F = 1. With F, the diagonal Fisher information of the
  dense model, it is that of ``D_row (W − Q) D_col``, un-scaled, with ``D_row = √(row means of F)`` and
  ``D_col = √(column means of F)``: the optimum where F is of rank one, and a heuristic elsewhere.
* Q is the grid's nearest value to ``W − L₁ L₂``; under a mask, 0 where pruned, which the next SVD then sees.

The error, with the whole F, is taken after each half-step. The SVD's half-step never raises that of F = 1; the grid's
may, so the loop ends when the error after it no longer falls, and the best pair of all is kept, not the last one.

The grid (Dettmers et al. 2023, arXiv 2305.14314): codes are places in the table of NormalFloat values, a scale per
`group_size` columns is their largest magnitude, and scales are codes themselves (`ScaleCodes`): of `scale_bits`, above
the smallest scale of the matrix, with a peak per `scale_group`. Codes are chosen with the scale as it comes back. With
``clip = "mse"``, which is ours, scales are chosen for the error that the loop minimizes. A matrix of n weights takes
``n (b + b₀/B₀) + b₁ ⌈n / (B₀ B₁)⌉ + 32`` bits, and its branch those of its factors.

W is the weight as earlier passes left it, or, with ``target = "dense"``, as the model came. After a pass that only
chose a mask, the latter lets the branch make up for what was pruned; after one that moved weights it undoes that.

With `budget`, an integer program gives each matrix one of the configurations `choices_…`: the least sum of errors whose
bits, the branches' included, are within the budget. By default 4 × 3 × 2 of them; each is tried on each matrix in a
survey, with `survey_iterations` rounds, the first SVD of which all share.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.checkpoint import DTYPES
from compress.errors import PlanError, RunError
from compress.grid import Grid, GridSpec, ScaleSpec
from compress.passes.base import Invariant, LinearPass, LinearState, Moments, Note, SettingError, Survey
from compress.passes.bit_budget import allocate, check_budget
from compress.passes.eora import SMALL, balanced, left_singular
from compress.passes.grid_search import least_error, second_level
from compress.state import LowRank

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.lock import Lock

CHOSEN = ("bits", "group_size", "scale_bits")  # what a survey decides; and the rank, where there are several


class LQLoRA(LinearPass):
    """Quantize to NormalFloat with a low-rank branch beside it; pruned weights keep their exact 0."""

    bits: int = Field(default=4, description="bits per code: 2, 3, 4 or 8")
    group_size: int = Field(default=64, ge=1, description="input columns per scale")
    rank: int = Field(default=64, ge=0, description="rank of the branch; 0: none, plain NormalFloat")
    iterations: int = Field(default=100, ge=1, description="rounds of SVD and rounding at most")
    scale_bits: int = Field(default=8, description="bits per code of a scale: 2, 3, 4 or 8")
    scale_group: int = Field(default=256, ge=1, description="scales per peak")
    second_dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of the peaks")
    fisher: bool = Field(default=False, description="weigh errors with the Fisher information of the dense model")
    clip: Literal["minmax", "mse"] = Field(
        default="minmax", description="range of a group: all weights, or least error"
    )
    target: Literal["current", "dense"] = Field(default="current", description="the weight that is decomposed")
    budget: float | None = Field(default=None, gt=0, description="bits per weight on average, branches included")
    choices_bits: tuple[int, ...] = Field(default=(2, 3, 4, 8), description="bits to choose from under a budget")
    choices_group: tuple[int, ...] = Field(default=(16, 32, 64), description="group sizes to choose from")
    choices_scale_bits: tuple[int, ...] = Field(default=(4, 8), description="scale_bits to choose from")
    choices_rank: tuple[int, ...] = Field(default=(), description="ranks to choose from; none: rank")
    survey_iterations: int = Field(default=2, ge=1, description="rounds that judge a configuration")

    rule: ClassVar[int] = 5
    establishes: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID, Invariant.LOW_RANK})
    preserves: ClassVar[frozenset[Invariant]] = frozenset(
        {Invariant.MASK, Invariant.PATTERN, Invariant.SHAPES, Invariant.TIES}
    )

    @field_validator("bits", "scale_bits", "choices_bits", "choices_scale_bits")
    @classmethod
    def _bits_exist(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        for bits in value if isinstance(value, tuple) else (value,):
            if bits not in (2, 3, 4, 8):
                raise SettingError(f"there is no code of {bits} bits", "bits are 2, 3, 4 or 8")
        return value

    @field_validator("choices_bits", "choices_group", "choices_scale_bits", "choices_rank")
    @classmethod
    def _are_choices(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value) or min(value, default=0) < 0:
            raise SettingError(f"{list(value)} are no choices", "give different numbers")
        return value

    @model_validator(mode="after")
    def _budget_decides(self) -> LQLoRA:
        if self.where and (self.budget is not None or any("budget" in table.overrides() for table in self.where)):
            fix = "take one pass for each set of linears, with match"
            raise SettingError("a budget is for all linears of a pass: it cannot go with where", fix)
        choices = {"choices_bits", "choices_group", "choices_scale_bits", "choices_rank", "survey_iterations"}
        unused = choices & self.model_fields_set
        if self.budget is None and unused:
            raise SettingError(f"{min(unused)} has no meaning without budget", "add budget, or leave it out")
        if self.budget is not None:
            given = {*CHOSEN, *(["rank"] if self.choices_rank else [])} & self.model_fields_set
            if given:
                problem = f"{min(given)} is chosen under a budget"
                raise SettingError(problem, "leave it out, or narrow the choices_… to one")
            if not (self.choices_bits and self.choices_group and self.choices_scale_bits) or 0 in self.choices_group:
                raise SettingError("a budget without choices", "leave the choices_… out, or give one or more each")
        return self

    def _merge(self, given: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        if "budget" in overrides and overrides["budget"] is None:  # a survey has chosen
            given = {key: value for key, value in given.items() if key != "survey_iterations" and "choices" not in key}
        return given | overrides

    def settings(self) -> dict[str, Any]:
        """Without `budget`, no choices; with it, nothing that it decides."""
        decided = {"survey_iterations", *(name for name in type(self).model_fields if name.startswith("choices"))}
        if self.budget is not None:
            decided = {*CHOSEN, *(["rank"] if self.choices_rank else [])}
        return {key: value for key, value in super().settings().items() if key not in decided}

    def provides(self) -> frozenset[Invariant]:
        """Of rank 0 there is no branch."""
        return self.establishes if self.added_rank() else self.establishes - {Invariant.LOW_RANK}

    def grid(self) -> GridSpec | None:
        """The grid; None under a budget, which finds each linear's before the first is quantized."""
        if self.budget is not None:
            return None
        second = ScaleSpec(self.scale_bits, self.scale_group, _dtype(self.second_dtype))
        return GridSpec(self.bits, self.group_size, scale_dtype=torch.float32, kind="nf", second=second)

    def added_rank(self) -> int | None:
        """The branch's; under a budget for ranks, the largest."""
        return max(self.choices_rank, default=self.rank) or None

    def needs_fisher(self) -> bool:
        """Where errors are weighed by it."""
        return self.fisher

    def learns(self) -> bool:
        """The Fisher information is of the calibration set."""
        return self.fisher

    def check_shape(self, out_features: int, in_features: int) -> None:
        """The group must divide the input width, and the branch be smaller than the weight."""
        most, largest = min(out_features, in_features), self.added_rank() or 0
        if largest > most:
            problem = f"rank {largest} is above {most}, the smaller side of a {out_features} × {in_features} linear"
            raise SettingError(problem, f"rank = {most} or less; a [[pass.where]] can give some linears another")
        sizes = (self.group_size,) if self.budget is None else self.choices_group
        if all(in_features % size for size in sizes):
            fits = [size for size in (16, 32, 64, 128, 256, in_features) if in_features % size == 0]
            names = " or ".join(map(str, sizes))
            problem = f"group_size {names} does not divide the input width {in_features}"
            raise SettingError(problem, f"choose among {', '.join(map(str, dict.fromkeys(fits)))}")

    def solving_bytes(self, out_features: int, in_features: int) -> int:
        """Places in the table of values and the best pair so far, or an SVD in float64; and the Fisher information."""
        weights, smaller = out_features * in_features, min(out_features, in_features)
        rank = self.added_rank() or 0
        svd = 0 if not rank or rank * SMALL <= smaller or subspace_will_do(rank, smaller) else 56 * smaller**2
        return max(16 * weights, svd) + 4 * weights * self.fisher

    def storage_bits(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """The bits of a linear with these settings: codes, codes of scales, peaks, offset and branch in `dtype`."""
        scales = out_features * in_features // self.group_size
        peaks = -(-scales // self.scale_group) * 8 * _dtype(self.second_dtype).itemsize
        branch = self.rank * (out_features + in_features) * dtype.itemsize * 8
        return out_features * in_features * self.bits + scales * self.scale_bits + peaks + 32 + branch

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The nearest values of the grid to `weight` (out, in) float32; `importance` (out, in) may weigh on scales."""
        spec = self.grid()
        assert spec is not None
        groups = weight.view(weight.shape[0], -1, self.group_size)  # (out, groups, group)
        exact = groups.abs().amax(-1)
        if self.clip == "mse":
            exact = least_error(groups, exact, spec, None if importance is None else importance.view_as(groups))
        scales = second_level(exact, self.scale_bits, self.scale_group, _dtype(self.second_dtype))
        scale = scales.scale()
        zero = torch.full_like(scale, spec.middle, dtype=torch.uint8)
        codes = spec.code(groups, scale.unsqueeze(-1), zero.unsqueeze(-1)).flatten(1)
        return Grid(spec, scale, zero, codes.to(torch.uint8), scales)

    def decompose(self, linear: LinearState, start: LowRank | None = None) -> Decomposition:
        """Q and L₁ L₂ of a linear. `start`: the first of the low-rank half-steps, where it is known."""
        norm, mask = self.norm(linear), linear.mask

        def quantize(weight: Tensor) -> Grid:
            return self.quantize(weight if mask is None else torch.where(mask, weight, 0.0), norm.fisher)

        W = self.goal(linear)
        return decompose(W, quantize, self.rank, norm, iterations=self.iterations, start=start)

    def goal(self, linear: LinearState) -> Tensor:
        """W (out, in)."""
        return linear.dense if self.target == "dense" else linear.effective()

    def norm(self, linear: LinearState) -> Norm:
        """The norm in which a linear's error is measured. Raises RunError without the Fisher information it needs."""
        if not self.fisher:
            return Norm()
        if linear.fisher is None:  # applied by hand: the pass manager fills it
            raise RunError("there is no Fisher information", fix="write fisher = false")
        return Norm.of(linear.fisher)

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Decompose one linear."""
        found = self.decompose(linear)
        linear.quantize(found.grid)
        linear.low_rank = found.branch and found.branch.rounded(linear.dtype)
        detail = f"nf{self.bits}, group {self.group_size}, scales of {self.scale_bits} bits, rank {self.rank}"
        return {"detail": f"{detail}, {found.rounds} rounds"}

    def surveys(self) -> bool:
        """A budget is for the whole model."""
        return self.budget is not None

    def _configurations(self) -> tuple[list[dict[str, int]], list[LQLoRA]]:
        """What a budget chooses from: the settings, and the pass with each."""
        keys = (*CHOSEN, "rank")
        grid = product(
            self.choices_bits, self.choices_group, self.choices_scale_bits, self.choices_rank or (self.rank,)
        )
        found = [dict(zip(keys, values, strict=True)) for values in grid]
        return found, [
            self.with_settings({"budget": None, **one, "iterations": self.survey_iterations}) for one in found
        ]

    def check_lock(self, lock: Lock, index: int) -> None:
        """Some configuration must meet the budget: what it costs is known from the shapes."""
        if self.budget is None or lock.spread:  # widths that the run finds: `survey` checks
            return
        _, trials = self._configurations()
        mine = [linear for linear in lock.linears if index in dict(linear.passes)]
        costs = [_costs(trials, lin.out_features, lin.in_features, DTYPES[lin.dtype])[1] for lin in mine]
        check_budget(self.budget, costs, sum(linear.weights for linear in mine))

    def survey(self, linears: Survey) -> dict[str, dict[str, Any]]:
        """The configuration of each linear under the budget."""
        assert self.budget is not None
        configurations, trials = self._configurations()
        names, fitting, costs, weights = [], [], [], 0
        for linear in linears():
            some, bits = _costs(trials, linear.out_features, linear.in_features, linear.dtype)
            names.append(linear.name)
            fitting.append(some)
            costs.append(bits)
            weights += linear.out_features * linear.in_features
        try:
            check_budget(self.budget, costs, weights)  # before hours of work
        except SettingError as error:
            raise PlanError(str(error), where="lqlora", fix=error.fix) from None
        errors = []
        for linear, some in zip(linears(), fitting, strict=True):
            starts = {r: low_rank(self.goal(linear), r, self.norm(linear)) for r in {trials[n].rank for n in some}}
            errors.append([trials[n].decompose(linear, starts[trials[n].rank]).error for n in some])
        chosen = allocate(errors, costs, math.floor(Fraction(str(self.budget)) * weights))
        return {
            name: configurations[some[place]] | {"budget": None}
            for name, some, place in zip(names, fitting, chosen, strict=True)
        }


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


# ---------------------------------------------------------------- the decomposition

# Of a row or column without any gradient, D is this part of the mean D: not 0, for it is divided by.
FLOOR = 1e-4


class Norm(NamedTuple):
    """The norm ``‖√F ⊙ Δ‖_F`` and its separable surrogate ``‖D_row Δ D_col‖_F``; all None is F = 1."""

    fisher: Tensor | None = None  # (out, in)
    rows: Tensor | None = None  # (out, 1)
    columns: Tensor | None = None  # (in,)

    @classmethod
    def of(cls, fisher: Tensor) -> Norm:
        """The norm of F (out, in)."""
        return cls(fisher, _diagonal(fisher, 1).unsqueeze(1), _diagonal(fisher, 0))

    def error(self, difference: Tensor) -> float:
        """``Σ F Δ²``."""
        squares = difference.square()
        return float((squares if self.fisher is None else squares.mul_(self.fisher)).sum(dtype=torch.float64))


def _diagonal(fisher: Tensor, over: int) -> Tensor:
    """√(mean of F over a dimension), in units of its mean and away from 0."""
    root = fisher.double().mean(over).sqrt()
    mean = root.mean()
    return (root / mean).clamp_min(FLOOR).float() if mean > 0 else torch.ones_like(root, dtype=torch.float32)


class Decomposition(NamedTuple):
    """``Q + L₁ L₂``; `error` is ``Σ F (W − Q − L₁ L₂)²``, `rounds` how many were made."""

    grid: Grid
    branch: LowRank | None
    error: float
    rounds: int


def decompose(
    weight: Tensor,
    quantize: Callable[[Tensor], Grid],
    rank: int,
    norm: Norm,
    *,
    iterations: int,
    start: LowRank | None = None,
) -> Decomposition:
    """Alternate between the low-rank branch and the grid; the best of what both half-steps leave.

    Args:
        weight: (out, in) float32 W.
        quantize: the grid of a weight.
        rank: of the branch; 0 for none.
        norm: of the error.
        iterations: rounds at most.
        start: the branch of the first round, where it is known.
    """
    best: Decomposition | None = None
    previous = math.inf  # the error after the last round
    grid: Grid | None = None
    free = weight  # W − Q
    for number in range(1, (iterations if rank else 1) + 1):
        branch = start if start is not None and grid is None else low_rank(free, rank, norm)
        if grid is not None and best is not None:
            error = norm.error(free - branch.product())
            best = min(best, Decomposition(grid, branch, error, number), key=_error)
        rest = weight - branch.product()
        grid = quantize(rest)
        Q = grid.dequantize(torch.float32)
        free, error = weight - Q, norm.error(rest.sub_(Q))
        now = Decomposition(grid, branch if rank else None, error, number)
        best = now if best is None else min(best, now, key=_error)
        if error >= previous:
            break
        previous = error
    assert best is not None
    return best._replace(rounds=number)


def _error(one: Decomposition) -> float:
    return one.error


# Above so many rows or columns a seeded subspace iteration replaces the symmetric eigenproblem, whose time grows with
# the cube: 0.4 s at 1024, 3 s at 2048 on one core.
EXACT = 1024
OVERSAMPLING, POWERS = 10, 4


def subspace_will_do(rank: int, smaller: int) -> bool:
    """Whether the iteration is used for this rank of a matrix with so many rows or columns, whichever are fewer."""
    return smaller > EXACT and 4 * (rank + OVERSAMPLING) <= smaller


def low_rank(matrix: Tensor, rank: int, norm: Norm) -> LowRank:
    """The best branch of this rank in the (surrogate) norm, with √σ in both factors. `matrix`: (out, in)."""
    scaled = matrix if norm.rows is None or norm.columns is None else norm.rows * matrix * norm.columns
    if subspace_will_do(rank, min(matrix.shape)):
        up, down = _subspace(scaled, rank)
    else:
        left, _ = left_singular(scaled, None, rank)
        up, down = left, left.T @ scaled.double()
    if norm.rows is not None and norm.columns is not None:
        up, down = up / norm.rows, down / norm.columns
    up, down = balanced(up, down)
    return LowRank(up.float().contiguous(), down.float().contiguous())


def _subspace(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U_r (out, r), orthonormal, and U_rᵀ A by a randomized range finder (Halko et al. 2011, arXiv 0909.4061)."""
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ test).Q  # (out, rank + 10)
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    inside = basis.T @ matrix
    left, _ = left_singular(inside, None, rank)
    return basis @ left.to(basis), left.to(basis).T @ inside


def _costs(
    trials: list[LQLoRA], out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[list[int], list[int]]:
    """The trials whose groups divide the input width, and the bits of each."""
    fitting = [n for n, one in enumerate(trials) if in_features % one.group_size == 0]
    return fitting, [trials[n].storage_bits(out_features, in_features, dtype) for n in fitting]
