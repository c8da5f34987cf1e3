"""The Triton kernels: their numbers in Triton's interpreter, their machine code for GPUs that are not here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.grid import Grid, GridSpec
from compress.kernels.fragments import PACKED_ROWS, Fragments, arrange_grid, arrange_up, arrange_values, restore_up
from compress.kernels.pack import PAIRS
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("kernels run: see test_cuda.py", allow_module_level=True)
pytest.importorskip("triton")
from compress.kernels import multiply
from tests.kernels import emulated

KINDS = ("int4", "sparse24", "sparse24_int4")


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)


def two_of_four(out: int, width: int, random: torch.Generator) -> Tensor:
    kept = torch.zeros(len(PAIRS), 4, dtype=torch.bool)
    for number, pair in enumerate(PAIRS):
        kept[number, list(pair)] = True
    return kept[torch.randint(len(PAIRS), (out, width // 4), generator=random)].view(out, width)


def weight_of(
    kind: str,
    out: int,
    width: int,
    dtype: torch.dtype,
    seed: int,
    group: int = -1,
    *,
    symmetric: bool = True,
    portable: bool = False,
) -> tuple[Fragments, Tensor]:
    """A random weight, and the same in float64: of codes unrounded, code − zero times scale."""
    random = torch.Generator().manual_seed(seed)
    stored = None if kind == "int4" else two_of_four(out, width, random)
    if kind == "sparse24":
        assert stored is not None
        values = torch.randn(out, width // 2, generator=random).to(dtype)
        dense = torch.zeros(out, width, dtype=torch.float64)
        dense[stored] = values.double().flatten()
        return arrange_values(values, stored, portable=portable), dense
    spec = GridSpec(4, group, symmetric)
    shape = out, spec.groups(width)
    zero = torch.randint(0, 16, shape, generator=random, dtype=torch.uint8)
    zero = torch.full_like(zero, 8) if symmetric else zero
    codes = torch.randint(0, 16, (out, width), generator=random, dtype=torch.uint8)
    grid = Grid(spec, torch.rand(shape, generator=random).add(0.1).to(dtype), zero, codes)
    grid = grid if stored is None else grid.zeroed(~stored)
    steps = grid.codes.double() - grid.spread(grid.zero).double()
    return arrange_grid(grid, dtype, stored, portable=portable), steps * grid.spread(grid.scale).double()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    rows=st.sampled_from([1, 3, 8, 9, 16, 17, 40]),
    out=st.integers(1, 70),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 96, 128, -1]),
    rank=st.sampled_from([0, 0, 16, 48]),
    symmetric=st.booleans(),
    processors=st.sampled_from([1, 4, 132]),
    seed=st.integers(0, 1 << 20),
)
def test_products_are_those_in_float64(
    kind: str, dtype: torch.dtype, rows: int, out: int, groups: int, group: int, rank: int, symmetric: bool,
    processors: int, seed: int,
) -> None:  # fmt: skip
    """Within the rounding of the result, and of the weights where many rows are multiplied with scaled numbers."""
    width = 40 * groups if group == -1 else group * groups
    weight, exact = weight_of(kind, out, width, dtype, seed, group, symmetric=symmetric)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=random).to(dtype)
    wanted = x.double() @ exact.T
    size = x.double().abs() @ exact.abs().T
    up = dx = None
    if rank:
        up = torch.randn(out, rank, generator=random).to(dtype)
        dx = torch.randn(rows, rank, generator=random).to(dtype)
        wanted += dx.double() @ up.double().T
        size += dx.double().abs() @ up.double().abs().T
        up = arrange_up(up)
    found = multiply.multiply(x, weight, out, up, dx, processors=processors)
    assert found.dtype == dtype
    assert found.shape == (rows, out)
    # The interpreter cuts off what bfloat16 does not hold. 2⁻¹² is half a unit of float16 where outputs are largest.
    unit = 2**-11 if dtype == torch.float16 else 2**-7
    rounded = 2**-11 if dtype == torch.float16 else 2**-8
    allowed = unit * wanted.abs() + (rounded * size if rows > 16 else 0) + (width + rank) * 2**-23 * size + 2**-12
    assert bool(((found.double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tile", "width", "group", "symmetric"),
    [
        (multiply.Tile(1, 1, 1, 4, False, False, 3), 640, 128, True),
        (multiply.Tile(2, 5, 1, 2, True, False, 3), 384, 64, False),
        (multiply.Tile(1, 3, 1, 2, True, True, 7), 200, -1, False),
    ],
)
def test_what_comes_through_shared_memory_is_the_same(
    kind: str, tile: multiply.Tile, width: int, group: int, symmetric: bool
) -> None:
    """As what is loaded, bit for bit; of tiles of any number, too."""
    out, rows = 90, 13
    weight, exact = weight_of(kind, out, width, torch.float16, 3, group, symmetric=symmetric)
    x = torch.randn(rows, width).half()
    found = multiply.launch(tile, x, weight, out)
    assert torch.equal(found, multiply.launch(tile._replace(ahead=0), x, weight, out))
    wanted = x.double() @ exact.T
    assert float((found.double() - wanted).abs().max()) <= 2**-9 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tile", "rows"),
    [
        (multiply.Tile(1, 1, 1, 8, False, False, 1, once=True), 5),
        (multiply.Tile(2, 1, 2, 4, True, False, 1, once=True, early=True), 16),
        (multiply.Tile(2, 3, 2, 2, True, False, 3, once=True), 13),
        (multiply.Tile(4, 2, 1, 4, True, True, 0, once=True), 33),
        (multiply.Tile(1, 5, 1, 1, True, False, 0, once=True), 7),
        (multiply.Tile(2, 2, 2, 2, True, False, 1, once=True, split=2), 16),
        (multiply.Tile(1, 3, 1, 1, True, False, 3, once=True, split=4), 11),
    ],
    ids=lambda one: " ".join(str(int(part)) for part in one) if isinstance(one, tuple) else None,
)
def test_sums_that_are_added_behind_one_barrier(kind: str, tile: multiply.Tile, rows: int) -> None:
    """Of every output, also where neither tiles nor rows fill the programs; with a branch."""
    out, width = 90, 640
    weight, exact = weight_of(kind, out, width, torch.float16, 5)
    x, dx, up = (torch.randn(shape).half() for shape in ((rows, width), (rows, 16), (out, 16)))
    found = multiply.launch(tile, x, weight, out, arrange_up(up), dx)
    wanted = x.double() @ exact.T + dx.double() @ up.double().T
    assert float((found.double() - wanted).abs().max()) <= 2**-9 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "width", "group", "symmetric"), [(40, 128, 32, False), (17, 192, 96, True), (9, 40, -1, False)]
)
def test_the_weight_is_decoded_to_what_the_grid_says(
    kind: str, dtype: torch.dtype, out: int, width: int, group: int, symmetric: bool
) -> None:
    """A product of a scale and a whole number below 16, rounded once."""
    weight, exact = weight_of(kind, out, width, dtype, 1, group, symmetric=symmetric)
    assert torch.equal(multiply.weight(dtype, weight, out, width), exact.to(dtype))


@pytest.mark.parametrize(("group", "symmetric", "width"), [(128, True, 256), (64, False, 192), (-1, False, 200)])
def test_the_warp_group_product_is_that_of_the_decoded_weight(group: int, symmetric: bool, width: int) -> None:
    """In float16: the interpreter's product of bfloat16 is wrong. Of rows that no tile divides, and with a branch."""
    out, rows = 72, 70
    weight, exact = weight_of("int4", out, width, torch.float16, 3, group, symmetric=symmetric)
    x, dx, up = (torch.randn(shape).half() for shape in ((rows, width), (rows, 16), (out, 16)))
    assert multiply.wide_for(rows, weight, 132) is not None
    found = multiply.multiply(x, weight, out, arrange_up(up), dx, processors=132, hopper=True)
    wanted = x.double() @ exact.half().double().T + dx.double() @ up.double().T
    assert float((found.double() - wanted).abs().max()) <= 2**-9 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_multiplied_with_the_decoded_weight(kind: str) -> None:
    rows, out, width = PACKED_ROWS + 1, 24, 64
    weight, exact = weight_of(kind, out, width, torch.float16, 2, 32)
    x, dx, up = (torch.randn(shape).half() for shape in ((rows, width), (rows, 16), (out, 16)))
    found = multiply.multiply(x, weight, out, arrange_up(up), dx, processors=132)
    wanted = x.double() @ exact.half().double().T + dx.double() @ up.double().T
    assert float((found.double() - wanted).abs().max()) <= 2**-9 * float(wanted.abs().max())
    assert multiply.multiply(x[:0], weight, out, processors=132).shape == (0, out)


