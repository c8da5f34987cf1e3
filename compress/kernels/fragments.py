"""Packed weights in the order of the tensor cores' fragments: what `compress.kernels.product` reads, made at load.

Rows are cut into tiles of 16, filled up; columns into steps, filled up with zeros. A lane (g, t) of a warp, g = lane //
4 and t = lane % 4, works on the rows g and g + 8 of a tile. What of x it is multiplied with comes in columns that suit
the loads: of 32 columns of a dense W it has 8 t to 8 t + 7; those of 2:4 are where they were.

    words        (tiles, …, 32, 4) int32    codes of 4 bits, eight in a word; or pairs of the values of 2:4
    positions    (tiles, …, 32, 2) int32    as the instruction for 2:4 takes them
    scale        (groups, tiles, 8) int32    a pair of scales, of the rows g and g + 8
    offset       (groups, tiles, 8) int32    what is added to their codes (`instructions.decode`); None where zero is 8
    up           (tiles, rank/16, 32, 4) int32    the branch's left factor, in pairs

`compress.kernels.portable` reads the same words and scales, but for positions and offsets it wants

    masks        (tiles, …, 32, 2) int32    a bit for each column of 2:4, whether it was kept
    zeros        (groups, tiles, 8) int32    the zero-points of the rows g and g + 8 in all places of a word

Of a word, bits 4 i and 16 + 4 i are pair i: 0 is of row g, 1 of row g + 8, 2 and 3 of these rows and further columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from compress.grid import Grid, GridSpec
from compress.kernels.pack import pack_positions

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 16
LANES = 32
# More rows of x than these are multiplied faster by cuBLAS and a decoded weight, on an H200
# (benchmarks/results/gpu-h200.json)
PACKED_ROWS = 128
GROUPS = (128, 64, 32)  # columns of a scale in the kernels


class Fragments(NamedTuple):
    """A packed weight as the module's docstring says.

    Attributes:
        group: columns that share a scale, 32, 64 or 128; 0 without codes.
        step: columns of a step: 128, or 64 for smaller groups of a dense weight.
    """

    words: Tensor
    positions: Tensor | None
    scale: Tensor | None
    offset: Tensor | None
    group: int
    step: int

    @property
    def tiles(self) -> int:
        """Of 16 rows."""
        return self.words.shape[0]

    @property
    def columns(self) -> int:
        """Filled up."""
        of_word = 16 if self.positions is None else 32 if self.scale is not None else 8  # of a lane
        return self.words[0].numel() // LANES * of_word


def refusal(spec: GridSpec | None, in_features: int, *, sparse: bool) -> str | None:
    """Why such a linear cannot be arranged; None when it can."""
    if spec is None:
        return None if sparse else "there are no integer codes of at most 4 bits"
    if spec.kind != "int" or spec.bits > 4:
        return "there are no integer codes of at most 4 bits"
    width = spec.group_size
    return f"32 does not divide groups of {width} columns" if width != -1 and width % 32 else None


def arrange_grid(grid: Grid, dtype: torch.dtype, stored: Tensor | None = None, *, portable: bool = False) -> Fragments:
    """A grid of at most 4 bits.

    Args:
        grid: of integers.
        dtype: float16 or bfloat16, of scales and of arithmetic.
        stored: (out, in) bool, two of every four columns: the others hold the code of 0 and are left out.
        portable: whether `compress.kernels.portable` will read it.

    Raises:
        ValueError: the grid is of another kind, or its groups cannot be arranged.
    """
    problem = refusal(grid.spec, grid.codes.shape[1], sparse=stored is not None)
    if problem:
        raise ValueError(problem)
    grid = as_four_bits(grid)
    width = grid.codes.shape[1]
    cut = 128 if grid.spec.group_size == -1 else grid.spec.group_size
    group = next(size for size in GROUPS if cut % size == 0)  # a row, and what is no such group, is cut into these
    step = max(group, 64 if stored is None else 128)
    groups = -(-width // step) * (step // group)
    again = -(-grid.spec.width(width) // group)
    scale, zero = (part.repeat_interleave(again, 1) for part in (grid.scale, grid.zero))
    fill = groups - scale.shape[1]
    scale, zero = filled(scale.to(dtype), fill), filled(zero, fill)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"a scale is too large for {str(dtype).removeprefix('torch.')}")
    offset = None
    if not grid.spec.symmetric and bool((grid.zero != 8).any()):
        base = torch.full((ROWS, 1), 128 if dtype is torch.bfloat16 else 1024)
        base[8:] = 128 if dtype is torch.bfloat16 else 64
        offset = pairs(-(zero.float() + base.to(zero.device).repeat(zero.shape[0] // ROWS, 1)).to(dtype))
        offset = arrange_zeros(zero) if portable else offset
    columns = -width % step
    if stored is None:
        return Fragments(_dense(filled(grid.codes, columns)), None, pairs(scale), offset, group, step)
    kept = grid.codes[stored].view(grid.codes.shape[0], -1)
    words = _sparse(filled(kept, columns // 2))
    where = (arrange_masks if portable else arrange_positions)(stored, columns)
    return Fragments(words, where, pairs(scale), offset, group, step)


def arrange_values(values: Tensor, stored: Tensor, *, portable: bool = False) -> Fragments:
    """2:4 without codes: values (out, in/2) float16 or bfloat16, and which columns (out, in) they are of."""
    columns = -stored.shape[1] % 128
    parts = _tiled(filled(values, columns // 2), 4, 2, 4, 2)
    # (tile, half, g, step, 32 columns, column half, t, pair) → (tile, step, 32 columns, g, t, column half, half, pair)
    words = parts.permute(0, 3, 4, 2, 6, 5, 1, 7).contiguous().view(torch.int32)
    where = (arrange_masks if portable else arrange_positions)(stored, columns)
    return Fragments(words.view(*words.shape[:3], LANES, 4), where, None, None, 0, 128)


def arrange_positions(stored: Tensor, fill: int) -> Tensor:
    """Which columns (out, in) of a 2:4 weight are stored, with so many more where the first two are."""
    packed = pack_positions(_whole(stored, fill))
    four = torch.stack((packed & 15, packed >> 4), -1).flatten(1)  # (out, in/4): the same four bits
    # (tile, half, g, step, 64 columns, 32 columns, 16 columns, four) → tile, step, g, 32, 16, 64 columns; half, four
    parts = _tiled(four, 2, 2, 2, 4).permute(0, 3, 2, 5, 6, 4, 1, 7)
    return _words(parts.flatten(-2), 4 * torch.arange(8)).view(*parts.shape[:2], 1, LANES, 2)


def arrange_masks(stored: Tensor, fill: int) -> Tensor:
    """The same as a bit for each column: a word has those of a lane's rows g and g + 8 in 64 columns."""
    # (tile, half, g, step, 64 columns, 32 columns, 16 columns, t, column half, pair)
    parts = _tiled(_whole(stored, fill), 2, 2, 2, 4, 2, 2).permute(0, 3, 2, 7, 4, 9, 6, 1, 5, 8)
    shifts = [16 * pair + 4 * place + bit for pair in range(2) for place in range(4) for bit in range(4)]
    return _words(parts.flatten(-5), torch.tensor(shifts)).view(*parts.shape[:2], 1, LANES, 2)


