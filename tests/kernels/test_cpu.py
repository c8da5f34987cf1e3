"""torch's packed operators against products in float64, to bounds that follow from where they round."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from compress.errors import RunError
from compress.grid import Grid, GridSpec, ScaleSpec
from compress.kernels import cpu
from compress.kernels.choose import choose
from compress.kernels.cpu import Int4, Int8
from compress.kernels.pack import Layout
from compress.kernels.reference import Decoded, Reference
from compress.state import LowRank
from tests.conftest import ROOT, same_bits
from tests.kernels.test_pack import grid_of, packed, two_of_four

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.kernel import Kernel

CPU = torch.device("cpu")
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # relative, to nearest


def made(spec: GridSpec, out: int, width: int, *, sparse: bool = False, rank: int = 0) -> tuple[Layout, dict, Grid]:
    """A random linear with scales in bfloat16 or what the spec says; its branch is of ones and small numbers."""
    layout = Layout(out, width, torch.bfloat16, spec, sparse, rank)
    mask = two_of_four(out, width, out) if sparse else None
    grid = grid_of(spec, out, width, torch.bfloat16, seed=width)
    grid = grid if mask is None else grid.zeroed(~mask)
    branch = LowRank(torch.ones(out, rank) / 4, torch.ones(rank, width) / 8) if rank else None
    return layout, packed(layout, grid, mask, branch), grid


def inputs(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).bfloat16()


def exact_and_bound(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """``x Wᵀ`` in float64, and |x| times what the planes add up to, by weight: |code − 8| scale + |zero| of each."""
    scale, zero = grid.spread(grid.scale.double()), grid.spread(grid.zero).double()
    codes = grid.codes.double()
    if grid.spec.bits == 8:
        high, low = codes.div(16, rounding_mode="floor"), codes % 16
        planes = (high - 8).abs() * 16 + (128 - zero).abs() + (low - 8).abs() + 8
    elif grid.spec.bits == 4:
        planes = (codes - 8).abs() + (8 - zero).abs()
    else:
        planes = (codes - zero).abs()
    return x.double() @ ((codes - zero) * scale).T, x.double().abs() @ (planes * scale).T


SPECS = [
    GridSpec(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (32, 128, -1) for symmetric in (True, False)
]
SPECS += [GridSpec(4, group) for group in (64, 96, 256)]
SPECS += [GridSpec(bits, 32, scale_dtype=torch.float32) for bits in (3, 4, 8)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
def test_int4_is_the_product(spec: GridSpec, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2⁻⁸ for each of: scales and zeros, the result of a plane, the sum of two; by the operator and decoded."""
    width = 768 if spec.group_size in (96, 256) else 384
    for out in (70, 5, 128):
        layout, parts, grid = made(spec, out, width, sparse=sparse)
        kernel = Int4(layout, parts, torch.bfloat16)
        for rows, at_most in ((1, 4), (4, 4), (7, 4)):  # the last ones are decoded
            monkeypatch.setattr(cpu, "INT4_ROWS", at_most)
            x = inputs(rows, width)
            exact, planes = exact_and_bound(x, grid)
            error = (kernel(x).double() - exact).abs()
            assert bool((error <= 3 * 2.0**-8 * planes + 1e-5 * planes).all())


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.symmetric and spec.bits < 8 and not spec.scale_dtype], ids=str
)
@pytest.mark.parametrize("rows", [1, 9])
def test_symmetric_grids_of_4_bits_and_less_are_exact_but_for_the_result(
    spec: GridSpec, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that bfloat16 holds are not rounded again: what is left is float32 sums and one rounding of the result."""
    monkeypatch.setattr(cpu, "INT4_ROWS", 4)
    width = 768
    layout, parts, grid = made(spec, 70, width)
    x = inputs(rows, width)
    exact, planes = exact_and_bound(x, grid)
    error = (Int4(layout, parts, torch.bfloat16)(x).double() - exact).abs()
    assert bool((error <= 2.0**-8 * exact.abs() + width * 2.0**-23 * planes).all())


@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
def test_int8_is_the_product(rows: int, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale per row, exact in bfloat16: float32 sums, and one rounding of the result."""
    monkeypatch.setattr(cpu, "INT8_ROWS", 4)
    for out, width in ((5, 32), (70, 384)):
        layout, parts, grid = made(GridSpec(8, -1), out, width, sparse=sparse)
        x = inputs(rows, width)
        exact, planes = exact_and_bound(x, grid)
        error = (Int8(layout, parts, torch.bfloat16)(x).double() - exact).abs()
        assert bool((error <= 2.0**-8 * exact.abs() + width * 2.0**-23 * planes).all())


def test_rows_that_are_not_aligned_are_copied() -> None:
    """The int8 operator reads whole vectors: rows that begin elsewhere would end the process."""
    layout, parts, _ = made(GridSpec(8, -1), 8, 64)
    shifted = torch.empty(64 + 1, dtype=torch.bfloat16)[1:].view(1, 64).copy_(inputs(1, 64))
    assert shifted.data_ptr() % 64
    assert torch.equal(Int8(layout, parts, torch.bfloat16)(shifted), Int8(layout, parts, torch.bfloat16)(inputs(1, 64)))


def test_float16_activations_pass_through_bfloat16() -> None:
    layout, parts, _ = made(GridSpec(4, 32), 16, 64)
    x = inputs(3, 64)
    found = Int4(layout, parts, torch.float16)(x.half())
    assert found.dtype == torch.float16
    assert torch.equal(found.float(), Int4(layout, parts, torch.bfloat16)(x).float())


@pytest.mark.parametrize("kernel", [Int4, Decoded, Reference])
def test_the_branch_is_added(kernel: type[Int4 | Decoded | Reference]) -> None:
    """up (down x) by itself has two roundings more, of the inner product and of the sum."""
    layout, parts, grid = made(GridSpec(4, 32), 16, 64, rank=2)
    x = inputs(3, 64)
    exact, planes = exact_and_bound(x, grid)
    branch = x.double().sum(1, keepdim=True) * 2 / 32  # factors of 1/4 and 1/8, rank 2
    size = x.double().abs().sum(1, keepdim=True) * 2 / 32
    error = (kernel(layout, parts, torch.bfloat16)(x).double() - exact - branch).abs()
    assert bool((error <= 2.0**-8 * (3 * planes + 4 * size)).all())
    parts["low_rank_up"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="branch is not finite"):
        kernel(layout, parts, torch.bfloat16)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("spec", [None, GridSpec(3, 16, False), GridSpec(4, 16, kind="nf")], ids=str)
def test_the_reference_rounds_once_and_decoded_weights_are_plain(spec: GridSpec | None, dtype: torch.dtype) -> None:
    """Both against the weight in float64; `Decoded` rounds it to the dtype of activations."""
    layout = Layout(9, 48, torch.float32, spec, True)
    mask = two_of_four(9, 48, 1)
    weight: Tensor | Grid = torch.randn(9, 48, generator=torch.Generator().manual_seed(0)) * mask
    if spec is not None:
        weight = grid_of(spec, 9, 48, torch.float32, 0).zeroed(~mask)
    dense = weight.dequantize(torch.float32) if isinstance(weight, Grid) else weight
    parts = packed(layout, weight, mask)
    x = inputs(3, 48).to(dtype)
    exact, size = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
    once, rounded = ROUNDING[dtype], 48 * 2.0**-23
    error = (Reference(layout, parts, dtype)(x).double() - exact).abs()
    assert bool((error <= once * exact.abs() + rounded * size).all())
    decoded = Decoded(layout, parts, dtype)
    assert torch.equal(decoded.weight, dense.to(dtype))
    assert torch.equal(decoded(x), nn.functional.linear(x, dense.to(dtype)))


@pytest.mark.parametrize(
    ("kernel", "spec"), [(Int4, GridSpec(4, 32)), (Int4, GridSpec(8, 32)), (Int8, GridSpec(8, -1))], ids=str
)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_compilers_take_the_product_whole(kernel: type[Kernel], spec: GridSpec, rows: int) -> None:
    """One graph, few rows or many, exported for either; with the numbers of the kernel itself."""
    layout, parts, _ = made(spec, 70, 64, rank=2)  # rows of W that are filled up
    one, x = kernel(layout, parts, torch.float16), inputs(rows, 64).half()
    wanted = one(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(one, backend="aot_eager", fullgraph=True)(x), wanted)
    any_rows = {"x": {0: torch.export.Dim("rows", min=2)}}
    exported = torch.export.export(one, (inputs(9, 64).half(),), dynamic_shapes=any_rows).module()
    if rows > 1:
        assert torch.equal(exported(x), wanted)


def test_the_operators_are_what_torch_wants_of_one() -> None:
    for kernel, spec in ((Int4, GridSpec(8, 32)), (Int8, GridSpec(8, -1))):
        one, x = kernel(*made(spec, 70, 64)[:2], torch.bfloat16), inputs(3, 64)
        held = list(one.buffers())
        given = (held[0::2], held[1::2], 32, 70) if kernel is Int4 else tuple(held)
        torch.library.opcheck(cpu.int4_matmul if kernel is Int4 else cpu.int8_matmul, (x, *given))


OTHER_PROCESSOR = """
import torch
from compress.grid import Grid, GridSpec
from compress.kernels import cpu
from compress.kernels.pack import Layout, pack_part

codes = torch.arange(70 * 64).view(70, 64).remainder(13).to(torch.uint8)
grid = Grid(GridSpec(4, 32), torch.ones(70, 2), torch.full((70, 2), 8, dtype=torch.uint8), codes)
layout = Layout(70, 64, torch.float32, grid.spec)
parts = {suffix: pack_part(layout, suffix, grid, None, None) for suffix in layout.tensors()}
kernel, x = cpu.Int4(layout, parts, torch.bfloat16), torch.eye(64)[:9].bfloat16()
block, _ = cpu._block()
assert block == 32, block
by_operator = kernel(x)
cpu.INT4_ROWS = 4
assert torch.equal(kernel(x), by_operator)
assert torch.equal(by_operator.float(), codes[:, :9].T.float() - 8)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_order_of_the_operator_is_found_on_other_processors(capability: str) -> None:
    """Without AVX512, and without AVX2, rows are packed in blocks of 32, in two orders."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", OTHER_PROCESSOR]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the choice

