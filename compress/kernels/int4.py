"""W4A16 in Triton: y = x Wᵀ for codes of 4 bits with a scale per group of columns, x and y in float16 or bfloat16.

The tile of W is the first operand of the tensor core instruction and goes from memory to its registers without a detour
through shared memory: `shuffle` lays codes out in the order of the fragments of ``mma.m16n8k16``, eight codes of a
lane in one word. A word is rotated so that four masks and three rotations leave pairs of codes where the mantissa of
16.0 has its highest bits: or-ed with it they are the pairs of numbers 16 + code, exactly. A second product with the
constant −(16 + zero) takes that back in the float32 accumulator:

    y_mn = Σ_g s_ng (Σ_k (16 + c_nk) x_mk − (16 + z_ng) Σ_k x_mk)  + Σ_r up_nr dx_mr

The last sum is a branch's, dx = x downᵀ. Few rows of x split the columns among `splits` programs, whose parts are added
in a fixed order, so that the same input gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from compress.grid import Grid

ROWS = 128  # rows of W are filled up to whole blocks of so many
LANES = 32
# 16.0 twice, the lowest bit of a code in its mantissa, and the mask of two codes there
MAGIC = {torch.float16: (0x4C004C00, 6), torch.bfloat16: (0x41804180, 3)}


class Shuffled(NamedTuple):
    """A grid in the order of the kernel.

    Attributes:
        words: (rows/16, steps, 32, tiles) int32; a step is 16 · tiles columns.
        scale: (groups, rows) float16 or bfloat16.
        offset: (groups, rows), −(16 + zero), like scale.
        group: columns that share a scale, filled up to whole steps.
        tiles: 16-column tiles of a step: 4, or 2 where a group is no multiple of 64.
    """

    words: Tensor
    scale: Tensor
    offset: Tensor
    group: int
    tiles: int


def refusal(out_features: int, in_features: int, group_size: int) -> str | None:
    """Why groups of so many columns (−1: a row) cannot be multiplied; None when they can."""
    width = in_features if group_size == -1 else group_size
    if group_size != -1 and width % 32:
        return f"32 does not divide groups of {width} columns"
    return None


def shuffle(grid: Grid, dtype: torch.dtype) -> Shuffled:
    """The codes, scales and zero-points of a grid of 4 bits, as the kernel reads them. Raises ValueError for another."""
    spec, codes = grid.spec, grid.codes
    out, width = codes.shape
    if spec.kind != "int" or spec.bits != 4 or refusal(out, width, spec.group_size):
        raise ValueError(refusal(out, width, spec.group_size) or f"codes of {spec.bits} bits ({spec.kind})")
    scale, zero = grid.scale, grid.zero
    group = width
    if spec.group_size == -1:  # a row is cut into groups of one scale, the last one filled up
        group = 128 if width % 128 == 0 else 64
        fill = -width % group
        codes = torch.cat((codes, zero.expand(out, fill)), 1) if fill else codes
        count = codes.shape[1] // group
        scale, zero = scale.expand(out, count), zero.expand(out, count)
    else:
        group = spec.group_size
    tiles = 4 if group % 64 == 0 else 2
    fill = -out % ROWS
    codes = torch.nn.functional.pad(codes, (0, 0, 0, fill))
    scale, zero = (torch.nn.functional.pad(one, (0, 0, 0, fill)) for one in (scale.to(dtype), zero))
    offset = -(16 + zero.float())
    words = _words(codes, tiles, MAGIC[dtype][1])
    return Shuffled(words, scale.T.contiguous(), offset.to(dtype).T.contiguous(), group, tiles)


def _words(codes: Tensor, tiles: int, lowest: int) -> Tensor:
    """Codes (rows, columns) as rotated words in the order of fragments."""
    rows, columns = codes.shape
    # Of a tile of 16 × 16, lane 4 g + t holds the rows g and g + 8 and the columns 2 t, 2 t + 1 and those plus 8:
    # (rows/16, row half, g, steps, tiles, column half, t, pair)
    parts = codes.view(rows // 16, 2, 8, columns // (16 * tiles), tiles, 2, 4, 2)
    parts = parts.permute(0, 3, 2, 6, 4, 5, 1, 7)  # … g, t, tiles, column half, row half, pair
    parts = parts.reshape(rows // 16, -1, LANES, tiles, 4, 2).long()
    word = torch.zeros(parts.shape[:-2], dtype=torch.int64, device=codes.device)
    for number in range(4):
        word |= parts[..., number, 0] << (4 * number) | parts[..., number, 1] << (16 + 4 * number)
    word = (word << lowest | word >> (32 - lowest)) & 0xFFFFFFFF
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32).contiguous()


@triton.jit
def _rotated(words, by: tl.constexpr):
    unsigned = words.to(tl.uint32, bitcast=True)
    return ((unsigned >> by) | (unsigned << (32 - by))).to(tl.int32, bitcast=True)


@triton.jit
def _pair(words, mask: tl.constexpr, magic, HALF: tl.constexpr):
    """Two numbers 16 + code of each word, as its halves: (…) → (…, 2)."""
    both = (words & mask) | magic
    low = both.to(tl.int16).to(HALF, bitcast=True)
    high = (both >> 16).to(tl.int16).to(HALF, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _unpacked(words, magic, HALF: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr):
    """Words (BN/16, 32, TILES) → numbers 16 + code (BN, 16 TILES)."""
    mask: tl.constexpr = 0x03C003C0 if HALF == tl.float16 else 0x00780078
    top = tl.join(_pair(words, mask, magic, HALF), _pair(_rotated(words, 4), mask, magic, HALF))
    bottom = tl.join(_pair(_rotated(words, 8), mask, magic, HALF), _pair(_rotated(words, 12), mask, magic, HALF))
    numbers = tl.join(top, bottom)  # (BN/16, 32, TILES, pair, row half, column half)
    numbers = tl.reshape(numbers, (BN // 16, 8, 4, TILES, 2, 2, 2))
    numbers = tl.permute(numbers, (0, 5, 1, 3, 6, 2, 4))
    return tl.reshape(numbers, (BN, 16 * TILES))


@triton.jit
def int4_kernel(
    x,  # (M, columns), HALF
    words,
    scale,
    offset,
    up,  # (N, RANK) HALF, where RANK
    dx,  # (M, RANK) HALF, where RANK
    y,  # (M, N) HALF; with splits (splits, M, N) float32
    M,
    N,
    columns,  # of x
    rows,  # of W, filled up
    groups,  # of a row of W
    per_split,  # groups of a program
    magic,
    GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE: tl.constexpr,  # whether no column was filled up
):
    """A tile (BN, BM) of W xᵀ, over the groups of one split."""
    BK: tl.constexpr = 16 * TILES
    STEPS: tl.constexpr = GROUP // BK
    HALF: tl.constexpr = x.dtype.element_ty
    block, split = tl.program_id(0), tl.program_id(2)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    magic ^= M >> 31  # 0, which the compiler cannot know: in a register it is or-ed with a masked word in one instruction
    first = split * per_split
    last = tl.minimum(first + per_split, groups)
    tile = block * (BN // 16) + tl.arange(0, BN // 16)
    places = tile[:, None, None].to(tl.int64) * (groups * STEPS * 32 * TILES)
    places += tl.arange(0, 32)[None, :, None] * TILES + tl.arange(0, TILES)[None, None, :]
    there = m[None, :] < M
    at = m[None, :].to(tl.int64) * columns + k[:, None]
    total = tl.zeros((BN, BM), tl.float32)
    for g in tl.range(first, last, loop_unroll_factor=UNROLL):
        less = tl.load(offset + g * rows + n)
        constant = tl.broadcast_to(less[:, None], (BN, BK))
        part = tl.zeros((BN, BM), tl.float32)
        for step in tl.static_range(STEPS):
            start = g * STEPS + step
            packed = tl.load(words + places + start * (32 * TILES))
            inside = there if WHOLE else there & (start * BK + k[:, None] < columns)
            b = tl.load(x + at + start * BK, mask=inside, other=0.0)
            part = tl.dot(_unpacked(packed, magic, HALF, BN, TILES), b, part)
            part = tl.dot(constant, b, part)
        total += part * tl.load(scale + g * rows + n)[:, None].to(tl.float32)
    out = m[None, :].to(tl.int64) * N + n[:, None]
    stored = there & (n[:, None] < N)
    if RANK and split == 0:
        r = tl.arange(0, RANK)
        a = tl.load(up + n[:, None] * RANK + r[None, :], mask=n[:, None] < N, other=0.0)
        b = tl.load(dx + m[None, :] * RANK + r[:, None], mask=there, other=0.0)
        total = tl.dot(a, b, total)
    if SPLIT:
        tl.store(y + split * (M * N).to(tl.int64) + out, total, mask=stored)
    else:
        tl.store(y + out, total.to(HALF), mask=stored)


class Tile(NamedTuple):
    """How the work is cut."""

    rows: int  # of x, BM
    outputs: int  # BN
    warps: int
    stages: int
    unroll: int  # groups of one turn of the loop


# By rows of x, the largest first that is not above: every configuration that may run.
TILES = {1: Tile(8, 128, 4, 3, 2), 9: Tile(16, 128, 4, 2, 2), 17: Tile(32, 128, 4, 3, 1), 33: Tile(64, 64, 4, 3, 1)}


def tile_for(rows: int) -> Tile:
    """The tile for so many rows of x."""
    return next(tile for least, tile in reversed(TILES.items()) if rows >= least)


def splits_for(rows: int, out: int, groups: int, tile: Tile, programs: int) -> tuple[int, int]:
    """Into how many parts the groups are split so that `programs` can run at once, and the groups of each."""
    blocks = -(-out // tile.outputs) * -(-rows // tile.rows)
    parts = max(1, min(groups, programs // blocks, 16))
    each = -(-groups // parts)
    return -(-groups // each), each


def matmul(
    x: Tensor, weight: Shuffled, out_features: int, up: Tensor | None = None, dx: Tensor | None = None, *, programs: int
) -> Tensor:
    """x (rows, in) times Wᵀ, plus dx upᵀ; (rows, out) in the dtype of x.

    Args:
        x: float16 or bfloat16, contiguous.
        weight: shuffled for this dtype.
        out_features: rows of W that are no filling.
        up: (out, r) of a branch, r a multiple of 16.
        dx: (rows, r), x downᵀ.
        programs: how many fit on the device at once.
    """
    rows, columns = x.shape
    tile = tile_for(rows)
    groups = weight.scale.shape[0]
    splits, each = splits_for(rows, out_features, groups, tile, programs)
    shape = (splits, rows, out_features) if splits > 1 else (rows, out_features)
    y = torch.empty(shape, dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    grid = (-(-out_features // tile.outputs), -(-rows // tile.rows), splits)
    int4_kernel[grid](
        x,
        weight.words,
        weight.scale,
        weight.offset,
        x if up is None else up,
        x if dx is None else dx,
        y,
        rows,
        out_features,
        columns,
        weight.scale.shape[1],
        groups,
        each,
        MAGIC[x.dtype][0],
        GROUP=weight.group,
        TILES=weight.tiles,
        BM=tile.rows,
        BN=tile.outputs,
        RANK=0 if up is None else up.shape[1],
        SPLIT=splits > 1,
        UNROLL=tile.unroll,
        WHOLE=groups * weight.group == columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y.sum(0).to(x.dtype) if splits > 1 else y
