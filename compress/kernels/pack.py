"""The packed format in plain torch: what is stored of a linear, and the truth for every kernel.

A linear (out, in) is stored as those of these tensors that its `Layout` has:

    weight        (out, in)                the weight, where there is neither a grid nor 2:4
    values        (out, in/2)              2:4 without a grid: the two kept weights of every four columns
    positions     (out, ⌈in/8⌉) uint8      2:4: where these two are, 2 bits each, a nibble per four columns
    codes         (out, ⌈n·b/32⌉) int32    a grid of b bits: codes along each row, n = in of them, or in/2 with 2:4
    scale         (out, groups)            of the grid
    zero          (out, ⌈groups·b/32⌉) int32    its zero-points, where it is asymmetric
    scale_codes   (out, ⌈groups·b₁/32⌉) int32   in place of `scale`, scales as codes of b₁ bits (double quantization)
    scale_peaks   (⌈out·groups/B₁⌉,)       for these: a peak per B₁ scales, row after row
    scale_offset  () float32               and the smallest scale
    low_rank_up   (out, r), low_rank_down (r, in)   the branch, y = W x + up (down x)

Streams are those of `compress.export.bitstream`. Of four columns the two positions are p₀ < p₁, in the bits p₀ + 4 p₁;
the first four columns are the low nibble of a byte, and the nibble that a width leaves over is 0. What a mask leaves of
four columns may be less than two; then pruned columns fill up, the first ones first, with the value 0 or its code.

2:4 in 16 bits takes 9 bits a weight, 4 bits in groups of 128 with scales in 16 take 4.125, both together 3.125.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from compress.export.bitstream import pack, unpack, words
from compress.grid import Grid, GridSpec, ScaleCodes
from compress.state import LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

SUFFIXES = (
    "weight",
    "values",
    "positions",
    "codes",
    "scale",
    "zero",
    "scale_codes",
    "scale_peaks",
    "scale_offset",
    "low_rank_up",
    "low_rank_down",
)


@dataclass(frozen=True)
class Layout:
    """How a linear (out_features, in_features) is stored.

    Attributes:
        dtype: of the weight that it stands for, of values and of the branch.
        grid: the grid of its codes; None without one. Its `scale_dtype` None is `dtype`.
        sparse: whether only two of every four columns of a row are stored.
        rank: of the branch; 0 for none.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    grid: GridSpec | None = None
    sparse: bool = False
    rank: int = 0

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix → dtype and shape of each tensor."""
        out, width = self.out_features, self.in_features
        stored = width // 2 if self.sparse else width
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.grid is None:
            found["values" if self.sparse else "weight"] = self.dtype, (out, stored)
        else:
            found["codes"] = torch.int32, (out, words(stored, self.grid.bits))
            found |= self._scales(self.grid)
        if self.sparse:
            found["positions"] = torch.uint8, (out, -(-width // 8))
        if self.rank:
            found["low_rank_up"] = self.dtype, (out, self.rank)
            found["low_rank_down"] = self.dtype, (self.rank, width)
        return found

    def _scales(self, spec: GridSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        out, groups = self.out_features, spec.groups(self.in_features)
        if spec.second is not None:
            bits, group, dtype = spec.second
            return {
                "scale_codes": (torch.int32, (out, words(groups, bits))),
                "scale_peaks": (dtype, (-(-out * groups // group),)),
                "scale_offset": (torch.float32, ()),
            }
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        found["scale"] = spec.scale_dtype or self.dtype, (out, groups)
        if not spec.symmetric:
            found["zero"] = torch.int32, (out, words(groups, spec.bits))
        return found

    def check(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Raise ValueError unless tensors of these dtypes and shapes are those of the layout."""
        wanted = self.tensors()
        odd = sorted(shapes.keys() ^ wanted.keys())
        if odd:
            raise ValueError(f"{odd[0]} is {'surplus' if odd[0] in shapes else 'missing'}")
        for suffix, found in shapes.items():
            if found != wanted[suffix]:
                (dtype, shape), (other, other_shape) = found, wanted[suffix]
                raise ValueError(f"{suffix} is {dtype} {list(shape)}, not {other} {list(other_shape)}")


