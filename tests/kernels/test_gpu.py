"""The Triton kernels behind the runtime's interface, interpreted: as operators, with branches, and when they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.grid import Grid, GridSpec
from compress.kernels.choose import choose
from compress.kernels.gpu import TritonInt4, as_four_bits, int4_matmul
from compress.kernels.pack import Layout, pack_part, unpack_weight
from compress.state import LowRank
from tests.conftest import ROOT
from tests.kernels.test_pack import grid_of, two_of_four

os.environ["TRITON_INTERPRET"] = "1"  # as in test_int4.py
pytest.importorskip("triton")


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (3, False), (4, True), (4, False)])
@pytest.mark.parametrize(("sparse", "rank"), [(False, 0), (True, 0), (False, 5), (True, 16)])
def test_a_packed_linear_is_multiplied(bits: int, symmetric: bool, sparse: bool, rank: int) -> None:
    """Up to float16 rounding, in float64; fewer bits and 2:4 as codes of 4, branches of any rank."""
    out, width, dtype = 40, 128, torch.float16
    spec = GridSpec(bits, 32, symmetric)
    grid = grid_of(spec, out, width, dtype, bits)
    mask = two_of_four(out, width, 1) if sparse else None
    grid = grid if mask is None else grid.zeroed(~mask)
    generator = torch.Generator().manual_seed(rank)
    up, down = (torch.randn(*shape, generator=generator).to(dtype).float() for shape in ((out, rank), (rank, width)))
    branch = LowRank(up, down) if rank else None
    layout = Layout(out, width, dtype, spec, sparse, rank)
    parts = {suffix: pack_part(layout, suffix, grid, mask, branch) for suffix in layout.tensors()}
    kernel = TritonInt4(layout, parts, dtype)
    x = torch.randn(3, width, generator=generator).to(dtype)
    steps = grid.codes.double() - grid.spread(grid.zero).double()
    wanted = x.double() @ (steps * grid.spread(grid.scale).double()).T
    size = float(wanted.abs().max())
    if rank:
        dx = (x.double() @ down.double().T).to(dtype).double()  # rounded on the way
        wanted += dx @ up.double().T
        size += float((dx.abs() @ up.double().abs().T).max())
    assert kernel(x).dtype == dtype
    assert float((kernel(x).double() - wanted).abs().max()) <= 2**-9 * size


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_are_the_same_weights(bits: int) -> None:
    grid = grid_of(GridSpec(bits, 16, symmetric=False), 9, 48, torch.float32, 0)
    again = as_four_bits(grid)
    assert again.spec.bits == 4
    assert torch.equal(again.dequantize(torch.float32), grid.dequantize(torch.float32))


def test_the_operator_is_one_for_torch_compile() -> None:
    """Its schema, its shapes without data, and what it changes: nothing."""
    from compress.kernels.int4 import shuffle

    made = shuffle(grid_of(GridSpec(4, 32), 24, 64, torch.float16, 0), torch.float16)
    x, dx, up = torch.randn(2, 64).half(), torch.randn(2, 16).half(), torch.randn(24, 16).half()
    for branch in ((None, None), (up, dx)):
        arguments = (x, made.words, made.scale, made.offset, *branch, made.group, made.tiles, 24)
        torch.library.opcheck(int4_matmul, arguments, test_utils=("test_schema", "test_faketensor"))


def test_what_it_cannot_multiply() -> None:
    def problem(layout: Layout, dtype: torch.dtype = torch.float16) -> str:
        return TritonInt4.unfit(layout, dtype) or ""

    assert problem(Layout(32, 64, torch.float16, GridSpec(4, 32))) == ""
    assert problem(Layout(32, 80, torch.float16, GridSpec(4))) == ""
    assert "at most 4 bits" in problem(Layout(32, 64, torch.float16, GridSpec(8, 32)))
    assert "at most 4 bits" in problem(Layout(32, 64, torch.float16, GridSpec(4, 32, kind="nf")))
    assert "at most 4 bits" in problem(Layout(32, 64, torch.float16, None, True))
    assert "not in float32" in problem(Layout(32, 64, torch.float32, GridSpec(4, 32)), torch.float32)
    assert "32 does not divide groups of 48" in problem(Layout(32, 96, torch.float16, GridSpec(4, 48)))
    layout = Layout(32, 64, torch.float16, GridSpec(4, 32))
    assert choose(layout, torch.device("cpu"), torch.float16).kernel is not TritonInt4


def test_the_check_for_gpus_passes_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compress.kernels.bench", "--check", "--json", str(tmp_path / "out.json")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "6 products agree with float64" in found.stdout, found.stderr[-2000:]
    assert (tmp_path / "out.json").stat().st_size
    environment = {key: value for key, value in environment.items() if key != "TRITON_INTERPRET"}
    if not torch.cuda.is_available():
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == 1
        assert "torch finds no GPU" in found.stderr


def test_a_check_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.errors import RunError
    from compress.kernels import bench

    def wrong(layout: Layout, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return unpack_weight(layout, parts) * 1.01

    monkeypatch.setattr(bench, "unpack_weight", wrong)
    with pytest.raises(RunError, match="is above"):
        bench.check("cpu")