NORMAL = GridSpec(4, 32, scale_dtype=torch.float32, kind="nf", second=ScaleSpec(8, 256, torch.float32))
CHOICES = [
    (GridSpec(4, 128), "cpu", torch.bfloat16, "int4", "codes of 4 bits, bfloat16"),
    (GridSpec(3, 96), "cpu", torch.float16, "int4", "3 bits as one of 4"),
    (GridSpec(8, 128), "cpu", torch.bfloat16, "int4", "8 bits as two of 4"),
    (GridSpec(8, -1), "cpu", torch.bfloat16, "int8", "codes of 8 bits"),
    (GridSpec(8, -1, False), "cpu", torch.bfloat16, "int4", "8 bits as two of 4"),
    (GridSpec(4, 128), "cpu", torch.float32, "decoded", "int8 and int4: computes in bfloat16, too coarse for float32"),
    (GridSpec(4, 48), "cpu", torch.bfloat16, "decoded", "int4: 32 does not divide groups of 48 columns"),
    (NORMAL, "cpu", torch.bfloat16, "decoded", "NormalFloat values are not evenly spaced"),
    (GridSpec(4, 128), "cuda", torch.bfloat16, "decoded", "triton-int4 and triton-portable: torch finds no GPU"),
    (None, "cpu", torch.bfloat16, "decoded", "decoded to bfloat16 at load (int8 and int4: there are no codes)"),
]