# ---------------------------------------------------------------- 2:4

PAIRS = tuple(combinations(range(4), 2))  # the six pairs of positions


@cache
def _nibbles() -> tuple[Tensor, Tensor]:
    """(16,) uint8: kept columns as bits → positions, and positions → columns as bits; 255 where there are none."""
    chosen = torch.full((16,), 255, dtype=torch.uint8, device="cpu")
    columns = torch.full((16,), 255, dtype=torch.uint8, device="cpu")
    for kept in range(16):
        some = [p for p in range(4) if kept >> p & 1]
        if len(some) <= 2:
            fill = [p for p in range(4) if p not in some][: 2 - len(some)]
            first, second = sorted(some + fill)
            chosen[kept] = first + 4 * second
    for first, second in PAIRS:
        columns[first + 4 * second] = (1 << first) + (1 << second)
    return chosen, columns


def pack_positions(mask: Tensor) -> Tensor:
    """The positions (out, ⌈in/8⌉) uint8 of a mask (out, in), True = kept.

    Raises ValueError where more than two of four columns are kept, or 4 does not divide the width.
    """
    if mask.shape[1] % 4:
        raise ValueError(f"4 does not divide the width {mask.shape[1]}")
    bits = 2 ** torch.arange(4, dtype=torch.uint8, device=mask.device)
    kept = (mask.view(mask.shape[0], -1, 4) * bits).sum(-1, dtype=torch.uint8)  # (out, in/4)
    nibbles = _nibbles()[0].to(mask.device)[kept.long()]
    wrong = (nibbles == 255).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise ValueError(f"row {row} keeps more than two of the columns {4 * group} to {4 * group + 3}")
    nibbles = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_positions(positions: Tensor, in_features: int) -> Tensor:
    """The columns (out, in) bool that are stored: exactly two of every four. Raises ValueError for impossible pairs."""
    nibbles = torch.stack((positions & 15, positions >> 4), -1).flatten(1)  # (out, 2 ⌈in/8⌉)
    groups = in_features // 4
    if bool((nibbles[:, groups:] != 0).any()):
        raise ValueError("positions: the nibble beyond the width is not 0")
    bits = _nibbles()[1].to(positions.device)[nibbles[:, :groups].long()]
    wrong = (bits == 255).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        first, second = int(nibbles[row, group]) & 3, int(nibbles[row, group]) >> 2
        where = f"positions: row {row}, columns {4 * group} to {4 * group + 3}"
        raise ValueError(f"{where}: {first} and {second} do not ascend")
    shifts = torch.arange(4, dtype=torch.uint8, device=positions.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1).bool()


def compact(dense: Tensor, stored: Tensor) -> Tensor:
    """(out, in) → (out, in/2): what lies where `stored`, two of every four columns, is True."""
    return dense[stored].view(dense.shape[0], -1)


def expand(values: Tensor, stored: Tensor, elsewhere: Tensor) -> Tensor:
    """The inverse of `compact`, with what `elsewhere` (out, in) has in the other columns."""
    dense = elsewhere.clone()
    dense[stored] = values.flatten()
    return dense


# ---------------------------------------------------------------- linears


def pack_part(
    layout: Layout, suffix: str, weight: Tensor | Grid, mask: Tensor | None, branch: LowRank | None
) -> Tensor:
    """One tensor of a linear.

    Args:
        layout: of the linear.
        suffix: which tensor.
        weight: (out, in), 0 where pruned; or the grid, with the code of 0 there.
        mask: (out, in), True = kept; it decides the positions, never a value.
        branch: of rank `layout.rank`.

    Raises:
        ValueError: the mask keeps more than two of four columns.
    """
    if branch is not None and suffix in ("low_rank_up", "low_rank_down"):
        factor = branch.up if suffix == "low_rank_up" else branch.down
        return factor.to(layout.dtype).contiguous()
    if suffix == "positions":
        assert mask is not None
        return pack_positions(mask)
    if isinstance(weight, Grid) and suffix not in ("codes", "values", "weight"):
        return _pack_scale(weight, suffix)
    whole = weight.codes if isinstance(weight, Grid) else weight.to(layout.dtype)
    if layout.sparse:
        assert mask is not None
        whole = compact(whole, unpack_positions(pack_positions(mask), layout.in_features))
    return pack(whole, weight.spec.bits) if isinstance(weight, Grid) else whole.contiguous()


