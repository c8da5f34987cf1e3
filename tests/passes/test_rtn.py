"""Round to nearest against a search over all codes, and what it must leave alone."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from compress.invariants import check_invariants
from compress.passes import RTN, LinearState
from compress.passes.grid_search import fit
from tests.passes import NOTHING, correlated, draw, moments_of, state_of

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS = 9, 48
SETTINGS: list[dict[str, Any]] = [
    {"bits": bits, "group_size": group, "symmetric": symmetric, "clip": clip}
    for bits, group, symmetric, clip in product((2, 3, 4, 8), (-1, 16), (True, False), ("minmax", "mse"))
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))


def rtn(weight: Tensor, dtype: torch.dtype = torch.float32, mask: Tensor | None = None, **settings: Any) -> LinearState:
    state = state_of(weight, dtype)
    if mask is not None:
        state.prune(~mask)
    one = RTN(**settings)
    before = state.mask
    assert one.apply(state, NOTHING) == {}
    linear = SimpleNamespace(name=state.name, out_features=ROWS, in_features=COLUMNS, passes=((0, one),))
    check_invariants(linear, 0, state, before)  # type: ignore[arg-type]
    assert torch.equal(state.dense, weight)
    return state


def values(state: LinearState) -> tuple[Tensor, Tensor, Tensor]:
    """Every value (out, in, codes) that each weight could take, in float64, and its scale and zero-point (out, in)."""
    assert state.grid is not None
    groups = state.grid.scale.shape[1]
    scale = state.grid.scale.double().repeat_interleave(COLUMNS // groups, 1)
    zero = state.grid.zero.double().repeat_interleave(COLUMNS // groups, 1)
    codes = torch.arange(2**state.grid.spec.bits, dtype=torch.float64)
    return scale.unsqueeze(-1) * (codes - zero.unsqueeze(-1)), scale, zero


@each_setting
@pytest.mark.parametrize("masked", [False, True])
def test_every_weight_becomes_the_nearest_value_of_its_grid(settings: dict[str, Any], masked: bool) -> None:
    weight = draw(ROWS, COLUMNS, seed=1)
    mask = draw(ROWS, COLUMNS, seed=2) > 0 if masked else None
    state = rtn(weight, mask=mask, **settings)
    target = weight if mask is None else torch.where(mask, weight, 0.0)
    every, scale, zero = values(state)
    distance = (target.double() - state.weight.double()).abs()
    nearest = (target.double().unsqueeze(-1) - every).abs().amin(2)
    assert (distance <= nearest + 2e-5 * scale).all()
    if mask is not None:
        assert (state.weight[~mask].view(torch.int32) == 0).all()
        assert torch.equal(state.mask, mask)
    # Half a step where nothing clips.
    place = target.double() / scale + zero
    inside = (place >= -0.5) & (place <= 2 ** settings["bits"] - 0.5)
    assert (distance[inside] <= scale[inside] * 0.50002).all()
    assert inside.double().mean() > 0.5
    if settings["clip"] == "minmax":
        assert (distance <= scale * 0.50002).all()


@each_setting
def test_each_group_has_the_range_of_its_own_weights(settings: dict[str, Any]) -> None:
    weight, mask = draw(ROWS, COLUMNS, seed=3), draw(ROWS, COLUMNS, seed=4) > 0
    weight[~mask] *= 100  # what is pruned has no part in it
    state = rtn(weight, mask=mask, **settings)
    assert state.grid is not None
    width = COLUMNS if settings["group_size"] == -1 else settings["group_size"]
    assert state.grid.scale.shape == (ROWS, COLUMNS // width)
    for number, part in enumerate(torch.where(mask, weight, 0.0).split(width, dim=1)):
        scale, zero = fit(part, state.grid.spec, torch.float32, clip=settings["clip"])
        assert torch.equal(state.grid.scale[:, number], scale)
        assert torch.equal(state.grid.zero[:, number].float(), zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 16])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_on_a_grid_that_they_fill_stay_as_they_are(
    bits: int, group: int, clip: str, dtype: torch.dtype
) -> None:
    """Asymmetric: a range of all codes gives the same scale again; a symmetric one ends half a step off its codes."""
    largest, width = 2**bits - 1, COLUMNS if group == -1 else group
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, largest + 1, (ROWS, COLUMNS // width, width), generator=generator)
    codes[..., 0], codes[..., 1] = 0, largest
    zero = torch.randint(0, largest + 1, (ROWS, COLUMNS // width, 1), generator=generator)
    scale = torch.randint(-6, 3, (ROWS, COLUMNS // width, 1), generator=generator).double().exp2()
    weight = (scale * (codes - zero)).flatten(1).float()
    state = rtn(weight, dtype, bits=bits, group_size=group, symmetric=False, clip=clip)
    assert state.grid is not None
    assert torch.equal(state.weight, weight)
    assert torch.equal(state.grid.codes.long(), codes.flatten(1))
    assert torch.equal(state.grid.scale.double(), scale.squeeze(-1))
    assert torch.equal(state.grid.zero.long(), zero.squeeze(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_those_of_the_checkpoints_dtype(dtype: torch.dtype, symmetric: bool) -> None:
    weight = draw(ROWS, COLUMNS, seed=5).to(dtype).float()
    state = rtn(weight, dtype, bits=4, group_size=16, symmetric=symmetric)
    assert state.grid is not None
    assert state.grid.scale.dtype == dtype
    assert torch.equal(state.weight, state.weight.to(dtype).float())
    before = state.weight.clone()
    state.settle()
    assert torch.equal(state.weight, before)


def test_the_dtype_of_the_scales_is_the_plans() -> None:
    state = rtn(draw(ROWS, COLUMNS, seed=6), bits=4, group_size=16, scale_dtype="float16")
    assert state.grid is not None
    assert state.grid.scale.dtype == torch.float16
    assert not torch.equal(state.weight, state.weight.half().float())  # the weight is float32 all the same


def test_more_bits_or_smaller_groups_have_less_error() -> None:
    weight = draw(ROWS, COLUMNS, seed=7)
    errors = [float((rtn(weight, bits=bits, group_size=16).weight - weight).norm()) for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    groups = [float((rtn(weight, bits=3, group_size=group).weight - weight).norm()) for group in (-1, 16, 4)]
    assert groups == sorted(groups, reverse=True)


def test_calibration_has_no_influence() -> None:
    weight = draw(ROWS, COLUMNS, seed=8)
    state = state_of(weight)
    RTN(group_size=16).apply(state, moments_of(correlated(60, COLUMNS, seed=8)))
    assert torch.equal(state.weight, rtn(weight, group_size=16).weight)
