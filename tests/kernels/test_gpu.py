"""The Triton kernels behind the runtime's interface, interpreted: as an operator, with branches, refusing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from compress import packed_linear
from compress.errors import RunError
from compress.grid import GridSpec
from compress.kernels.choose import Choice, choose
from compress.kernels.fragments import as_four_bits
from compress.kernels.gpu import Triton, TritonInt4, TritonSparse24, TritonSparse24Int4, packed_matmul
from compress.kernels.pack import Layout, pack_part, unpack_weight
from compress.kernels.reference import Decoded
from compress.packed_linear import PackedLinear
from compress.state import LowRank
from tests.conftest import ROOT
from tests.kernels.test_pack import grid_of, two_of_four

if torch.cuda.is_available():
    pytest.skip("kernels run: see test_cuda.py", allow_module_level=True)
pytest.importorskip("triton")
from compress.kernels import bench
from tests.kernels import emulated


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (3, False), (4, True), (4, False)])
@pytest.mark.parametrize("kernel", [TritonInt4, TritonSparse24Int4])
@pytest.mark.parametrize("rank", [0, 5, 16])
def test_a_packed_linear_is_multiplied(bits: int, symmetric: bool, kernel: type[Triton], rank: int) -> None:
    """Up to float16 rounding, in float64; fewer bits as codes of 4, branches of any rank."""
    out, width, dtype = 40, 128, torch.float16
    spec = GridSpec(bits, 32, symmetric)
    mask = two_of_four(out, width, 1) if kernel.sparse else None
    grid = grid_of(spec, out, width, dtype, bits)
    grid = grid if mask is None else grid.zeroed(~mask)
    generator = torch.Generator().manual_seed(rank)
    up, down = (torch.randn(*shape, generator=generator).to(dtype).float() for shape in ((out, rank), (rank, width)))
    branch = LowRank(up, down) if rank else None
    layout = Layout(out, width, dtype, spec, kernel.sparse, rank)
    parts = {suffix: pack_part(layout, suffix, grid, mask, branch) for suffix in layout.tensors()}
    made = kernel(layout, parts, dtype)
    x = torch.randn(3, width, generator=generator).to(dtype)
    steps = grid.codes.double() - grid.spread(grid.zero).double()
    wanted = x.double() @ (steps * grid.spread(grid.scale).double()).T
    size = float(wanted.abs().max())
    if rank:
        dx = (x.double() @ down.double().T).to(dtype).double()  # rounded on the way
        wanted += dx @ up.double().T
        size += float((dx.abs() @ up.double().abs().T).max())
    assert made(x).dtype == dtype
    assert float((made(x).double() - wanted).abs().max()) <= 2**-9 * size


def test_values_of_24_are_multiplied() -> None:
    """Also where the mask leaves less than two of four columns, and kept weights are 0."""
    out, width = 24, 72
    mask = two_of_four(out, width, 2)
    mask[:, :8] = False
    weight = torch.randn(out, width).half() * mask
    weight[3] = 0
    layout = Layout(out, width, torch.float16, None, True)
    parts = {suffix: pack_part(layout, suffix, weight, mask, None) for suffix in layout.tensors()}
    x = torch.randn(2, width).half()
    wanted = x.double() @ weight.double().T
    found = TritonSparse24(layout, parts, torch.float16)(x)
    assert float((found.double() - wanted).abs().max()) <= 2**-9 * float(wanted.abs().max())


def test_values_too_large_for_float16_are_refused() -> None:
    layout = Layout(8, 8, torch.bfloat16, None, True)
    mask = two_of_four(8, 8, 3)
    parts = {suffix: pack_part(layout, suffix, 1e6 * mask.float(), mask, None) for suffix in layout.tensors()}
    with pytest.raises(ValueError, match="a value is not finite in float16"):
        TritonSparse24(layout, parts, torch.float16)


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_are_the_same_weights(bits: int) -> None:
    grid = grid_of(GridSpec(bits, 16, symmetric=False), 9, 48, torch.float32, 0)
    again = as_four_bits(grid)
    assert again.spec.bits == 4
    assert torch.equal(again.dequantize(torch.float32), grid.dequantize(torch.float32))


@pytest.mark.parametrize("kind", ["int4", "sparse24", "sparse24_int4"])
def test_the_operator_is_one_for_torch_compile(kind: str) -> None:
    """Its schema, its shapes without data, and what it changes: nothing."""
    kernel, _, _ = bench.kernel_of(kind, bench.Case(24, 64, group=32, rank=16), torch.float16, "cpu")
    x, dx = torch.randn(2, 64).half(), torch.randn(2, 16).half()
    held = [kernel._buffers[name] for name in bench.PARTS]
    for branch in ((None, None), (kernel.low_rank_up, dx)):
        arguments = (x, *held, *branch, kernel.group, kernel.step, 24)
        torch.library.opcheck(packed_matmul, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_they_cannot_multiply() -> None:
    def problem(kernel: type[Triton], layout: Layout, dtype: torch.dtype = torch.float16) -> str:
        return kernel.unfit(layout, dtype) or ""

    codes, values = Layout(32, 64, torch.float16, GridSpec(4, 32)), Layout(32, 64, torch.float16, None, True)
    both = Layout(32, 64, torch.float16, GridSpec(4, 32), True)
    assert [problem(kernel, both) for kernel in (TritonInt4, TritonSparse24Int4)] == ["", ""]
    assert problem(TritonSparse24, both) == "has codes"
    assert problem(TritonSparse24, values) == ""
    assert problem(TritonSparse24Int4, values) == "has no codes"
    assert problem(TritonInt4, codes) == ""
    assert problem(TritonSparse24Int4, codes) == "is not 2:4"
    assert problem(TritonInt4, Layout(32, 80, torch.float16, GridSpec(4))) == ""
    assert "at most 4 bits" in problem(TritonInt4, Layout(32, 64, torch.float16, GridSpec(8, 32)))
    assert "at most 4 bits" in problem(TritonInt4, Layout(32, 64, torch.float16, GridSpec(4, 32, kind="nf")))
    assert "at most 4 bits" in problem(TritonInt4, values)
    assert "not in float32" in problem(TritonInt4, codes, torch.float32)
    assert "32 does not divide groups of 48" in problem(TritonInt4, Layout(32, 96, torch.float16, GridSpec(4, 48)))
    assert choose(codes, torch.device("cpu"), torch.float16).kernel is not TritonInt4


@pytest.mark.parametrize("kind", list(bench.KERNELS))
def test_the_check_for_gpus_passes_when_interpreted(kind: str) -> None:
    cases = bench.Case(24, 64, group=32, rank=8), bench.Case(16, 40, group=-1, symmetric=False)
    found = bench.check(kind, torch.float16, "cpu", cases)
    assert [line["rows"] for line in found] == [1, 17] * 2
    assert all(0 < line["error"] <= 2**-9 for line in found)


@pytest.mark.parametrize("kind", ["int4", "sparse24", "sparse24_int4"])
@pytest.mark.parametrize("rows", [16, 70, 513])
def test_all_ways_multiply_alike(kind: str, rows: int) -> None:
    """Those that are timed on a GPU to choose among them."""
    kernel, weight, _ = bench.kernel_of(kind, bench.Case(72, 128, group=64, symmetric=False), torch.float16, "cpu")
    x = torch.randn(rows, 128).half()
    wanted = x.double() @ weight.double().T
    found = bench.ways(rows, bench.fragments_of(kernel), 132, hopper=True)
    assert len(found) == {16: 3, 70: 4, 513: 2}[rows] + (5 if kind == "int4" and rows > 16 else 0)
    for name, way in found.items():
        y = way(x, bench.fragments_of(kernel), 72)
        assert float((y.double() - wanted).abs().max()) <= 2**-9 * float(wanted.abs().max()), name


def test_a_check_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layout: Layout, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return unpack_weight(layout, parts) * 1.01

    monkeypatch.setattr(bench, "unpack_weight", wrong)
    with pytest.raises(RunError, match="is above"):
        bench.check("int4", torch.float16, "cpu", (bench.Case(24, 64, group=32),))


def test_the_check_wants_a_gpu() -> None:
    command = [sys.executable, "-m", "compress.kernels.bench", "--check"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "torch finds no GPU" in found.stderr


@pytest.mark.parametrize("rank", [0, 8])
def test_many_rows_are_multiplied_with_the_plain_weight_beside_it(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Exactly as without packing; few rows as by the kernel."""
    out, width, dtype, spec = 24, 64, torch.float16, GridSpec(4, 32)
    grid = grid_of(spec, out, width, dtype, 1)
    branch = LowRank(torch.randn(out, rank), torch.randn(rank, width)) if rank else None
    layout = Layout(out, width, dtype, spec, False, rank)
    parts = {suffix: pack_part(layout, suffix, grid, None, branch) for suffix in layout.tensors()}
    monkeypatch.setattr(packed_linear, "choose", lambda *_: Choice(TritonInt4, "", TritonInt4.most_rows))
    made = PackedLinear(layout, dtype, bias=False)
    made.load_state_dict(parts)
    made.settle("linear", "both")
    for rows, kernel in ((32, TritonInt4(layout, parts, dtype)), (33, Decoded(layout, parts, dtype))):
        x = torch.randn(rows, width).half()
        assert torch.equal(made(x), kernel(x))


def test_who_keeps_a_plain_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    layout, device = Layout(32, 64, torch.float16, GridSpec(4, 32)), torch.device("cuda")
    alone = choose(layout, device, torch.float16)
    assert alone.most_rows is None
    assert alone.why == "codes of 4 bits, float16; for many rows decoded in each product"
    both = choose(layout, device, torch.float16, "both")
    assert both.most_rows == 32
    assert both.why == "codes of 4 bits, float16; more than 32 rows with a plain weight"
    assert choose(layout, torch.device("cpu"), torch.float32, "both").most_rows is None  # which is decoded anyway
