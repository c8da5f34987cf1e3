"""The Triton kernel for 4 bits: its numbers in Triton's interpreter, its machine code for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.grid import Grid, GridSpec
from tests.conftest import ROOT

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: in this process they are interpreted
triton = pytest.importorskip("triton")
from compress.kernels import int4  # noqa: E402


def grid_of(spec: GridSpec, out: int, width: int, dtype: torch.dtype, seed: int = 0) -> Grid:
    generator = torch.Generator().manual_seed(seed)
    shape = out, spec.groups(width)
    zero = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    return Grid(
        spec,
        torch.rand(shape, generator=generator).add(0.1).to(dtype),
        torch.full_like(zero, 8) if spec.symmetric else zero,
        torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8),
    )


def exact(grid: Grid) -> torch.Tensor:
    """The weight in float64."""
    steps = grid.codes.double() - grid.spread(grid.zero).double()
    return steps * grid.spread(grid.scale).double()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 8, 9, 17, 40]),
    out=st.integers(1, 140),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 96, 128, -1]),
    rank=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    programs=st.sampled_from([1, 6, 132]),
    seed=st.integers(0, 1 << 20),
)
def test_products_are_those_in_float64(
    rows: int, out: int, groups: int, group: int, rank: int, symmetric: bool, programs: int, seed: int
) -> None:
    """Within the rounding of the result to float16, whatever the splits; of rows of any width too (group −1)."""
    width = 40 * groups if group == -1 else group * groups
    grid = grid_of(GridSpec(4, group, symmetric), out, width, torch.float16, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).half()
    wanted = x.double() @ exact(grid).T
    size = x.double().abs() @ exact(grid).abs().T
    up = dx = None
    if rank:
        up = torch.randn(out, rank, generator=generator).half()
        dx = torch.randn(rows, rank, generator=generator).half()
        wanted += dx.double() @ up.double().T
        size += dx.double().abs() @ up.double().abs().T
    found = int4.matmul(x, int4.shuffle(grid, torch.float16), out, up, dx, programs=programs)
    assert found.dtype == torch.float16
    assert found.shape == (rows, out)
    # A sum of 24 times as large terms in float32, then float16; 2^-12 is the half of a unit at the largest values.
    allowed = 2**-11 * wanted.abs() + 24 * (width + rank) ** 0.5 * 2**-23 * size + 2**-12
    assert bool(((found.double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 128])
def test_words_hold_the_codes_in_the_order_of_fragments(dtype: torch.dtype, group: int) -> None:
    """Read as the kernel's text says, in Python integers: a mask, a rotation, 16.0 with the code in its mantissa."""
    grid = grid_of(GridSpec(4, group), 32, 2 * group, dtype)
    made = int4.shuffle(grid, dtype)
    magic, lowest = int4.MAGIC[dtype]
    integers = made.words.tolist()
    columns = 16 * made.tiles
    for tile, lane, step, part in [(0, 0, 0, 0), (1, 31, 1, 1), (0, 13, 2 * group // columns - 1, made.tiles - 1)]:
        word = integers[tile][step][lane][part] & 0xFFFFFFFF
        g, t = divmod(lane, 4)
        for number in range(4):
            turned = (word >> (4 * number) | word << (32 - 4 * number)) & 0xFFFFFFFF
            both = turned & (0xF << lowest | 0xF << (lowest + 16)) | magic
            halves = torch.tensor([both & 0xFFFF, both >> 16], dtype=torch.int32).to(torch.uint16).view(dtype)
            row = 16 * tile + g + 8 * (number % 2)
            column = columns * step + 16 * part + 2 * t + 8 * (number // 2)
            assert halves.tolist() == (16.0 + grid.codes[row, column : column + 2].double()).tolist()


def test_scales_and_zero_points_are_exact_and_rows_are_filled_up() -> None:
    grid = grid_of(GridSpec(4, 32, symmetric=False), 40, 64, torch.bfloat16)
    made = int4.shuffle(grid, torch.bfloat16)
    assert made.scale.shape == made.offset.shape == (2, 128)
    assert torch.equal(made.scale[:, :40], grid.scale.T)
    assert torch.equal(made.offset[:, :40].float(), -16 - grid.zero.T.float())  # whole numbers up to 31
    assert not made.scale[:, 40:].any()


def test_what_it_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="32 does not divide groups of 48 columns"):
        int4.shuffle(grid_of(GridSpec(4, 48), 16, 96, torch.float16), torch.float16)
    with pytest.raises(ValueError, match=r"codes of 4 bits \(nf\)"):
        int4.shuffle(grid_of(GridSpec(4, 32, kind="nf"), 16, 64, torch.float16), torch.float16)


@given(st.integers(1, 4096), st.integers(1, 30_000), st.integers(1, 300), st.integers(1, 1000))
def test_splits_cover_every_group_once(rows: int, out: int, groups: int, programs: int) -> None:
    splits, each = int4.splits_for(rows, out, groups, int4.tile_for(rows), programs)
    assert 1 <= splits <= 16
    assert splits * each >= groups > (splits - 1) * each


def test_machine_code_keeps_to_registers() -> None:
    """For sm_80 and sm_90: no spill, shared memory for several programs, and few instructions a weight."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "compress.kernels.aot"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    limit = 2.6 if triton.__version__ >= "3.9" else 4.0  # 3.6 moves halves about
    assert len(lines) == 2 * 4 * 2 * 4  # architectures, tiles, dtypes; three groups and a branch
    for line in lines:
        assert line["stack_bytes"] == 0, line
        assert line["registers"] <= 255
        assert line["shared_bytes"] <= 100 << 10  # an A100 has 164 KiB, other cards of sm_86 and sm_89 100
        if line["tile"]["rows"] <= 16 and line["group"] == 128 and not line["rank"]:
            assert line["instructions_per_weight"] <= limit, line
