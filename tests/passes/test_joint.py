"""SparseGPT with bits: pruned and quantized in one loop, against a textbook loop in float64 (METHODS section 2)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import ValidationError

from compress.invariants import check_invariants
from compress.passes import GPTQ, RTN, Invariant, LinearState, Moments, Note, SparseGPT
from compress.passes.base import SettingError
from tests.passes import (
    NOTHING,
    ExactMoments,
    correlated,
    damped,
    draw,
    floor_of,
    group_zeros,
    moments_of,
    papers_factor,
    row_errors,
    state_of,
)
from tests.passes.test_gptq import spread, textbook

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS = 12, 48
GRIDS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": -1, "symmetric": True, "clip": "minmax"},
    {"bits": 4, "group_size": 16, "symmetric": True, "clip": "mse"},
    {"bits": 3, "group_size": 16, "symmetric": False, "clip": "mse"},
    {"bits": 2, "group_size": 24, "symmetric": False, "clip": "minmax"},
    {"bits": 8, "group_size": 8, "symmetric": True, "clip": "mse"},
]
MASKS: list[dict[str, Any]] = [
    {"pattern": "2:4"},
    {"pattern": "1:4"},
    {"pattern": "4:8"},
    {"sparsity": 0.5},
    {"sparsity": 0.29, "mask_block": 12},  # groups of the mask and of the grid lie across each other
    {"sparsity": 0.6, "mask_block": 7},
]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda one: "-".join(map(str, one.values())))
each_mask = pytest.mark.parametrize("mask", MASKS, ids=lambda one: "-".join(map(str, one.values())))


def joint(
    weight: Tensor,
    moments: Moments,
    *,
    before: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[LinearState, Note]:
    """Apply the pass, and check what holds of all its results."""
    state = state_of(weight, dtype)
    if before is not None:
        state.prune(~before)
    one, mask = SparseGPT(**settings), state.mask
    note = one.apply(state, moments)
    linear = SimpleNamespace(
        name=state.name, out_features=weight.shape[0], in_features=weight.shape[1], passes=((0, one),)
    )
    check_invariants(linear, 0, state, mask)  # type: ignore[arg-type]
    assert state.mask is not None
    assert (state.weight[~state.mask].view(torch.int32) == 0).all()  # +0 exactly
    assert torch.equal(state.dense, weight)
    return state, note


def problem(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    return draw(rows, columns, seed=seed), correlated(5 * columns, columns, seed=seed)


def errors_of(state: LinearState, weight: Tensor, inputs: Tensor) -> float:
    return float(row_errors(weight.double() - state.weight, damped(inputs, 0.0)).sum())


@each_grid
@each_mask
def test_counts_are_exact_and_codes_on_the_grid(grid: dict[str, Any], mask: dict[str, Any]) -> None:
    weight, inputs = problem(1)
    state, _ = joint(weight, moments_of(inputs), **grid, **mask)
    assert state.mask is not None
    assert state.grid is not None
    if "pattern" in mask:
        kept, group = map(int, mask["pattern"].split(":"))
        assert (group_zeros(state, group) == group - kept).all()
    else:
        assert int((~state.mask).sum()) == floor_of(mask["sparsity"], weight.numel())
    assert int(state.grid.codes.max()) <= 2 ** grid["bits"] - 1
    scale, zero = spread(state)
    assert torch.equal(state.grid.codes[~state.mask].double(), zero[~state.mask])
    torch.testing.assert_close(state.weight.double(), scale * (state.grid.codes - zero), rtol=1e-6, atol=0)


@each_grid
@each_mask
def test_the_reported_loss_is_the_damped_error(grid: dict[str, Any], mask: dict[str, Any]) -> None:
    weight, inputs = problem(2)
    H = damped(inputs, 0.01)
    state, note = joint(weight, moments_of(inputs), **grid, **mask)
    assert note["damped_loss"] == pytest.approx(float(row_errors(weight.double() - state.weight, H).sum()), rel=1e-3)
    state, note = joint(weight.double(), ExactMoments(inputs), **grid, **mask)
    assert note["damped_loss"] == pytest.approx(float(row_errors(weight.double() - state.weight, H).sum()), rel=1e-9)
    # What a column was when its turn came follows from W − Q = E U; its code is the nearest to that.
    U = papers_factor(H)
    E = (weight.double() - state.weight.double()) @ torch.linalg.inv(U)
    current = state.weight.double() + E * U.diagonal()
    scale, zero = spread(state)
    nearest = scale * ((current / scale).round() + zero).clamp(0, 2 ** grid["bits"] - 1).sub(zero)
    assert state.mask is not None
    torch.testing.assert_close(state.weight.double(), torch.where(state.mask, nearest, 0.0), rtol=1e-6, atol=1e-6)


@each_grid
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_a_pattern_on_a_grid_is_the_textbook_loop(grid: dict[str, Any], pattern: str) -> None:
    kept, group = map(int, pattern.split(":"))
    for seed in range(2):
        weight, inputs = draw(6, 24, seed=seed), correlated(100, 24, seed=seed)
        settings = grid | {"group_size": 8 if grid["group_size"] == 16 else grid["group_size"]}
        state, _ = joint(weight.double(), ExactMoments(inputs), pattern=pattern, **settings)
        codes, slow = textbook(weight, damped(inputs, 0.01), pattern=(kept, group), **settings)
        assert state.grid is not None
        assert torch.equal(state.grid.codes.long(), codes)
        torch.testing.assert_close(state.weight.double(), slow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS[1:3], ids=["4-16", "3-16"])
@each_mask
def test_the_block_size_has_no_influence(grid: dict[str, Any], mask: dict[str, Any]) -> None:
    weight, inputs = problem(3, 6)
    first, note = joint(weight.double(), ExactMoments(inputs), block_size=48, **grid, **mask)
    assert first.grid is not None
    for block_size in (1, 7, 16, 128):
        other, other_note = joint(weight.double(), ExactMoments(inputs), block_size=block_size, **grid, **mask)
        assert other.grid is not None
        assert torch.equal(other.mask, first.mask)
        assert torch.equal(other.grid.codes, first.grid.codes)
        torch.testing.assert_close(other.grid.scale, first.grid.scale, rtol=1e-6, atol=0)
        assert other_note["damped_loss"] == pytest.approx(note["damped_loss"], rel=1e-6)


@pytest.mark.parametrize("mask", [{"pattern": "2:4"}, {"sparsity": 0.5}], ids=["2:4", "0.5"])
def test_with_many_bits_it_is_nearly_sparsegpt(mask: dict[str, Any]) -> None:
    """Nearly: the range of a group is that of its weights when it begins, and what is pruned after moves some out."""
    weight, inputs = problem(4, 64, 128)
    plain = state_of(weight)
    SparseGPT(**mask).apply(plain, moments_of(inputs))
    errors = []
    for bits in (2, 3, 4, 8):
        state, _ = joint(weight, moments_of(inputs), bits=bits, group_size=32, **mask)
        errors.append(errors_of(state, weight, inputs))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(errors_of(plain, weight, inputs), rel=0.05)
    assert errors[1] > 1.2 * errors[-1]


@pytest.mark.parametrize("mask", [{"pattern": "2:4"}, {"sparsity": 0.5}], ids=["2:4", "0.5"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_correlated_layer_has_less_error_than_sparsegpt_rounded_to_nearest(mask: dict[str, Any], bits: int) -> None:
    grid: dict[str, Any] = {"bits": bits, "group_size": 32}
    for seed in range(3):
        weight, inputs = problem(seed + 20, 64, 128)
        moments = moments_of(inputs)
        ours, _ = joint(weight, moments, **grid, **mask)
        plain = state_of(weight)
        SparseGPT(**mask).apply(plain, moments)
        RTN(**grid).apply(plain, NOTHING)
        assert errors_of(ours, weight, inputs) < 0.97 * errors_of(plain, weight, inputs)


@each_grid
def test_what_an_earlier_pass_pruned_stays_pruned_and_counts(grid: dict[str, Any]) -> None:
    weight, inputs = problem(5)
    before = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    before[:, ::4] = False
    for mask in ({"pattern": "2:4"}, {"sparsity": 0.5}):
        state, _ = joint(weight, moments_of(inputs), before=before, **grid, **mask)
        assert state.mask is not None
        assert not (state.mask & ~before).any()
        assert int((~state.mask).sum()) == weight.numel() // 2
        if "pattern" in mask:
            assert (group_zeros(state, 4) == 2).all()


@pytest.mark.parametrize("grid", GRIDS[:2], ids=["4--1", "4-16"])
def test_sparsity_zero_is_gptq(grid: dict[str, Any]) -> None:
    weight, inputs = problem(6)
    ours, note = joint(weight, moments_of(inputs), sparsity=0, **grid)
    theirs = state_of(weight)
    expected = GPTQ(**grid).apply(theirs, moments_of(inputs))
    assert theirs.grid is not None
    assert ours.grid is not None
    assert torch.equal(ours.grid.codes, theirs.grid.codes)
    assert torch.equal(ours.weight, theirs.weight)
    assert note["damped_loss"] == expected["damped_loss"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_values_of_the_checkpoints_dtype(dtype: torch.dtype) -> None:
    weight, inputs = problem(7)
    weight = weight.to(dtype).float()
    state, note = joint(weight, moments_of(inputs), dtype=dtype, bits=4, group_size=16, pattern="2:4")
    assert state.grid is not None
    assert state.grid.scale.dtype == dtype
    assert torch.equal(state.weight, state.weight.to(dtype).float())
    wanted = float(row_errors(weight.double() - state.weight, damped(inputs, 0.01)).sum())
    assert note["damped_loss"] == pytest.approx(wanted, rel=1e-3)


def test_a_group_that_is_pruned_whole_has_the_scale_one() -> None:
    weight, inputs = problem(8)
    before = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    before[:, :16] = False
    state, _ = joint(weight, moments_of(inputs), before=before, bits=4, group_size=16, sparsity=0.5)
    assert state.grid is not None
    assert (state.grid.scale[:, 0] == 1).all()
    assert (state.grid.codes[:, :16] == 8).all()


# ---------------------------------------------------------------- settings


def test_it_promises_a_grid_when_it_makes_one() -> None:
    assert SparseGPT(pattern="2:4").provides() == {Invariant.MASK, Invariant.PATTERN}
    assert SparseGPT(pattern="2:4", bits=4).provides() == {Invariant.MASK, Invariant.PATTERN, Invariant.GRID}
    assert SparseGPT(sparsity=0.5).grid() is None
    assert SparseGPT(sparsity=0.5, bits=3, group_size=16).grid()[:3] == (3, 16, True)  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 4, "least_squares": True}, "least_squares moves weights off the grid"),
        ({"group_size": 32}, "group_size has no meaning without bits"),
        ({"symmetric": False}, "symmetric has no meaning without bits"),
        ({"clip": "mse"}, "clip has no meaning without bits"),
        ({"scale_dtype": "float16"}, "scale_dtype has no meaning without bits"),
        ({"bits": 5}, "no grid has 5 bits"),
        ({"bits": 4, "group_size": 0}, "group_size is 0"),
    ],
)
def test_settings_that_have_no_meaning_together(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SparseGPT(sparsity=0.5, **settings)


def test_a_group_must_divide_the_width() -> None:
    with pytest.raises(SettingError, match="group_size 32 does not divide the input width 48"):
        SparseGPT(sparsity=0.5, bits=4, group_size=32).check_shape(8, 48)
    SparseGPT(sparsity=0.5, bits=4, group_size=16).check_shape(8, 48)
    with pytest.raises(SettingError, match="pattern 2:5"):
        SparseGPT(pattern="2:5", bits=4, group_size=16).check_shape(8, 48)
