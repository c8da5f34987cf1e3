"""PEQA: the identities of METHODS section 5, in float64 where they are exact, and what a run makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from compress.calibration.moments import Moments, Statistics
from compress.passes import GPTQ, RTN, LinearState
from compress.passes.grid_search import rescaled
from tests.passes import correlated, draw, moments_of, row_errors, state_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress.state import Grid

ROWS, COLUMNS = 9, 48
SETTINGS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": -1},
    {"bits": 3, "group_size": 16},
    {"bits": 2, "group_size": 6, "symmetric": False},
    {"bits": 3, "group_size": 12, "scale_dtype": "float16"},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))


def quantized(
    weight: Tensor, *, mask: Tensor | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> LinearState:
    """A layer put on a grid by rounding."""
    state = state_of(weight, dtype)
    if mask is not None:
        state.prune(~mask)
    RTN(**settings).apply(state, Moments(weight.shape[1], Statistics.NONE))
    return state


def steps_of(grid: Grid) -> Tensor:
    """C = codes − zero-points (out, in), float64."""
    return grid.codes.double() - grid.spread(grid.zero).double()


def oracle(weight: Tensor, grid: Grid, H: Tensor) -> Tensor:
    """The scales (out, groups) that minimize ``(w − Σ s_g c_g) H (…)ᵀ``, by `lstsq` on a root of H, row by row."""
    values, vectors = torch.linalg.eigh(H.double())
    root = vectors * values.clamp_min(0).sqrt()  # (in, in), H = root rootᵀ
    found = []
    for w, c in zip(weight.double(), steps_of(grid), strict=True):
        groups = torch.block_diag(*c.view(grid.scale.shape[1], 1, -1))  # (groups, in): a group's steps in each row
        found.append(torch.linalg.lstsq((groups @ root).T, (w @ root).unsqueeze(1), driver="gelsd").solution.flatten())
    return torch.stack(found)


# ------------------------------------------------------------ the closed form


@each_setting
def test_rescaled_is_least_squares(settings: dict[str, Any]) -> None:
    weight, inputs = draw(ROWS, COLUMNS, seed=1), correlated(300, COLUMNS, seed=1)
    H = inputs.double().T @ inputs.double()
    state = quantized(weight, **settings)
    assert state.grid is not None
    found = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    wanted, before = oracle(weight, state.grid, H), state.grid.scale.double()
    free = (wanted > 0.1 * before).all(1)
    assert free.sum() > ROWS // 2
    assert torch.allclose(found.scale[free].double(), wanted[free], rtol=2e-3, atol=0)
    # Elsewhere the way is the same, and as far as the first scale lets it.
    way, whole = found.scale[~free].double() - before[~free], wanted[~free] - before[~free]
    part = (0.9 * before[~free] / -whole).masked_fill(whole >= 0, 1).amin(1, keepdim=True)
    assert torch.allclose(way, part * whole, rtol=2e-3, atol=2e-3 * float(before.max()))
    assert torch.equal(found.codes, state.grid.codes)
    assert torch.equal(found.zero, state.grid.zero)
    assert found.scale.dtype == state.grid.scale.dtype


def test_one_group_per_row_is_a_quotient() -> None:
    """``s = (w H cᵀ) / (c H cᵀ)``."""
    weight, inputs = draw(ROWS, COLUMNS, seed=2), correlated(300, COLUMNS, seed=2)
    state = quantized(weight, bits=3, group_size=-1)
    assert state.grid is not None
    C, H = steps_of(state.grid), inputs.double().T @ inputs.double()
    wanted = (weight.double() @ H * C).sum(1) / (C @ H * C).sum(1)
    found = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    assert torch.allclose(found.scale.flatten().double(), wanted, rtol=2e-6)


@each_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [300, 20])
def test_no_row_gets_worse(settings: dict[str, Any], dtype: torch.dtype, tokens: int) -> None:
    """As stored, rounded; with fewer tokens than columns, too, where H is singular. Most rows get better."""
    better = 0
    for seed in range(3):
        weight, inputs = draw(ROWS, COLUMNS, seed=seed).to(dtype).float(), correlated(tokens, COLUMNS, seed=seed)
        H = inputs.double().T @ inputs.double()
        state = quantized(weight, dtype=dtype, **settings)
        assert state.grid is not None
        before = row_errors(weight - state.weight, H)
        found = rescaled(weight, state.grid, moments_of(inputs).gram(), dtype)
        after = row_errors(weight - found.dequantize(dtype), H)
        assert (after <= before * (1 + 1e-5)).all()
        better += int((after < before).sum())
    assert better > 2 * ROWS


def test_a_group_of_zeros_and_dead_inputs_keep_their_scales() -> None:
    weight, inputs = draw(ROWS, COLUMNS, seed=3), correlated(300, COLUMNS, seed=3)
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    mask[:, 12:24] = False  # no step is left there
    inputs[:, 24:36] = 0.0
    state = quantized(weight, mask=mask, bits=3, group_size=12)
    assert state.grid is not None
    found = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    assert torch.equal(found.scale[:, 1:3], state.grid.scale[:, 1:3])
    assert (found.scale[:, [0, 3]] != state.grid.scale[:, [0, 3]]).all()


def test_groups_that_the_inputs_do_not_tell_apart() -> None:
    """Two groups with the same steps and the same inputs: only the sum of their scales counts, and both stay near."""
    half, x = draw(ROWS, 8, seed=4), correlated(100, 8, seed=4)
    weight, inputs = torch.cat([half, half], 1), torch.cat([x, x], 1)
    state = quantized(weight, bits=3, group_size=8)
    assert state.grid is not None
    H = inputs.double().T @ inputs.double()
    found = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    assert torch.allclose(found.scale[:, 0], found.scale[:, 1], rtol=1e-4)
    best = row_errors(weight - oracle(weight, state.grid, H).repeat_interleave(8, 1) * steps_of(state.grid), H)
    assert torch.allclose(row_errors(weight - found.dequantize(torch.float32), H), best, rtol=1e-4)


def test_a_scale_that_would_turn_negative_stops_its_row() -> None:
    """Codes of the opposite sign: the best scale is negative. The error falls on the way there."""
    weight, inputs = draw(2, COLUMNS, seed=5), correlated(300, COLUMNS, seed=5)
    state = quantized(weight, bits=3, group_size=-1)
    grid = state.grid
    assert grid is not None
    codes = grid.codes.clone()
    codes[0] = 8 - codes[0].clamp_min(1)
    found = rescaled(weight, replace(grid, codes=codes), moments_of(inputs).gram(), torch.float32)
    assert torch.allclose(found.scale[0], 0.1 * grid.scale[0])
    right = rescaled(weight, grid, moments_of(inputs).gram(), torch.float32)
    assert torch.equal(found.scale[1], right.scale[1])


def test_systems_in_slices_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = draw(ROWS, COLUMNS, seed=6), correlated(300, COLUMNS, seed=6)
    state = quantized(weight, bits=3, group_size=12)
    assert state.grid is not None
    whole = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    monkeypatch.setattr("compress.passes.grid_search.SYSTEMS", 2 * 4 * 4)  # two rows of four groups
    parts = rescaled(weight, state.grid, moments_of(inputs).gram(), torch.float32)
    assert torch.equal(parts.scale, whole.scale)


@pytest.mark.parametrize("one", [GPTQ, RTN])
@pytest.mark.parametrize("masked", [False, True])
def test_quantizers_rescale(one: type[GPTQ] | type[RTN], masked: bool) -> None:
    """Towards the dense weight, whatever was pruned; codes, zero-points and mask are those without it."""
    weight, inputs = draw(ROWS, COLUMNS, seed=7), correlated(300, COLUMNS, seed=7)
    mask = draw(ROWS, COLUMNS, seed=57) > -0.25
    states = []
    for rescale in (False, True):
        state = state_of(weight)
        if masked:
            state.prune(~mask)
        quantizer = one(bits=3, group_size=12, symmetric=False, rescale=rescale)
        assert quantizer.needed() == (Statistics.GRAM if rescale or one is GPTQ else Statistics.NONE)
        quantizer.apply(state, moments_of(inputs))
        states.append(state)
    (plain, better), H = states, inputs.double().T @ inputs.double()
    assert plain.grid is not None
    assert better.grid is not None
    assert torch.equal(plain.grid.codes, better.grid.codes)
    assert torch.equal(plain.grid.zero, better.grid.zero)
    wanted = oracle(weight, plain.grid, H)
    free = (wanted > 0.1 * plain.grid.scale).all(1)
    assert free.any()
    assert torch.allclose(better.grid.scale[free].double(), wanted[free], rtol=2e-3)
    assert row_errors(weight - better.weight, H).sum() < row_errors(weight - plain.weight, H).sum()
    if masked:
        assert torch.equal(better.mask, mask)
        assert (better.weight[~mask].view(torch.int32) == 0).all()
