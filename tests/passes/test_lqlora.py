"""LQ-LoRA against brute force, singular value tails, real packing and enumeration, in float64 (METHODS section 6)."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import compress
from compress.calibration.fisher import diagonal_fisher
from compress.calibration.plan_source import make_tokens
from compress.compiling import compile_plan
from compress.errors import PlanError, RunError
from compress.export.reader import open_model
from compress.grid import Grid, normal_float
from compress.invariants import check_invariants
from compress.passes import PERP, RTN, EoRA, LinearState, Magnitude, Wanda
from compress.passes.base import Invariant
from compress.passes.bit_budget import allocate
from compress.passes.grid_search import least_error, second_level
from compress.passes.lqlora import EXACT, LQLoRA, Norm, decompose, low_rank
from compress.state import LowRank
from tests.conftest import tiny_directory
from tests.passes import NOTHING, draw, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

BITS = [2, 3, 4, 8]
every_width = pytest.mark.parametrize("bits", BITS)


def heavy(rows: int, columns: int, *, seed: int) -> Tensor:
    """A weight with a few strong directions and rows of different size, beside noise."""
    strong = draw(rows, 3, seed=seed) @ draw(3, columns, seed=seed + 100)
    return (draw(rows, columns, seed=seed + 200) + strong) * draw(rows, 1, seed=seed + 300).mul(0.5).exp() * 0.1


def importance(rows: int, columns: int, *, seed: int) -> Tensor:
    """A positive F that is not of rank one."""
    return (
        draw(rows, columns, seed=seed).square()
        * draw(rows, 1, seed=seed + 1).exp()
        * draw(columns, seed=seed + 2).exp()
    )


def informed(weight: Tensor, fisher: Tensor | None, dtype: torch.dtype = torch.float32) -> LinearState:
    """A layer of which the Fisher information is known."""
    state = state_of(weight, dtype)
    state.fisher = fisher  # type: ignore[attr-defined]
    return state


def values(grid: Grid) -> Tensor:
    """The weight of a grid, one entry at a time, float64."""
    table, width = normal_float(grid.spec.bits).double(), grid.codes.shape[1] // grid.scale.shape[1]
    found = torch.empty(grid.codes.shape, dtype=torch.float64)
    for row, column in np.ndindex(*grid.codes.shape):
        found[row, column] = grid.scale[row, column // width].double() * table[int(grid.codes[row, column])]
    return found


def weighted(difference: Tensor, fisher: Tensor | None = None) -> float:
    """``Σ F Δ²`` in float64."""
    squares = difference.double() ** 2
    return float((squares if fisher is None else squares * fisher.double()).sum())


def apply(state: LinearState, **settings: Any) -> LinearState:
    """Apply the pass, and check what holds of all its results."""
    one, before, weight = LQLoRA(**settings), state.mask, state.effective().clone()
    one.apply(state, NOTHING)
    linear = SimpleNamespace(
        name=state.name, out_features=weight.shape[0], in_features=weight.shape[1], passes=((0, one),)
    )
    check_invariants(linear, 0, state, before)  # type: ignore[arg-type]
    assert state.mask is before
    assert state.grid is not None
    assert state.grid.spec == one.grid()
    assert state.grid.second is not None
    assert torch.equal(state.grid.scale, state.grid.second.scale())
    assert torch.equal(state.weight, values(state.grid).float().to(state.dtype).float())
    if one.rank:
        assert state.low_rank is not None
        assert state.low_rank.rank == one.rank
        rounded = state.low_rank.rounded(state.dtype)
        assert torch.equal(rounded.up, state.low_rank.up)
        assert torch.equal(rounded.down, state.low_rank.down)
    else:
        assert state.low_rank is None
    return state


# ---------------------------------------------------------------- NormalFloat


@every_width
def test_the_table_has_zero_and_one_value_more_above_than_below(bits: int) -> None:
    table = normal_float(bits)
    assert len(table) == 2**bits
    assert (table.diff() > 0).all()
    assert table[0] == -1
    assert table[-1] == 1
    assert (table == 0).sum() == 1
    assert (int((table < 0).sum()), int((table > 0).sum())) == (2 ** (bits - 1) - 1, 2 ** (bits - 1))


def test_the_tables_are_those_of_the_papers() -> None:
    four = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
        -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
        0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""  # QLoRA, appendix E
    torch.testing.assert_close(normal_float(4), torch.tensor([float(v) for v in four.split()]), rtol=0, atol=1e-6)
    rounded = {2: [-1, 0, 0.338, 1], 3: [-1, -0.479, -0.217, 0, 0.161, 0.338, 0.563, 1]}
    for bits, known in rounded.items():
        torch.testing.assert_close(normal_float(bits), torch.tensor(known), rtol=0, atol=6e-4)


@every_width
@pytest.mark.parametrize("group_size", [4, 12, 24])
def test_codes_are_the_nearest_to_the_scales_that_come_back(bits: int, group_size: int) -> None:
    weight = heavy(5, 24, seed=bits)
    weight[2, :12] = 0.0
    grid = LQLoRA(bits=bits, group_size=group_size, scale_bits=2, scale_group=3, rank=0).quantize(weight)
    table = normal_float(bits).double()
    for row, column in np.ndindex(5, 24):
        scale = float(grid.scale[row, column // group_size])
        distances = (scale * table - float(weight[row, column])).abs()
        assert distances[int(grid.codes[row, column])] <= distances.min() + 1e-7 * scale
    assert (grid.codes[2, :4] == 2 ** (bits - 1) - 1).all()  # an exact 0 stays one
    assert (grid.zero == 2 ** (bits - 1) - 1).all()


@every_width
def test_a_group_is_exact_at_its_largest_magnitude_where_its_scale_is(bits: int) -> None:
    weight = torch.tensor([[0.5, -0.25, 2.0, 0.125], [0.0, 0.0, 1.0, 0.0]])
    grid = LQLoRA(bits=bits, group_size=4, rank=0).quantize(weight)  # two scales, both ends of the second level
    assert grid.scale.flatten().tolist() == [2.0, 1.0]
    assert grid.dequantize(torch.float32)[:, 2].tolist() == [2.0, 1.0]


@every_width
@pytest.mark.parametrize("with_importance", [False, True])
def test_a_scale_of_least_error_is_the_best_of_three_ranges_and_of_their_refits(
    bits: int, with_importance: bool
) -> None:
    weight = heavy(6, 64, seed=bits + 20)
    weight[1, :16] = 0.0
    F = importance(6, 64, seed=3) if with_importance else torch.ones(6, 64)
    F[2, :16] = 0.0
    spec = LQLoRA(bits=bits, group_size=16).grid()
    assert spec is not None
    groups, weights = weight.view(6, 4, 16), F.view(6, 4, 16).double()
    largest = groups.abs().amax(-1)
    found = least_error(groups, largest, spec, F.view(6, 4, 16) if with_importance else None)
    table = normal_float(bits).double()

    def error(scales: Tensor) -> Tensor:
        """(out, groups) with the nearest value of every weight."""
        steps = scales.double().unsqueeze(-1) * table  # (out, groups, values)
        return ((groups.double().unsqueeze(-1) - steps.unsqueeze(2)).square().amin(-1) * weights).sum(-1)

    ours, candidates = error(found), []
    for part in (1.0, 0.8, 0.6):
        steps = part * largest.double().unsqueeze(-1) * table
        values = table[(groups.double().unsqueeze(-1) - steps.unsqueeze(2)).abs().argmin(-1)]
        refit = (weights * values * groups).sum(-1) / (weights * values**2).sum(-1)
        candidates += [error(part * largest), error(torch.where(refit > 0, refit, largest))]
    assert (ours <= candidates[0] * (1 + 1e-5)).all()  # the largest magnitude
    torch.testing.assert_close(ours, torch.stack(candidates).amin(0), rtol=1e-2, atol=1e-9)
    assert ours.sum() < candidates[0].sum()
    assert (found[largest > 0] > 0).all()
    assert found[1, 0] == 0  # no weight, no scale


@pytest.mark.parametrize("bits", [2, 3])
def test_scales_of_least_error_pay_in_the_norm_that_they_see(bits: int) -> None:
    weight, fisher = heavy(32, 64, seed=18), importance(32, 64, seed=18)
    for F in (None, fisher):
        plain, clipped = (
            LQLoRA(bits=bits, group_size=32, rank=4, clip=clip, fisher=F is not None).decompose(informed(weight, F))
            for clip in ("minmax", "mse")
        )
        assert clipped.error < 0.95 * plain.error


# ---------------------------------------------------------------- scales of scales


@every_width
@pytest.mark.parametrize("group", [1, 5, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_become_the_nearest_steps_above_the_smallest(bits: int, group: int, dtype: torch.dtype) -> None:
    scales = draw(6, 5, seed=bits).exp()
    found = second_level(scales, bits, group, dtype)
    flat, largest = scales.double().flatten(), 2**bits - 1
    assert found.offset == flat.min().float()
    assert found.peaks.dtype == dtype
    assert len(found.peaks) == -(-30 // group)
    back = found.scale().double().flatten()
    for start in range(0, 30, group):
        part = flat[start : start + group]
        peak = found.peaks[start // group].double()
        torch.testing.assert_close(peak, part.max() - flat.min(), rtol=torch.finfo(dtype).eps, atol=1e-6)
        steps = flat.min() + peak * torch.arange(largest + 1).double() / largest
        nearest = (part.unsqueeze(1) - steps).abs().min(1).values
        torch.testing.assert_close((back[start : start + group] - part).abs(), nearest, rtol=1e-3, atol=1e-5)
    assert int(found.codes.max()) <= largest
    assert (found.scale() > 0).all()


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_that_come_back_are_positive_and_finite_whatever_they_were(bits: int, dtype: torch.dtype) -> None:
    for scales in ([0.0, 0.0], [0.0, 3.0], [1e-30, 1.0], [1e-3, 1e5], [2.0, 2.0], [1e-42, 0.0], [1.0, 1.0 + 1e-6]):
        found = second_level(torch.tensor([scales]), bits, 2, dtype).scale()
        assert (found > 0).all()
        assert torch.isfinite(found).all()


def test_a_group_without_weight_does_not_spoil_the_scales_of_the_others() -> None:
    scales = torch.tensor([[1.0, 0.0, 1.4, 2.0]])
    found = second_level(scales, 2, 4, torch.float32)
    assert found.offset == 1.0
    torch.testing.assert_close(found.scale(), torch.tensor([[1.0, 1.0, 4 / 3, 2.0]]))  # not 2/3 above 0


def packed(codes: Tensor, bits: int) -> bytes:
    """Codes as one stream of bits."""
    planes = (codes.flatten().unsqueeze(1) >> torch.arange(bits, dtype=torch.uint8)) & 1
    return np.packbits(planes.numpy().astype(np.uint8)).tobytes()


@every_width
@pytest.mark.parametrize("scale_bits", [2, 8])
@pytest.mark.parametrize("second_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", [0, 3])
def test_storage_is_what_packing_takes(bits: int, scale_bits: int, second_dtype: Any, rank: int) -> None:
    settings: dict[str, Any] = {"bits": bits, "scale_bits": scale_bits, "second_dtype": second_dtype, "rank": rank}
    for group_size, scale_group, shape in ((16, 4, (8, 64)), (8, 256, (24, 40))):
        one = LQLoRA(group_size=group_size, scale_group=scale_group, **settings)
        state = state_of(heavy(*shape, seed=1), torch.float16)
        one.apply(state, NOTHING)
        assert state.grid is not None
        second = state.grid.second
        assert second is not None
        size = len(packed(state.grid.codes, bits)) + len(packed(second.codes, scale_bits))
        size += second.peaks.numel() * second.peaks.element_size() + second.offset.element_size()
        if state.low_rank is not None:
            size += sum(len(one.half().numpy().tobytes()) for one in (state.low_rank.up, state.low_rank.down))
        assert one.storage_bits(*shape, torch.float16) == 8 * size


def test_storage_of_the_usual_settings_is_the_papers() -> None:
    """QLoRA: 4 + 8/64 + 32/(64 · 256) = 4.127 bits per weight, and our offset per matrix."""
    bits = LQLoRA(rank=0).storage_bits(4096, 4096, torch.float16)
    assert bits == Fraction(4096**2) * (4 + Fraction(8, 64) + Fraction(32, 64 * 256)) + 32
    assert LQLoRA(rank=64).storage_bits(4096, 4096, torch.float16) - bits == 64 * 8192 * 16


# ---------------------------------------------------------------- the decomposition


class Watched:
    """A quantizer that notes what it was asked for, and gives in its n-th call a grid of zeros instead."""

    def __init__(self, one: LQLoRA, spoilt: int = 0) -> None:
        self.one, self.spoilt = one, spoilt
        self.calls: list[tuple[Tensor, Grid]] = []

    def __call__(self, weight: Tensor) -> Grid:
        grid = self.one.quantize(weight)
        if len(self.calls) + 1 == self.spoilt:
            grid = replace(grid, codes=torch.full_like(grid.codes, grid.spec.middle))
        self.calls.append((weight.clone(), grid))
        return grid

    def errors(self, weight: Tensor, fisher: Tensor | None) -> list[float]:
        """After each half-step but the first: ``W − L₁L₂ − Q`` for the Q before and the Q after."""
        found, Q = [], None
        for rest, grid in self.calls:
            found += [] if Q is None else [weighted(rest - Q, fisher)]
            Q = values(grid)
            found.append(weighted(rest - Q, fisher))
        return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("with_fisher", [False, True])
def test_the_best_of_all_half_steps_is_kept(bits: int, rank: int, with_fisher: bool) -> None:
    for seed in range(4):
        weight = heavy(16, 32, seed=seed)
        fisher = importance(16, 32, seed=seed) if with_fisher else None
        norm = Norm() if fisher is None else Norm.of(fisher)
        quantize = Watched(LQLoRA(bits=bits, group_size=16, rank=rank))
        found = decompose(weight, quantize, rank, norm, iterations=30)
        errors = quantize.errors(weight, fisher)
        assert found.branch is not None
        left = weighted(weight.double() - values(found.grid) - found.branch.product().double(), fisher)
        assert found.error == pytest.approx(left, rel=1e-4)
        assert left == pytest.approx(min(errors), rel=1e-4)
        rounded = errors[::2]  # after the grid's half-steps: they fall, but the last
        assert all(a > b for a, b in pairwise(rounded[:-1]))
        assert found.rounds == len(quantize.calls)
        assert found.rounds == 30 or rounded[-1] >= rounded[-2] * (1 - 1e-6)


@pytest.mark.parametrize("spoilt", [2, 3, 4])
def test_a_last_round_that_is_worse_is_not_returned(spoilt: int) -> None:
    weight = heavy(16, 32, seed=1)
    quantize = Watched(LQLoRA(bits=3, group_size=16, rank=4), spoilt)
    found = decompose(weight, quantize, 4, Norm(), iterations=30)
    errors = quantize.errors(weight, None)
    assert found.rounds == len(quantize.calls) == spoilt
    assert errors[-1] > 3 * min(errors)
    assert found.error == pytest.approx(min(errors), rel=1e-4)
    assert found.grid is quantize.calls[-2][1]  # with the branch that was fitted to it afterwards
    shorter = decompose(weight, Watched(LQLoRA(bits=3, group_size=16, rank=4)), 4, Norm(), iterations=spoilt - 1)
    assert found.error <= shorter.error


@pytest.mark.parametrize("with_fisher", [False, True])
def test_more_rounds_are_never_worse(with_fisher: bool) -> None:
    weight, fisher = heavy(24, 32, seed=2), importance(24, 32, seed=2) if with_fisher else None
    errors = [
        LQLoRA(bits=2, group_size=16, rank=4, iterations=n, fisher=with_fisher)
        .decompose(informed(weight, fisher))
        .error
        for n in (1, 2, 3, 5, 10, 100)
    ]
    assert all(a >= b for a, b in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_the_low_rank_half_step_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    """So it never raises the plain error: it is the least of all branches, the one before among them."""
    W, Q = heavy(*shape, seed=3), values(LQLoRA(bits=2, group_size=4, rank=0).quantize(heavy(*shape, seed=4)))
    free = W.double() - Q
    branch = low_rank(free.float(), rank, Norm())
    U, sigma, Vh = torch.linalg.svd(free, full_matrices=False)
    torch.testing.assert_close(branch.product().double(), (U[:, :rank] * sigma[:rank]) @ Vh[:rank], rtol=0, atol=1e-4)
    left = weighted(free - branch.product().double())
    assert left == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-4, abs=1e-8)
    for seed in range(5):
        other = draw(shape[0], rank, seed=seed).double() @ draw(rank, shape[1], seed=seed + 50).double()
        assert left <= weighted(free - other) * (1 + 1e-6) + 1e-8
    torch.testing.assert_close(branch.up.norm(dim=0), branch.down.norm(dim=1))
    torch.testing.assert_close(branch.up.norm(dim=0).double(), sigma[:rank].sqrt(), rtol=1e-4, atol=1e-6)


@every_width
@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_at_full_rank_nothing_is_left(bits: int, shape: tuple[int, int]) -> None:
    weight = heavy(*shape, seed=5)
    for fisher in (None, importance(*shape, seed=5)):
        one = LQLoRA(bits=bits, group_size=8, rank=8, fisher=fisher is not None)
        assert one.decompose(informed(weight, fisher)).error < 1e-10 * weighted(weight, fisher)
    apply(state := state_of(weight, torch.float16), bits=bits, group_size=8, rank=8)
    torch.testing.assert_close(state.effective(), weight, rtol=0, atol=float(weight.abs().max()) * 2**-9)


@every_width
def test_at_rank_zero_it_is_plain_normal_float(bits: int) -> None:
    weight = heavy(8, 32, seed=6)
    one = LQLoRA(bits=bits, group_size=16, rank=0)
    assert (one.added_rank(), one.provides()) == (None, {Invariant.GRID})
    state = apply(state_of(weight), bits=bits, group_size=16, rank=0)
    grid = one.quantize(weight)
    assert torch.equal(state.weight, grid.dequantize(torch.float32))
    found = one.decompose(state_of(weight))
    assert found.error == pytest.approx(weighted(weight - values(grid)), rel=1e-5)
    assert found.rounds == 1


def test_a_branch_takes_more_the_larger_it_is() -> None:
    weight = heavy(32, 64, seed=7)
    errors = [LQLoRA(bits=3, rank=r).decompose(state_of(weight)).error for r in (0, 1, 2, 4, 8, 16, 32)]
    assert all(a > b for a, b in pairwise(errors))


# ---------------------------------------------------------------- the Fisher-weighted norm


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_fisher_information_of_rank_one_is_met_exactly(rank: int) -> None:
    """``Σ F (A − L₁L₂)² = Σ_{i>r} σ_i²`` of ``D_row A D_col``, the least there is."""
    A, f, g = heavy(12, 20, seed=8), draw(12, seed=8).exp(), draw(20, seed=9).mul(2).exp()
    fisher = torch.outer(f, g)
    left = weighted(A - low_rank(A, rank, Norm.of(fisher)).product(), fisher)
    sigma = torch.linalg.svdvals(f.double().sqrt().unsqueeze(1) * A.double() * g.double().sqrt())
    assert left == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-4)
    assert left < weighted(A - low_rank(A, rank, Norm()).product(), fisher)


@pytest.mark.parametrize("value", [1.0, 3e-9, 1e20])
def test_a_constant_fisher_information_is_the_plain_norm(value: float) -> None:
    weight = heavy(12, 32, seed=10)
    plain, constant = (
        LQLoRA(bits=3, group_size=16, rank=3, fisher=one).decompose(informed(weight, torch.full_like(weight, value)))
        for one in (False, True)
    )
    assert constant.error == pytest.approx(value * plain.error, rel=1e-5)
    assert torch.equal(constant.grid.codes, plain.grid.codes)
    assert constant.branch is not None
    assert plain.branch is not None
    torch.testing.assert_close(constant.branch.product(), plain.branch.product(), rtol=1e-4, atol=1e-5)


def test_weighing_pays_in_the_weighted_norm() -> None:
    for seed in range(3):
        weight, fisher = heavy(32, 64, seed=seed), importance(32, 64, seed=seed)
        plain = LQLoRA(bits=2, rank=8).decompose(state_of(weight))
        assert plain.branch is not None
        ours = LQLoRA(bits=2, rank=8, fisher=True).decompose(informed(weight, fisher))
        assert ours.error < weighted(weight - values(plain.grid) - plain.branch.product(), fisher)


def test_rows_and_columns_that_no_gradient_reached_do_no_harm() -> None:
    weight, fisher = heavy(12, 32, seed=11), importance(12, 32, seed=11)
    fisher[3], fisher[:, 5] = 0.0, 0.0
    for F in (fisher, torch.zeros_like(fisher), fisher * 1e-30):
        state = informed(weight, F, torch.float16)
        apply(state, bits=3, group_size=16, rank=4, fisher=True)
        assert torch.isfinite(state.effective()).all()
        assert (state.effective() - weight).abs().max() < 2 * weight.abs().max()


def test_without_the_fisher_information_it_says_so() -> None:
    one = LQLoRA(group_size=16, rank=2, fisher=True)
    assert one.needs_fisher()
    assert not LQLoRA().needs_fisher()
    with pytest.raises(RunError, match="no Fisher information") as failure:
        one.apply(state_of(heavy(8, 16, seed=0)), NOTHING)
    assert "fisher = false" in str(failure.value)


# ---------------------------------------------------------------- large matrices


def test_a_large_matrix_takes_a_subspace_iteration_that_is_as_good() -> None:
    side = EXACT + 32
    for matrix in (heavy(side, side + 8, seed=12), draw(side, side, seed=13)):
        branch = low_rank(matrix, 5, Norm())
        tail = float(torch.linalg.svdvals(matrix.double())[5:].square().sum())
        assert tail * (1 - 1e-5) <= weighted(matrix - branch.product()) <= tail * 1.002
        again = low_rank(matrix, 5, Norm())
        assert torch.equal(again.up, branch.up)
        assert torch.equal(again.down, branch.down)


# ---------------------------------------------------------------- under a mask, and as a state


@pytest.mark.parametrize("pattern", ["2:4", "1:4", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_fisher", [False, True])
def test_pruned_weights_stay_zero_and_the_branch_sees_what_is_left(
    pattern: str | None, dtype: torch.dtype, with_fisher: bool
) -> None:
    weight, fisher = heavy(16, 32, seed=14).to(dtype).float(), importance(16, 32, seed=14) if with_fisher else None
    state = informed(weight, fisher, dtype)
    Magnitude(pattern=pattern).apply(state, NOTHING) if pattern else Magnitude(sparsity=0.9).apply(state, NOTHING)
    assert state.mask is not None
    mask, target = state.mask.clone(), state.effective().clone()
    apply(state, bits=3, group_size=16, rank=6, fisher=with_fisher)
    assert state.grid is not None
    assert torch.equal(state.mask, mask)
    assert (state.weight[~mask].view(torch.int32) == 0).all()
    assert (state.grid.codes[~mask] == state.grid.spec.middle).all()
    none = informed(target, fisher, dtype)
    none.mask = mask
    apply(none, bits=3, group_size=16, rank=0, fisher=with_fisher)
    assert weighted(target - state.effective(), fisher) < weighted(target - none.effective(), fisher)


def test_at_full_rank_a_masked_layer_is_met_exactly_too() -> None:
    state = state_of(heavy(8, 32, seed=15))
    Magnitude(pattern="2:4").apply(state, NOTHING)
    target = state.effective().clone()
    apply(state, bits=2, group_size=16, rank=8)
    torch.testing.assert_close(state.effective(), target, rtol=0, atol=1e-5)


def test_the_dense_weight_can_be_the_target_so_that_the_branch_makes_up_for_what_was_pruned() -> None:
    state = state_of(heavy(16, 32, seed=19))
    Magnitude(pattern="2:4").apply(state, NOTHING)
    pruned, left = ~state.mask, {}  # type: ignore[operator]
    for target in ("current", "dense"):
        one = replace(state, mask=state.mask)
        apply(one, bits=4, group_size=16, rank=6, target=target)
        assert (one.weight[pruned] == 0).all()
        left[target] = weighted(one.dense - one.effective())
    assert left["dense"] < 0.9 * left["current"]
    exact = replace(state, mask=state.mask)
    apply(exact, bits=2, group_size=16, rank=16, target="dense")
    torch.testing.assert_close(exact.effective(), state.dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("second_dtype", ["float32", "bfloat16"])
def test_the_journal_keeps_the_codes_of_both_levels(masked: bool, second_dtype: Any) -> None:
    state = state_of(heavy(8, 32, seed=16).half().float(), torch.float16)
    if masked:
        Magnitude(pattern="2:4").apply(state, NOTHING)
    apply(state, bits=4, group_size=16, rank=3, scale_bits=4, scale_group=6, second_dtype=second_dtype)
    state.settle()
    again = state_of(state.dense, torch.float16)
    again.restore(state.tensors())
    assert torch.equal(again.effective(), state.effective())
    assert again.grid is not None
    assert state.grid is not None
    ours, theirs = again.grid.second, state.grid.second
    assert ours is not None
    assert theirs is not None
    assert (ours.bits, ours.group) == (theirs.bits, theirs.group) == (4, 6)
    for part in ("codes", "peaks", "offset"):
        assert getattr(ours, part).dtype == getattr(theirs, part).dtype
        assert torch.equal(getattr(ours, part), getattr(theirs, part))
    assert torch.equal(ours.scale(), again.grid.scale)
    assert again.grid.spec == state.grid.spec


def test_the_same_layer_gives_the_same_bits_and_its_own_result_is_a_fixed_point_of_the_grid() -> None:
    weight = heavy(16, 32, seed=17)
    first, second = (apply(state_of(weight), bits=3, group_size=16, rank=4, scale_bits=8) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.effective(), second.effective())
    # Where each group has its largest weight at the end of the table, what was rounded is rounded to itself.
    exact = LQLoRA(bits=3, group_size=32, scale_group=1, rank=0)
    once = exact.quantize(weight)
    again = exact.quantize(once.dequantize(torch.float32))
    assert torch.equal(again.codes, once.codes)


# ---------------------------------------------------------------- the integer program


def enumerated(errors: list[list[float]], costs: list[list[int]], limit: int) -> float:
    """The least sum of errors of all combinations within the limit."""
    picks = product(*(range(len(row)) for row in errors))
    within = (p for p in picks if sum(c[i] for c, i in zip(costs, p, strict=True)) <= limit)
    return min(sum(e[i] for e, i in zip(errors, p, strict=True)) for p in within)


def spent(rows: list[list[Any]], chosen: list[int]) -> Any:
    return sum(row[place] for row, place in zip(rows, chosen, strict=True))


def test_the_program_finds_what_enumeration_finds() -> None:
    random = np.random.default_rng(0)
    for trial in range(60):
        scale = 10 ** random.integers(0, 9)
        costs = random.integers(1, 50, (4, 4)) * scale + random.integers(0, 3, (4, 4))
        errors = 10 ** random.uniform(-4, 1, (4, 4)) if trial % 2 else random.integers(0, 6, (4, 4)).astype(float)
        least, most = int(costs.min(1).sum()), int(costs.max(1).sum())
        rows, bits = errors.tolist(), costs.tolist()
        for limit in (least, least + 1, (2 * least + most) // 3, (least + most) // 2, most, 2 * most):
            chosen = allocate(rows, bits, limit)
            assert spent(bits, chosen) <= limit
            best, floor = enumerated(rows, bits, limit), float(errors.min(1).sum())
            assert spent(rows, chosen) - floor <= (best - floor) * (1 + 1e-4) + 1e-8 * errors.max()


def test_a_larger_budget_is_never_worse_and_the_smallest_takes_the_cheapest() -> None:
    random = np.random.default_rng(1)
    costs = (random.permuted(np.tile(np.arange(4), (4, 1)), axis=1) * 7 + 3).tolist()
    errors = random.uniform(0, 1, (4, 4)).tolist()
    least = sum(map(min, costs))
    assert [row[i] for row, i in zip(costs, allocate(errors, costs, least), strict=True)] == list(map(min, costs))
    sums = [spent(errors, allocate(errors, costs, limit)) for limit in range(least, sum(map(max, costs)) + 2)]
    assert all(a >= b - 1e-4 for a, b in pairwise(sums))
    assert sums[-1] == pytest.approx(sum(map(min, errors)))


def test_matrices_may_have_different_numbers_of_choices() -> None:
    assert allocate([[5.0, 1.0, 0.0], [2.0], [4.0, 0.5]], [[1, 2, 9], [3], [1, 6]], 9) == [1, 0, 0]
    assert allocate([[5.0, 1.0, 0.0], [2.0], [4.0, 0.5]], [[1, 2, 9], [3], [1, 6]], 11) == [1, 0, 1]
    assert allocate([[0.0, 0.0]], [[5, 4]], 4) == [1]


def layers(*shapes: tuple[int, int], dtype: torch.dtype = torch.float16) -> Callable[[], Iterator[LinearState]]:
    """A model, read anew each time; its layers matter very differently."""

    def read() -> Iterator[LinearState]:
        for n, shape in enumerate(shapes):
            weight = heavy(*shape, seed=n) * 3.0 ** (n % 3)
            state = LinearState(f"layers.{n}", weight, weight.clone(), dtype)
            state.fisher = importance(*shape, seed=n) * 10.0 ** (-n)  # type: ignore[attr-defined]
            yield state

    return read


@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("budget", [3.2, 4.0, 5.5])
def test_a_survey_spends_the_budget_as_enumeration_would(with_fisher: bool, budget: float) -> None:
    model = layers((16, 32), (8, 64), (32, 16), (16, 16))
    one = LQLoRA(
        budget=budget,
        rank=0,
        fisher=with_fisher,
        choices_bits=(2, 8),
        choices_group=(16, 32),
        choices_scale_bits=(8,),
        scale_group=16,
    )
    assert one.surveys()
    found = one.survey(model)
    assert list(found) == [state.name for state in model()]
    errors, costs = [], []
    bits, total, error = 0, 0, 0.0
    for state in model():
        options = [
            LQLoRA(bits=b, group_size=g, rank=0, scale_group=16, fisher=with_fisher)
            for b, g in product((2, 8), (16, 32))
            if state.in_features % g == 0
        ]
        costs.append([o.storage_bits(state.out_features, state.in_features, torch.float16) for o in options])
        errors.append([o.decompose(state).error for o in options])
        chosen = one.with_settings(found[state.name])
        assert not chosen.surveys()
        assert chosen.grid() is not None
        bits += chosen.storage_bits(state.out_features, state.in_features, torch.float16)
        error += chosen.decompose(state).error
        total += state.weight.numel()
    assert bits <= budget * total
    assert error == pytest.approx(enumerated(errors, costs, int(Fraction(str(budget)) * total)), rel=1e-3)


def test_ranks_can_be_chosen_too_and_count() -> None:
    model = layers((16, 32), (32, 64), (32, 32))
    one = LQLoRA(budget=6, choices_rank=(0, 1, 2), choices_group=(16,), iterations=5)
    assert one.added_rank() == 2
    found = one.survey(model)
    assert {settings["rank"] for settings in found.values()} <= {0, 1, 2}
    bits = total = 0
    for state in model():
        chosen = one.with_settings(found[state.name])
        chosen.apply(state, NOTHING)
        assert (0 if state.low_rank is None else state.low_rank.rank) == chosen.rank
        bits += chosen.storage_bits(state.out_features, state.in_features, torch.float16)
        total += state.weight.numel()
    assert bits <= 6 * total


def test_a_budget_that_nothing_meets_names_the_smallest_that_is_met() -> None:
    model, settings = layers((16, 32), (32, 64)), {"rank": 1, "choices_group": (16, 32)}
    with pytest.raises(PlanError, match="no configuration meets budget = 2: the cheapest takes") as failure:
        LQLoRA(budget=2.0, **settings).survey(model)
    (smallest,) = re.findall(r"fix: budget = ([0-9.]+) or more", str(failure.value))
    found = LQLoRA(budget=float(smallest), **settings).survey(model)
    assert all(one["bits"] == 2 and one["group_size"] == 32 and one["scale_bits"] == 4 for one in found.values())
    with pytest.raises(PlanError):
        LQLoRA(budget=float(smallest) - 1e-4, **settings).survey(model)


# ---------------------------------------------------------------- settings


def problem(**settings: Any) -> str:
    with pytest.raises(ValidationError) as failure:
        LQLoRA(**settings)
    return str(failure.value)


def test_settings_that_mean_nothing_are_refused() -> None:
    assert "no code of 5 bits" in problem(bits=5)
    assert "no code of 6 bits" in problem(scale_bits=6)
    assert "no code of 7 bits" in problem(budget=3, choices_bits=(2, 7))
    assert "are no choices" in problem(budget=3, choices_group=(16, 16))
    assert "choices_bits has no meaning without budget" in problem(choices_bits=(2, 3))
    assert "bits is chosen under a budget" in problem(budget=3, bits=4)
    assert "rank is chosen under a budget" in problem(budget=3, rank=4, choices_rank=(1, 2))
    assert "a budget without choices" in problem(budget=3, choices_bits=())
    assert "cannot go with where" in problem(budget=3, where=({"match": "*q*", "rank": 3},))
    assert "cannot go with where" in problem(where=({"match": "*q*", "budget": 3},))
    for bad in ({"rank": -1}, {"iterations": 0}, {"group_size": 0}, {"scale_group": 0}, {"budget": 0}, {"fisher": 1}):
        problem(**bad)


def test_shapes_that_do_not_fit_are_refused_with_what_fits() -> None:
    with pytest.raises(ValueError, match="rank 9 is above 8, the smaller side of a 8 × 64 linear") as failure:
        LQLoRA(rank=9).check_shape(8, 64)
    assert "rank = 8 or less" in failure.value.fix  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="group_size 64 does not divide the input width 48") as failure:
        LQLoRA(rank=1).check_shape(64, 48)
    assert "choose among 16, 48" in failure.value.fix  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="16 or 32 or 64 does not divide the input width 24"):
        LQLoRA(rank=1, budget=3).check_shape(64, 24)
    LQLoRA(rank=1, budget=3).check_shape(64, 48)
    LQLoRA(rank=8).check_shape(8, 64)


def test_the_lock_shows_what_counts() -> None:
    assert set(LQLoRA().settings()) == {
        *(
            "bits",
            "group_size",
            "rank",
            "iterations",
            "scale_bits",
            "scale_group",
            "second_dtype",
            "fisher",
            "clip",
            "target",
            "budget",
        )
    }
    budgeted = LQLoRA(budget=3)
    assert not {"bits", "group_size", "scale_bits"} & set(budgeted.settings())
    assert budgeted.grid() is None
    assert Invariant.GRID in budgeted.provides()
    assert LQLoRA.use() == "lqlora"


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while these are alive; work space inside of one is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes():
                place = one.untyped_storage().data_ptr()
                self.holders[place] = self.holders.get(place, 0) + 1
                self.sizes[place] = one.untyped_storage().nbytes()
                weakref.finalize(one, self.drop, place)
        self.most = max(self.most, sum(self.sizes.values()))
        return made

    def drop(self, place: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place], self.sizes[place]


@pytest.mark.parametrize("settings", [{}, {"clip": "mse"}, {"clip": "mse", "fisher": True}, {"rank": 80}])
def test_what_it_holds_while_it_solves_is_counted(settings: dict[str, Any]) -> None:
    """Beside the 24 bytes for each weight that every pass may hold, and the two weights that are there before."""
    shape = (256, 768)
    one = LQLoRA(**{"rank": 8, "iterations": 3} | settings)
    state = informed(heavy(*shape, seed=1), importance(*shape, seed=2) if one.fisher else None)
    with Alive() as alive:
        one.apply(state, NOTHING)
    weights = 256 * 768
    assert 24 * weights < alive.most + 4 * weights * one.fisher <= 24 * weights + one.solving_bytes(*shape)


# ---------------------------------------------------------------- whole runs


def planned(*passes: Any, output: str = "out", form: str = "huggingface") -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path="model"),
        calibration=compress.Calibration(source="text.txt", samples=4, length=16),
        run=compress.Run(output=output),
        exports=[compress.Export(format=form)],
        passes=list(passes),
    )


def run(*passes: Any, output: str = "out", form: str = "huggingface") -> compress.Report:
    return compress.run(planned(*passes, output=output, form=form))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{"bits": 3, "group_size": 16}, {"budget": 9, "choices_group": (16,)}])
def test_a_run_writes_grid_and_branch(folder: Path, masked: bool, settings: dict[str, Any]) -> None:
    before = [Wanda(pattern="2:4")] if masked else []
    one = LQLoRA(rank=2, **settings)
    report = run(*before, one)
    _, base = open_model(folder / "model")
    _, emitted = open_model(folder / "out")
    bits = total = 0
    for line in report.linears:
        if line.use != "lqlora":
            continue
        found = re.match(r"nf(\d), group (\d+), scales of (\d) bits, rank 2, (\d+) rounds$", line.detail or "")
        assert found is not None
        assert line.bits == int(found[1])
        chosen = LQLoRA(bits=int(found[1]), group_size=int(found[2]), scale_bits=int(found[3]), rank=2)
        bits += chosen.storage_bits(line.out_features, line.in_features, torch.float32)
        total += line.out_features * line.in_features
        assert line.sparsity == (0.5 if masked else 0.0)
        assert 0 < line.error_after < 1
        W, written = (one.read(f"{line.linear}.weight").float() for one in (base, emitted))
        assert W.shape == written.shape
    assert total > 0
    assert bits <= settings.get("budget", 100) * total
    if "budget" in settings:
        assert bits > 0.9 * settings["budget"] * total
    run(*before, one, output="again")
    ours, theirs = (
        {path.relative_to(folder / name): path.read_bytes() for path in (folder / name).rglob("*.safetensors")}
        for name in ("out", "again")
    )
    assert len(ours) >= 2
    assert ours == theirs


def test_what_was_written_is_what_the_pass_makes(folder: Path) -> None:
    run(LQLoRA(rank=2, bits=3, group_size=16))
    _, base = open_model(folder / "model")
    _, emitted = open_model(folder / "out")
    name = "model.layers.1.mlp.down_proj"
    state = state_of(base.read(f"{name}.weight").float())
    LQLoRA(rank=2, bits=3, group_size=16).apply(state, NOTHING)
    torch.testing.assert_close(emitted.read(f"{name}.weight").float(), state.effective(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("one", [LQLoRA(rank=1, group_size=16), LQLoRA(rank=1, budget=8, choices_group=(16,))])
def test_formats_of_integer_codes_refuse_it(folder: Path, form: str, one: LQLoRA) -> None:
    with pytest.raises(PlanError, match=f"{form} cannot hold it: .*lqlora") as failure:
        run(one, form=form)
    assert "huggingface" in str(failure.value)
    assert not (folder / "out").exists()


def test_nothing_may_quantize_before_it_or_move_weights_after_it(folder: Path) -> None:
    with pytest.raises(PlanError, match="lqlora would break the grid"):
        run(RTN(group_size=16), LQLoRA(rank=1, group_size=16))
    with pytest.raises(PlanError, match="rtn would break the grid"):
        run(LQLoRA(rank=1, group_size=16), RTN(group_size=16))


def test_a_budget_that_nothing_meets_is_refused_by_the_lock(folder: Path) -> None:
    impossible = LQLoRA(rank=1, budget=1, choices_group=(16,))
    with pytest.raises(PlanError, match=r"pass\[0\]\.budget: no configuration meets budget = 1") as failure:
        compile_plan(planned(impossible))
    (smallest,) = re.findall(r"budget = ([0-9.]+) or more", str(failure.value))
    compile_plan(planned(LQLoRA(rank=1, budget=float(smallest), choices_group=(16,))))
    with pytest.raises(PlanError, match="no configuration meets budget"):
        compile_plan(planned(LQLoRA(rank=1, budget=float(smallest) - 1e-4, choices_group=(16,))))
    with pytest.raises(PlanError, match="no configuration meets budget"):
        run(impossible)
    assert not (folder / "out").exists()
    assert not (folder / ".out.compress").exists()


def test_a_branch_can_be_read_back_and_is_of_the_checkpoint(folder: Path) -> None:
    from safetensors.torch import load_file

    run(LQLoRA(rank=2, bits=4, group_size=16))
    found = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    branch = LowRank(found[f"{name}.lora_B.weight"].float(), found[f"{name}.lora_A.weight"].float())
    _, base = open_model(folder / "model")
    state = state_of(base.read("model.layers.0.self_attn.q_proj.weight").float())
    LQLoRA(rank=2, bits=4, group_size=16).apply(state, NOTHING)
    assert state.low_rank is not None
    torch.testing.assert_close(branch.product(), state.low_rank.product(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the pass manager's Fisher information


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_weighs_errors_by_the_fisher_information_of_the_dense_model(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pass gets is what `diagonal_fisher` says of transformers' model on the plan's tokens, as (out, in)."""
    tiny_directory(tmp_path / "model", family)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    original = LQLoRA.apply

    def watched(self: LQLoRA, linear: LinearState, moments: Any) -> Any:
        assert linear.fisher is not None
        seen[linear.name] = (linear.fisher.clone(), linear.dense.clone())
        return original(self, linear, moments)

    monkeypatch.setattr(LQLoRA, "apply", watched)
    plan = compress.Plan(
        model=compress.Model(path=str(tmp_path / "model")),
        calibration=compress.Calibration(source=str(tmp_path / "text.txt"), samples=4, length=16, selection="first"),
        run=compress.Run(output=str(tmp_path / "out")),
        passes=[LQLoRA(group_size=16, rank=2, fisher=True)],
    )
    compress.run(plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    lock = compile_plan(plan)
    tokens = make_tokens(lock, torch.device("cpu"))
    wanted = diagonal_fisher(model, tokens.ids, tokens.mask, [f"{linear.name}.weight" for linear in lock.linears])
    for linear in lock.linears:
        fisher, dense = seen[linear.name]
        found = wanted[f"{linear.name}.weight"]
        found = found.T if linear.transposed else found
        assert fisher.shape == dense.shape
        assert torch.allclose(fisher, found, rtol=1e-4, atol=1e-6 * float(found.max())), linear.name
        assert float(fisher.max()) > 0


AFTER_A_BUDGET = [
    (PERP(train=("low_rank",), steps=2, rank=2, extend=True), 2),
    (PERP(train=("norms",), steps=2), 2),
    (PERP(mode="reconstruct", train=("low_rank",), steps=2), 2),
    (EoRA(rank=2), 0),
    (Wanda(pattern="2:4"), 0),
]


@pytest.mark.parametrize(("then", "rank"), AFTER_A_BUDGET)
def test_what_follows_a_budget_keeps_the_grids_that_it_chose(folder: Path, then: Any, rank: int) -> None:
    """The plan does not know these grids: the codes that are written tell, read by nobody of ours."""
    from safetensors.torch import load_file

    one = LQLoRA(rank=rank, budget=7, choices_group=(8, 16), iterations=2)
    run(one, form="packed")
    run(one, then, output="more", form="packed")
    alone, more = (load_file(folder / name / "model.safetensors") for name in ("out", "more"))
    pruned = isinstance(then, Wanda)  # of codes, only those of kept columns are stored then
    suffixes = ("scale_codes", "scale_peaks", "scale_offset", *(() if pruned else (".codes",)))
    grids = [key for key in alone if key.endswith(suffixes)]
    assert len(grids) >= 3 * 14
    for key in grids:
        assert torch.equal(alone[key], more[key]), key


def test_a_pass_that_drops_a_grid_of_a_budget_is_caught() -> None:
    state, budgeted = state_of(heavy(8, 16, seed=1)), LQLoRA(rank=0, budget=5, choices_group=(16,))
    linear = SimpleNamespace(name="x", out_features=8, in_features=16, passes=((0, budgeted), (1, EoRA(rank=1))))
    with pytest.raises(RunError, match="there is no grid"):
        check_invariants(linear, 1, state, None)  # type: ignore[arg-type]
    LQLoRA(rank=0, group_size=16).apply(state, NOTHING)
    check_invariants(linear, 1, state, None)  # type: ignore[arg-type]
    state.weight = state.weight + 1
    with pytest.raises(RunError, match="not the value of its codes"):
        check_invariants(linear, 1, state, None)  # type: ignore[arg-type]
