"""The packed format against Python integers, exact sizes, products in float64, and what it refuses."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.grid import Grid, GridSpec, ScaleCodes, ScaleSpec
from compress.kernels.pack import (
    Layout,
    linear,
    pack_part,
    pack_positions,
    unpack_branch,
    unpack_grid,
    unpack_positions,
    unpack_weight,
)
from compress.state import LowRank
from tests.conftest import same_bits

if TYPE_CHECKING:
    from torch import Tensor

quick = settings(max_examples=60, deadline=None)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def mask_of(rows: list[list[int]]) -> Tensor:
    """Each number is what is kept of four columns, as bits."""
    return torch.tensor([[bool(kept >> p & 1) for kept in row for p in range(4)] for row in rows])


AT_MOST_TWO = [kept for kept in range(16) if kept.bit_count() <= 2]


@quick
@given(st.integers(1, 4), st.integers(1, 9), st.data())
def test_positions_are_the_kept_columns_filled_up_with_the_first_others(
    out: int, groups: int, data: st.DataObject
) -> None:
    row = st.lists(st.sampled_from(AT_MOST_TWO), min_size=groups, max_size=groups)
    rows = data.draw(st.lists(row, min_size=out, max_size=out))
    packed = pack_positions(mask_of(rows))
    assert packed.shape == (out, -(-groups // 2))
    assert packed.dtype == torch.uint8
    stored = unpack_positions(packed, 4 * groups)
    for number, kepts in enumerate(rows):
        nibbles = []
        for kept in kepts:
            some = [p for p in range(4) if kept >> p & 1]
            pair = sorted([*some, *(p for p in range(4) if p not in some)][:2])
            nibbles.append(pair[0] + 4 * pair[1])
        whole = sum(nibble << (4 * i) for i, nibble in enumerate(nibbles))
        assert list(whole.to_bytes(packed.shape[1], "little")) == packed[number].tolist()
        for group, kept in enumerate(kepts):
            found = stored[number, 4 * group : 4 * group + 4].tolist()
            assert sum(found) == 2
            assert all(found[p] for p in range(4) if kept >> p & 1)


def test_three_of_four_are_refused_with_their_place() -> None:
    mask = mask_of([[3, 5], [12, 7]])
    with pytest.raises(ValueError, match="row 1 keeps more than two of the columns 4 to 7"):
        pack_positions(mask)
    with pytest.raises(ValueError, match="4 does not divide the width 6"):
        pack_positions(mask[:, :6])


@pytest.mark.parametrize("nibble", [first + 4 * second for first in range(4) for second in range(4)])
def test_pairs_that_do_not_ascend_are_refused(nibble: int) -> None:
    packed = torch.tensor([[0x44, 0x4 + 16 * nibble]], dtype=torch.uint8)  # the pair is that of the last columns
    if (nibble & 3, nibble >> 2) in combinations(range(4), 2):
        assert unpack_positions(packed, 16)[0, 12:].nonzero().flatten().tolist() == [nibble & 3, nibble >> 2]
        return
    with pytest.raises(ValueError, match=f"row 0, columns 12 to 15: {nibble & 3} and {nibble >> 2} do not ascend"):
        unpack_positions(packed, 16)


def test_a_nibble_beyond_the_width_is_refused() -> None:
    assert unpack_positions(torch.tensor([[0x04]], dtype=torch.uint8), 4).tolist() == [[True, True, False, False]]
    with pytest.raises(ValueError, match="beyond the width"):
        unpack_positions(torch.tensor([[0x44]], dtype=torch.uint8), 4)


# ---------------------------------------------------------------- linears


def two_of_four(out: int, width: int, seed: int, *, exact: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(out, width // 4, 4, generator=generator).argsort(-1)
    mask = (places < 2).view(out, width)
    return mask if exact else mask & (torch.rand(out, width, generator=generator) < 0.7)


def grid_of(spec: GridSpec, out: int, width: int, dtype: torch.dtype, seed: int) -> Grid:
    generator = torch.Generator().manual_seed(seed)
    shape = out, spec.groups(width)
    zero = torch.randint(0, spec.largest + 1, shape, generator=generator, dtype=torch.uint8)
    zero = torch.full_like(zero, spec.middle) if spec.symmetric else zero
    codes = torch.randint(0, spec.largest + 1, (out, width), generator=generator, dtype=torch.uint8)
    scale, second = torch.rand(shape, generator=generator).add(0.1).to(spec.scale_dtype or dtype), None
    if spec.second:
        bits, group, peak = spec.second
        of_scales = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
        peaks = torch.rand(-(-of_scales.numel() // group), generator=generator).to(peak)
        second = ScaleCodes(bits, group, of_scales, peaks, torch.tensor(0.25))
        scale = second.scale()
    return Grid(spec, scale, zero, codes, second)


def packed(
    layout: Layout, weight: Tensor | Grid, mask: Tensor | None, branch: LowRank | None = None
) -> dict[str, Tensor]:
    """Every tensor, whose dtypes and shapes must be those of the layout."""
    parts = {suffix: pack_part(layout, suffix, weight, mask, branch) for suffix in layout.tensors()}
    layout.check({suffix: (part.dtype, tuple(part.shape)) for suffix, part in parts.items()})
    assert all(part.is_contiguous() for part in parts.values())
    return parts


SPECS = [
    None,
    *(GridSpec(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (-1, 16) for symmetric in (True, False)),
    GridSpec(4, 16, scale_dtype=torch.float32),
    *(
        GridSpec(bits, 16, scale_dtype=torch.float32, kind="nf", second=ScaleSpec(b, 7, peak))
        for bits in (2, 3, 4, 8)
        for b, peak in ((8, torch.float32), (4, torch.bfloat16), (3, torch.float16))
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_come_back_and_multiply(spec: GridSpec | None, sparse: bool, dtype: torch.dtype) -> None:
    """Bit for bit, with negative weights and zeros among the kept ones; the product is that in float64."""
    for out, width, rank in ((5, 16, 0), (9, 48, 3), (16, 112, 1)):
        mask = two_of_four(out, width, out, exact=width != 48) if sparse else None
        generator = torch.Generator().manual_seed(width)
        weight: Tensor | Grid = torch.randn(out, width, generator=generator).to(dtype)
        if spec is not None:
            weight = grid_of(spec, out, width, dtype, width)
        if isinstance(weight, Grid):
            weight = weight if mask is None else weight.zeroed(~mask)
            dense = weight.dequantize(dtype).to(dtype)
        else:
            weight[:, ::5] = 0.0  # kept, and 0
            weight = weight if mask is None else torch.where(mask, weight, torch.zeros((), dtype=dtype))
            dense = weight
        up, down = (torch.randn(*shape, generator=generator).to(dtype).float() for shape in ((out, 3), (3, width)))
        branch = LowRank(up[:, :rank], down[:rank]) if rank else None
        layout = Layout(out, width, dtype, spec, sparse, rank)
        parts = packed(layout, weight, mask, branch)
        assert same_bits(unpack_weight(layout, parts), dense)
        if isinstance(weight, Grid):
            again = unpack_grid(layout, parts)
            kinds = [getattr(again, kind) for kind in ("scale", "zero", "codes")]
            assert all(same_bits(a, getattr(weight, k)) for a, k in zip(kinds, ("scale", "zero", "codes"), strict=True))
        if sparse and width != 48:
            assert torch.equal(unpack_positions(parts["positions"], width), mask)
        x = torch.randn(2, 3, width, generator=generator).to(dtype)
        exact = x.double() @ dense.double().T
        if branch:
            exact = exact + x.double() @ down[:rank].double().T @ up[:, :rank].double().T
            found = unpack_branch(layout, parts)
            assert found is not None
            assert torch.equal(found.product(), branch.product())
        allowed = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-5 * (x.double().abs() @ dense.double().abs().T + 10)
        assert bool(((linear(x, layout, parts).double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("spec", "sparse", "bits"),
    [
        (None, True, 9),
        (GridSpec(4, 128), False, 4.125),
        (GridSpec(4, 128), True, 3.125),
        (GridSpec(3, 128), True, 2.625),
        (GridSpec(4, 128, symmetric=False), False, 4.125 + 4 / 128),
        (GridSpec(4, 64, scale_dtype=torch.float32, kind="nf", second=ScaleSpec(8, 256, torch.float32)), False, 4.127),
    ],
)
def test_bits_per_weight(spec: GridSpec | None, sparse: bool, bits: float) -> None:
    """9 for 2:4, 4.125 for 4 bits with scales in 16 for 128, and b(1/2) + 1 + … for both."""
    layout = Layout(1024, 1024, torch.float16, spec, sparse)
    size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.tensors().values())
    assert 8 * size / 1024**2 == pytest.approx(bits, abs=1e-4 if spec and spec.second else 0)


def test_the_mask_decides_not_the_values() -> None:
    """A kept 0 keeps its place, and a pruned place never gets one for what it would be worth."""
    mask = torch.tensor([[False, True, False, True]])
    parts = packed(Layout(1, 4, torch.float32, None, True), torch.tensor([[0.0, 0.0, 0.0, -3.0]]), mask)
    assert parts["positions"].tolist() == [[1 + 4 * 3]]
    assert parts["values"].tolist() == [[0.0, -3.0]]


@pytest.mark.parametrize(
    ("suffix", "value", "problem"),
    [
        ("scale", float("nan"), "scale is not positive"),
        ("scale", 0.0, "scale is not positive"),
        ("scale", -1.0, "scale is not positive"),
        ("low_rank_up", float("inf"), "branch is not finite"),
        ("low_rank_down", float("nan"), "branch is not finite"),
    ],
)
def test_impossible_values_are_refused(suffix: str, value: float, problem: str) -> None:
    layout = Layout(4, 16, torch.float32, GridSpec(4, 8), False, 2)
    branch = LowRank(torch.ones(4, 2), torch.ones(2, 16))
    parts = packed(layout, grid_of(GridSpec(4, 8), 4, 16, torch.float32, 0), None, branch)
    parts[suffix].view(-1)[-1] = value
    with pytest.raises(ValueError, match=problem):
        (unpack_branch if "rank" in suffix else unpack_weight)(layout, parts)


def test_values_and_peaks_must_be_finite() -> None:
    layout = Layout(2, 8, torch.float32, None, True)
    parts = packed(layout, torch.ones(2, 8), two_of_four(2, 8, 0))
    parts["values"][1, 1] = torch.inf
    with pytest.raises(ValueError, match="a value is not finite"):
        unpack_weight(layout, parts)
    spec = GridSpec(4, 8, scale_dtype=torch.float32, kind="nf", second=ScaleSpec(8, 2, torch.float32))
    layout = Layout(2, 8, torch.float32, spec)
    parts = packed(layout, grid_of(spec, 2, 8, torch.float32, 0), None)
    parts["scale_peaks"][0] = -1
    with pytest.raises(ValueError, match="a peak is negative"):
        unpack_weight(layout, parts)


def test_tensors_that_are_not_of_the_layout_are_named() -> None:
    layout = Layout(4, 16, torch.float16, GridSpec(4, 8))
    shapes = layout.tensors()
    layout.check(shapes)
    with pytest.raises(ValueError, match="positions is surplus"):
        layout.check(shapes | {"positions": (torch.uint8, (4, 2))})
    with pytest.raises(ValueError, match="scale is missing"):
        layout.check({suffix: one for suffix, one in shapes.items() if suffix != "scale"})
    with pytest.raises(ValueError, match=r"codes is torch.int32 \[4, 3\], not torch.int32 \[4, 2\]"):
        layout.check(shapes | {"codes": (torch.int32, (4, 3))})