@pytest.mark.parametrize(("spec", "device", "dtype", "kernel", "why"), CHOICES)
def test_the_choice_says_why(spec: GridSpec | None, device: str, dtype: torch.dtype, kernel: str, why: str) -> None:
    layout = Layout(64, 768, torch.bfloat16, spec, spec is None)
    found = choose(layout, torch.device(device), dtype)
    assert found.kernel.name == kernel
    assert why in found.why
    assert choose(layout, torch.device(device), dtype, "reference").kernel is Reference
    assert choose(layout, torch.device(device), dtype, "decoded").kernel is Decoded


def test_a_plain_weight_needs_no_excuse() -> None:
    assert choose(Layout(8, 16, torch.bfloat16, rank=2), CPU, torch.bfloat16).why == "a plain weight"


def test_packed_weights_stay_where_they_are() -> None:
    """Another device or dtype would change the operator's operands: an error when it is asked for, not in a forward."""
    layout, parts, _ = made(GridSpec(4, 32), 16, 64)
    kernel = Int4(layout, parts, torch.bfloat16)
    with pytest.raises(RunError, match=r"packed for cpu and torch.bfloat16, not cpu and torch.float32"):
        kernel.float()
    with pytest.raises(RunError, match="not meta"):
        kernel.to("meta")
    kernel.to("cpu", torch.bfloat16)
    assert Decoded(layout, parts, torch.bfloat16).float().weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("kernel", "spec"),
    [
        (Int4, GridSpec(4, 32)),
        (Int8, GridSpec(8, -1)),
        (Reference, GridSpec(4, 32, scale_dtype=torch.float32)),
        (Reference, GridSpec(4, 32, kind="nf", second=ScaleSpec(8, 16, torch.float32))),
    ],
    ids=str,
)
def test_the_dtype_that_they_have_changes_nothing(kernel: type[Kernel], spec: GridSpec) -> None:
    """A model may be told to take the dtype that it has: operands of another one are not rounded to it."""
    layout, parts, _ = made(spec, 64, 64)
    x = inputs(3, 64).half()
    one = kernel(layout, parts, torch.float16)
    wanted, held = one(x), {name: buffer.clone() for name, buffer in one.named_buffers()}
    one.to(torch.float16)
    assert held
    assert all(same_bits(buffer, held[name]) for name, buffer in one.named_buffers())
    assert torch.equal(one(x), wanted)