def _pack_scale(grid: Grid, suffix: str) -> Tensor:
    if suffix == "scale":
        return grid.scale.contiguous()
    if suffix == "zero":
        return pack(grid.zero, grid.spec.bits)
    assert grid.second is not None
    if suffix == "scale_codes":
        return pack(grid.second.codes, grid.second.bits)
    return grid.second.peaks if suffix == "scale_peaks" else grid.second.offset


def unpack_grid(layout: Layout, parts: Mapping[str, Tensor]) -> Grid:
    """The grid of a linear; columns that are not stored have the code of 0. Raises ValueError for what it cannot be."""
    spec = layout.grid
    assert spec is not None
    out, groups = layout.out_features, spec.groups(layout.in_features)
    second = None
    if spec.second is not None:
        codes = unpack(parts["scale_codes"], spec.second.bits, groups)
        peaks, offset = parts["scale_peaks"], parts["scale_offset"]
        if not bool(torch.isfinite(peaks).all()) or bool((peaks < 0).any()):
            raise ValueError("scale_peaks: a peak is negative or not finite")
        second = ScaleCodes(spec.second.bits, spec.second.group, codes, peaks, offset)
    scale = parts["scale"] if second is None else second.scale()
    check_scale(scale)
    if spec.symmetric:
        zero = torch.full((out, groups), spec.middle, dtype=torch.uint8, device=scale.device)
    else:
        zero = unpack(parts["zero"], spec.bits, groups)
    codes = unpack(parts["codes"], spec.bits, layout.in_features // 2 if layout.sparse else layout.in_features)
    if layout.sparse:
        stored = unpack_positions(parts["positions"], layout.in_features)
        codes = expand(codes, stored, zero.repeat_interleave(layout.in_features // groups, dim=1))
    return Grid(spec, scale, zero, codes, second)


def check_scale(scale: Tensor) -> None:
    """Raise ValueError for scales that no grid has."""
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError("a scale is not positive and finite")


def unpack_weight(layout: Layout, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight (out, in) beside the branch, in the layout's dtype. Raises ValueError for what it cannot be."""
    if layout.grid is not None:
        return unpack_grid(layout, parts).dequantize(layout.dtype).to(layout.dtype)
    weight = parts["values" if layout.sparse else "weight"]
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("a value is not finite")
    if not layout.sparse:
        return weight
    stored = unpack_positions(parts["positions"], layout.in_features)
    return expand(weight, stored, torch.zeros(stored.shape, dtype=weight.dtype, device=weight.device))


def unpack_branch(layout: Layout, parts: Mapping[str, Tensor]) -> LowRank | None:
    """The branch in float32; None without one. Raises ValueError for factors that are not finite."""
    if not layout.rank:
        return None
    branch = LowRank(parts["low_rank_up"].float(), parts["low_rank_down"].float())
    if not bool(torch.isfinite(branch.up).all()) or not bool(torch.isfinite(branch.down).all()):
        raise ValueError("a value of the branch is not finite")
    return branch


def linear(x: Tensor, layout: Layout, parts: Mapping[str, Tensor]) -> Tensor:
    """``x Wᵀ + (x downᵀ) upᵀ`` for x (…, in), accumulated in float32 and rounded to the dtype of x: the reference."""
    y = x.float() @ unpack_weight(layout, parts).float().T
    branch = unpack_branch(layout, parts)
    if branch is not None:
        y += (x.float() @ branch.down.T) @ branch.up.T
    return y.to(x.dtype)