def arrange_zeros(zero: Tensor) -> Tensor:
    """Zero-points (rows, groups) below 16 → (groups, tiles, 8) words with those of g and g + 8 by turns, four times."""
    two = _tiled(zero.int()).permute(3, 0, 2, 1)
    return ((two[..., 0] | two[..., 1] << 4) * 0x01010101).contiguous()


def _whole(stored: Tensor, fill: int) -> Tensor:
    first = torch.tensor([True, True, False, False], device=stored.device).repeat(fill // 4)
    rows = -stored.shape[0] % ROWS
    whole = torch.cat((stored, first.expand(len(stored), -1)), 1)
    return torch.cat((whole, whole[:1].expand(rows, -1)))


def arrange_up(up: Tensor) -> Tensor:
    """The factor up (out, r), r a multiple of 16, of a branch."""
    parts = _tiled(filled(up, 0), 4, 2, 2)  # … rank/16, t, column half, pair
    words = parts.permute(0, 3, 2, 4, 5, 1, 6).contiguous().view(torch.int32)
    return words.view(*words.shape[:2], LANES, 4)


def restore_up(up: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `arrange_up`, its rows filled up."""
    parts = up.view(dtype).view(*up.shape[:2], 8, 4, 2, 2, 2)  # tile, rank/16, g, t, column half, half, pair
    return parts.permute(0, 5, 2, 1, 3, 4, 6).flatten(0, 2).flatten(1)


def as_four_bits(grid: Grid) -> Grid:
    """The same weights on a grid of 4 bits: fewer bits around any zero-point become code − zero + 8, exactly."""
    if grid.spec.bits == 4:
        return grid
    spec = GridSpec(4, grid.spec.group_size, scale_dtype=grid.spec.scale_dtype)
    codes = (grid.codes.int() - grid.spread(grid.zero).int() + 8).to(torch.uint8)
    return Grid(spec, grid.scale, torch.full_like(grid.zero, 8), codes)


def filled(matrix: Tensor, columns: int) -> Tensor:
    """With so many more columns, and rows up to whole tiles, all 0."""
    return pad(matrix, (0, columns, 0, -matrix.shape[0] % ROWS))


def pairs(matrix: Tensor) -> Tensor:
    """Values (rows, groups) of 16 bits → (groups, tiles, 8) int32, of the rows g and g + 8 of a tile."""
    parts = _tiled(matrix).permute(3, 0, 2, 1)
    return parts.contiguous().view(torch.int32).squeeze(-1)


def _tiled(matrix: Tensor, *within: int) -> Tensor:
    """(rows, columns) → (tile, half, g, part, *within), a part that many columns."""
    return matrix.reshape(matrix.shape[0] // ROWS, 2, 8, -1, *within)


def _dense(codes: Tensor) -> Tensor:
    # (tile, half, g, 64 columns, 32 columns, t, 4 columns, column half, pair)
    parts = _tiled(codes, 2, 4, 2, 2, 2)
    parts = parts.permute(
        0, 3, 2, 5, 4, 6, 7, 1, 8
    )  # tile, 64 columns, g, t, 32 columns, 4 columns; column half, half, pair
    return _codes(parts)


def _sparse(codes: Tensor) -> Tensor:
    # (tile, half, g, step, 32 columns, column half, t, pair)
    parts = _tiled(codes, 4, 2, 4, 2)
    return _codes(parts.permute(0, 3, 2, 6, 4, 5, 1, 7))  # tile, step, g, t, 32 columns; column half, half, pair


def _codes(parts: Tensor) -> Tensor:
    """(tile, part, g, t, … word; column half, half, pair) → (tile, part, 32, 4)."""
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28])  # column half, half, pair
    return _words(parts.flatten(-3), shifts).view(*parts.shape[:2], LANES, 4)


def _words(parts: Tensor, shifts: Tensor) -> Tensor:
    """The numbers of the last dimension, each shifted, as one int32."""
    word = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=parts.device)
    for number, shift in enumerate(shifts.tolist()):
        word |= parts[..., number].int() << shift
    return word
