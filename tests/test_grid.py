"""Grids of integer codes: their values against fractions, the nearest code by trying all, what the journal keeps."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoint import lay_out, slots_of, write_shard
from compress.grid import Grid, GridSpec
from compress.state import LinearState, kept_weight
from tests.passes import draw

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# Significand bits and the exponent of the smallest positive value.
PRECISION = {torch.float16: (11, -24), torch.bfloat16: (8, -133), torch.float32: (24, -149)}
# Dtypes of scales and weights that a plan may combine: the second holds the first.
DTYPES = [
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]
SPECS = [
    GridSpec(bits, group, symmetric)
    for bits, group, symmetric in product((2, 3, 4, 8), (-1, 6), (True, False))  # of 24 columns
]


def named(value: object) -> str:
    parts = value[:3] if isinstance(value, GridSpec) else [value]
    return "-".join(map(str, parts)).replace("torch.", "")


each_spec = pytest.mark.parametrize("spec", SPECS, ids=named)


def rounded(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The nearest value of a dtype, halves to even."""
    digits, least = PRECISION[dtype]
    if value == 0:
        return value
    size, exponent = abs(value), 0
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    while Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    return round(value / unit) * unit


def some_grid(spec: GridSpec, dtype: torch.dtype, *, seed: int, rows: int = 5, columns: int = 24) -> Grid:
    """Scales from the smallest of the dtype to large ones, every zero-point, every code."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, spec.groups(columns)
    scale = torch.rand(shape, generator=generator, dtype=torch.float64).mul(20).sub(14).exp2()
    scale[0] *= 2.0 ** (PRECISION[dtype][1] + 16)  # subnormal
    scale = scale.to(dtype)
    zero = torch.randint(0, spec.largest + 1, shape, generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, spec.largest + 1, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[:, :2], codes[:, 2:4] = 0, spec.largest
    assert bool((scale > 0).all())
    return Grid(spec, scale, torch.full_like(zero, spec.middle) if spec.symmetric else zero, codes)


def per_column(grid: Grid, row: int, column: int) -> tuple[Fraction, int]:
    """Scale and zero-point of a weight."""
    width = grid.codes.shape[1] if grid.spec.group_size == -1 else grid.spec.group_size
    return Fraction(float(grid.scale[row, column // width])), int(grid.zero[row, column // width])


def state_of(grid: Grid, dtype: torch.dtype, mask: Tensor | None = None) -> LinearState:
    dense = draw(*grid.codes.shape, seed=3)
    state = LinearState("h.0.proj", dense.clone(), dense, dtype)
    if mask is not None:
        state.prune(~mask)
    state.quantize(grid)
    return state


# ---------------------------------------------------------------- values


@each_spec
@pytest.mark.parametrize(("stored", "dtype"), DTYPES, ids=named)
def test_values_are_the_exact_product_rounded_once(spec: GridSpec, stored: torch.dtype, dtype: torch.dtype) -> None:
    grid = some_grid(spec, stored, seed=1)
    values = grid.dequantize(dtype)
    assert values.dtype == torch.float32
    for row, column in product(range(5), range(24)):
        scale, zero = per_column(grid, row, column)
        exact = scale * (int(grid.codes[row, column]) - zero)
        assert Fraction(float(values[row, column])) == rounded(exact, dtype), (row, column)


@each_spec
def test_zero_has_a_code_and_its_value_is_positive_zero(spec: GridSpec) -> None:
    for stored, dtype in DTYPES:
        grid = some_grid(spec, stored, seed=2)
        zeros = grid.zeroed(torch.ones(5, 24, dtype=torch.bool))
        assert int(zeros.codes.max()) <= spec.largest
        assert (zeros.dequantize(dtype).view(torch.int32) == 0).all()
        assert (zeros.dequantize(dtype).to(dtype).view(torch.uint8) == 0).all()


@pytest.mark.parametrize(("bits", "largest", "middle"), [(2, 3, 2), (3, 7, 4), (4, 15, 8), (8, 255, 128)])
def test_codes_reach_from_zero_to_the_largest_of_their_bits(bits: int, largest: int, middle: int) -> None:
    spec = GridSpec(bits, 6)
    assert (spec.largest, spec.middle) == (largest, middle)
    assert (spec.width(24), spec.groups(24)) == (6, 4)
    whole = GridSpec(bits)
    assert (whole.width(24), whole.groups(24)) == (24, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_code_of_a_value_is_the_nearest_of_all(bits: int) -> None:
    spec = GridSpec(bits, -1, False)
    values = draw(6, 40, seed=bits).mul(spec.largest / 3)
    scale = draw(6, 1, seed=1).exp()
    zero = torch.tensor([0.0, 1.0, spec.middle, spec.largest, 2.0, spec.largest - 1.0]).unsqueeze(1)
    codes = spec.code(values, scale, zero)
    every = torch.arange(spec.largest + 1, dtype=torch.float64)
    distances = (values.double().unsqueeze(-1) - scale.double().unsqueeze(-1) * (every - zero.unsqueeze(-1))).abs()
    chosen = distances.gather(2, codes.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen <= distances.amin(2) + 1e-6 * scale).all()
    assert (codes == 0).any()  # some were out of range, and clipped
    assert (codes == spec.largest).any()


@each_spec
def test_the_code_of_a_codes_value_is_that_code(spec: GridSpec) -> None:
    """Also when the value was rounded; only 8 bits in bfloat16 have steps smaller than its error."""
    for stored, dtype in DTYPES:
        if spec.bits == 8 and dtype == torch.bfloat16:
            continue
        grid = some_grid(spec, stored, seed=4)
        scale, zero = (grid.spread(one).float() for one in (grid.scale, grid.zero))
        normal = scale >= torch.finfo(dtype).smallest_normal
        codes = spec.code(grid.dequantize(dtype), scale, zero)
        assert torch.equal(codes[normal], grid.codes.float()[normal])
        assert normal.any()


# ---------------------------------------------------------------- the state


@each_spec
@pytest.mark.parametrize("masked", [False, True])
def test_what_the_journal_keeps_of_a_grid_comes_back_from_disk(tmp_path: Path, spec: GridSpec, masked: bool) -> None:
    for number, (stored, dtype) in enumerate(DTYPES):
        grid = some_grid(spec, stored, seed=5)
        mask = draw(5, 24, seed=6) > 0 if masked else None
        state = state_of(grid, dtype, mask)
        before = state.weight.clone()
        state.settle()
        assert torch.equal(state.weight.view(torch.int32), before.view(torch.int32))  # it holds values of its dtype
        kept = state.tensors()
        kinds = ["grid", "codes", "scale", "zero", *(["mask"] if masked else [])]
        assert sorted(kept) == sorted(f"h.0.proj:{kind}" for kind in kinds)
        folder = tmp_path / str(number)
        folder.mkdir()
        (shard,) = lay_out(slots_of(kept), 1 << 62)
        write_shard(shard, folder, kept)
        found = load_file(folder / shard.file)

        again = LinearState("h.0.proj", torch.full((5, 24), 7.0), state.dense, dtype)
        again.restore(found)
        assert again.grid is not None
        assert again.grid.spec == spec._replace(scale_dtype=stored)
        for kind in ("scale", "zero", "codes"):
            ours, theirs = getattr(again.grid, kind), getattr(state.grid, kind)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert torch.equal(again.weight.view(torch.int32), state.weight.view(torch.int32))
        assert torch.equal(again.mask, state.mask) if masked else again.mask is None
        assert kept_weight("h.0.proj", found, dtype).dtype == dtype
        assert torch.equal(kept_weight("h.0.proj", found, dtype).float(), state.weight)


def test_tensors_of_another_linear_are_no_grid() -> None:
    kept = some_grid(SPECS[0], torch.float32, seed=7).tensors("h.0.proj")
    assert Grid.restore("h.0.pro", kept) is None
    assert Grid.restore("h.0.proj", kept) is not None


@each_spec
def test_pruning_on_a_grid_keeps_the_grid(spec: GridSpec) -> None:
    grid = some_grid(spec, torch.float16, seed=8)
    state = state_of(grid, torch.float16)
    before, pruned = state.weight.clone(), draw(5, 24, seed=9) > 0
    state.prune(pruned)
    assert state.grid is not None
    assert torch.equal(state.grid.scale, grid.scale)
    assert torch.equal(state.grid.zero, grid.zero)
    assert torch.equal(state.grid.codes[~pruned], grid.codes[~pruned])
    for row, column in pruned.nonzero().tolist():
        assert int(state.grid.codes[row, column]) == per_column(grid, row, column)[1]
    assert torch.equal(state.weight, torch.where(pruned, 0.0, before))
    assert torch.equal(state.weight, state.grid.dequantize(torch.float16))
    assert (state.weight[pruned].view(torch.int32) == 0).all()
    assert torch.equal(grid.codes, some_grid(spec, torch.float16, seed=8).codes)  # the grid itself is not written to


@each_spec
def test_quantizing_under_a_mask_gives_pruned_weights_the_code_of_zero(spec: GridSpec) -> None:
    grid, mask = some_grid(spec, torch.bfloat16, seed=10), draw(5, 24, seed=11) > 0
    state = state_of(grid, torch.bfloat16, mask)
    assert state.grid is not None
    assert torch.equal(state.mask, mask)
    assert (state.weight[~mask].view(torch.int32) == 0).all()
    assert torch.equal(state.weight, torch.where(mask, grid.dequantize(torch.bfloat16), 0.0))
    assert torch.equal(state.grid.codes[mask], grid.codes[mask])
    for row, column in (~mask).nonzero().tolist():
        assert int(state.grid.codes[row, column]) == per_column(grid, row, column)[1]