def test_a_branch_comes_back() -> None:
    up = torch.randn(40, 32).bfloat16()
    assert torch.equal(restore_up(arrange_up(up), torch.bfloat16)[:40], up)


def test_what_cannot_be_arranged_is_refused() -> None:
    def grid(spec: GridSpec) -> Grid:
        scale = torch.ones(16, spec.groups(96))
        return Grid(spec, scale, scale.to(torch.uint8), torch.zeros(16, 96, dtype=torch.uint8))

    with pytest.raises(ValueError, match="32 does not divide groups of 48 columns"):
        arrange_grid(grid(GridSpec(4, 48)), torch.float16)
    with pytest.raises(ValueError, match="no integer codes of at most 4 bits"):
        arrange_grid(grid(GridSpec(4, 32, kind="nf")), torch.float16)
    large = grid(GridSpec(4, 32))
    with pytest.raises(ValueError, match="a scale is too large for float16"):
        arrange_grid(Grid(large.spec, large.scale * 1e6, large.zero, large.codes), torch.float16)


@given(
    st.sampled_from(KINDS), st.integers(1, 192), st.integers(1, 2000), st.integers(1, 300), st.sampled_from([20, 132]),
)  # fmt: skip
def test_a_tile_fits_the_weight(kind: str, rows: int, tiles: int, steps: int, processors: int) -> None:
    from compress.kernels.aot import fragments

    tile = multiply.tile_for(rows, fragments(kind, 16 * tiles, 128 * steps), processors)
    assert tile.tiles <= tiles
    assert tile.along * tile.across <= 16
    assert all(number & (number - 1) == 0 for number in tile[:4])


