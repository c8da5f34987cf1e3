"""The portable kernels in Triton's interpreter: products and weights in float64, masks by hand, and who gets them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.grid import GridSpec
from compress.kernels import gpu
from compress.kernels.choose import choose
from compress.kernels.fragments import PACKED_ROWS, arrange_masks, arrange_zeros
from compress.kernels.gpu import TritonPortable, portable_matmul
from compress.kernels.pack import Layout

if torch.cuda.is_available():
    pytest.skip("kernels run: see test_cuda.py", allow_module_level=True)
pytest.importorskip("triton")
from compress.kernels import bench, multiply_portable
from tests.kernels.test_product import KINDS, two_of_four, weight_of


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([1, 3, 16, 17, 40, 70]),
    out=st.integers(1, 150),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 96, 128, -1]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_products_are_those_in_float64(
    kind: str, rows: int, out: int, groups: int, group: int, symmetric: bool, seed: int
) -> None:
    """In float16 (the interpreter's product of bfloat16 is wrong): sums of numbers below 32 · 1.1, and one rounding."""
    width = 40 * groups if group == -1 else group * groups
    weight, exact = weight_of(kind, out, width, torch.float16, seed, group, symmetric=symmetric, portable=True)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).half()
    found = multiply_portable.multiply(x, weight, out)
    wanted = x.double() @ exact.T
    assert found.dtype == torch.float16
    assert found.shape == wanted.shape
    summed = 36 * x.double().abs().sum(1, keepdim=True)
    allowed = 2**-11 * wanted.abs() + (width + 2) * 2**-23 * summed + 2**-12
    assert bool(((found.double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "width", "group", "symmetric"),
    [(40, 128, 32, False), (17, 192, 96, True), (9, 40, -1, False), (33, 384, 128, False), (20, 128, 64, False)],
)
def test_the_weight_is_decoded_to_what_the_grid_says(
    kind: str, dtype: torch.dtype, out: int, width: int, group: int, symmetric: bool
) -> None:
    """A product of a scale and a whole number below 16, rounded once; to bfloat16 the interpreter cuts off."""
    weight, exact = weight_of(kind, out, width, dtype, 1, group, symmetric=symmetric, portable=True)
    found = multiply_portable.weight(dtype, weight, out, width)
    if dtype is torch.float16 or kind == "sparse24":
        assert torch.equal(found, exact.to(dtype))
    else:
        assert bool(((found.double() - exact).abs() <= 2**-7 * exact.abs()).all())


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_multiplied_with_the_decoded_weight(kind: str) -> None:
    rows, out, width = PACKED_ROWS + 1, 24, 64
    weight, exact = weight_of(kind, out, width, torch.float16, 2, 32, portable=True)
    x = torch.randn(rows, width).half()
    found = multiply_portable.multiply(x, weight, out)
    wanted = x.double() @ exact.half().double().T
    assert float((found.double() - wanted).abs().max()) <= 2**-9 * float(wanted.abs().max())
    assert multiply_portable.multiply(x[:0], weight, out).shape == (0, out)


def test_masks_have_a_bit_for_each_column() -> None:
    """Row g, 16 columns h of block b of 32, four columns t of these, column p of four: by the text of `fragments`."""
    stored = two_of_four(16, 128, torch.Generator().manual_seed(0))
    masks = arrange_masks(stored, 0)
    assert masks.shape == (1, 1, 1, 32, 2)
    for row in range(16):
        for column in range(128):
            word = int(masks[0, 0, 0, 4 * (row % 8) + column // 4 % 4, column // 64])
            place = 2 * (column // 16 % 2) + row // 8
            bit = 16 * (column % 2) + 4 * place + 2 * (column // 32 % 2) + column // 2 % 2
            assert (word >> bit & 1) == int(stored[row, column])


def test_zero_points_are_in_all_places() -> None:
    zero = torch.arange(16, dtype=torch.uint8)[:, None]  # rows g and g + 8: g and g + 8
    words = arrange_zeros(zero)
    assert words.shape == (1, 1, 8)
    assert words.is_contiguous()
    assert int(words[0, 0, 3]) & 0xFFFFFFFF == 0xB3B3B3B3


@pytest.mark.parametrize("kind", [name for name in bench.KERNELS if name.startswith("portable")])
def test_the_operator_is_one_for_torch_compile(kind: str) -> None:
    """Its schema, and its shapes without data."""
    kernel, _, _ = bench.kernel_of(kind, bench.Case(24, 64, group=32, rank=16), torch.float16, "cpu")
    held = [kernel._buffers[name] for name in bench.PARTS]
    arguments = (torch.randn(2, 64).half(), *held, kernel.group, kernel.step, 24)
    torch.library.opcheck(portable_matmul, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("version", "hip", "reason"),
    [
        ("3.10.0", None, "its instructions were tested with Triton 3.6 to 3.9, not with 3.10.0"),
        ("3.6.0", "6.4", "made of instructions of NVIDIA's tensor cores"),
        ("3.9.1", None, None),
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_portable_where_instructions_are_not_proven(
    monkeypatch: pytest.MonkeyPatch, version: str, hip: str | None, reason: str | None, sparse: bool
) -> None:
    """And the explanation says why. By name it is taken anywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert gpu.unproven() == reason
    layout, device = Layout(32, 64, torch.float16, GridSpec(4, 32), sparse), torch.device("cuda")
    chosen = choose(layout, device, torch.float16)
    assert (chosen.kernel is TritonPortable) == (reason is not None)
    assert (reason or "codes of 4 bits") in chosen.why
    assert ("expanded in registers" in chosen.why) == (sparse and reason is not None)
    assert choose(layout, device, torch.float16, "portable").kernel is TritonPortable


def test_what_it_cannot_multiply() -> None:
    values = Layout(32, 64, torch.float16, None, True)
    assert TritonPortable.unfit(values, torch.float16) is None
    assert "not in float32" in (TritonPortable.unfit(values, torch.float32) or "")
    plain = Layout(32, 64, torch.float16)
    assert "at most 4 bits" in (TritonPortable.unfit(plain, torch.float16) or "")