def compiled(*arguments: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "compress.kernels.aot", *arguments]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def check_code(line: dict[str, Any]) -> None:
    """No spills, shared memory for sums alone or for x; each PTX instruction with a value for each thread."""
    assert line["registers"] <= 255, line
    assert line["stack_bytes"] == 0, line
    sums = 34 if line["kernel"] == "product" and line["tile"]["once"] else 4
    assert line["shared_bytes"] <= {"wide": 112, "portable": 112, "prompt": 130}.get(line["kernel"], sums) << 10, line
    assert not line.get("written_early"), line
    assert line.get("from_registers", True), line
    assert set(line.get("awaited", "0")) == {"0"}, line  # or registers are written that a product still reads
    assert line.get("one_value_a_thread", True), line


def limit(line: dict[str, Any]) -> float:
    """What issue 6 sets for instructions per weight, groups of 128 and up to 16 rows of x; elsewhere nothing.

    It sets 1.3 for codes of 2:4 by `mma.sp`, which up to 8 rows keep whose x is in order, in float16; decoding, x and
    the sums alone take 1.2 (docs/decisions/015-fragments.md).
    """
    kind, tile = line["kind"], line["tile"]
    if line["group"] != 128 or line["branch"] or line["offsets"] or not tile:
        return math.inf
    if line["kernel"] == "portable" and tile["rows"] <= 16 and not version("triton").startswith("3.6"):
        return {"int4": 2.6, "sparse24": 5.5, "sparse24_int4": 3.4}[kind]
    if line["kernel"] != "product" or tile["eights"] > 2:
        return math.inf
    if kind == "sparse24_int4":
        few = (tile["arranged"] and tile["eights"] == 1) or tile["tiles"] == 2
        return 1.7 if line["half"] == "bf16" else 1.32 if few else 1.5
    return {"int4": 2.6, "sparse24": 5.5}[kind]


def check_all_code(lines: list[dict[str, Any]]) -> None:
    assert {line["kernel"] for line in lines} >= {"product", "weight", "portable", "portable_weight"}
    assert {line["kind"] for line in lines} == set(KINDS)
    for line in lines:
        check_code(line)
        assert line.get("instructions_per_weight", 0) <= limit(line), line


@pytest.mark.parametrize("arch", ["80", "90"])
def test_machine_code_keeps_to_registers(arch: str) -> None:
    check_all_code(compiled("--arch", arch, "--processes", "2"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_tile_keeps_to_registers(arch: str) -> None:
    check_all_code(compiled("--arch", arch, "--all", "--processes", "2"))


def test_compiled_lines_are_kept(tmp_path: Path) -> None:
    """A second run takes what is there, unless it is of another source, and leaves other versions alone."""
    from compress.kernels.aot import Kept

    path = tmp_path / "aot.json"
    path.write_text('{"3.5.0": [{"arch": 80}]}')
    known = {"arch": 80, "tile": (1, 2), "source": "one"}
    assert Kept(path).find(known) is None
    Kept(path).keep([known | {"registers": 40}])
    assert Kept(path).find(known) == json.loads(json.dumps(known | {"registers": 40}))
    assert Kept(path).find(known | {"source": "other"}) is None
    assert json.loads(path.read_text())["3.5.0"] == [{"arch": 80}]
