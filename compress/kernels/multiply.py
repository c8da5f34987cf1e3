"""Cut a product with a packed weight into programs of `compress.kernels.product`, by what was measured on a GPU.

Few rows of x are multiplied by `product_kernel`, some hundred with codes of a dense weight on Hopper by `wide_kernel`;
for more, the weight is decoded, which another kernel does as fast as memory takes it, and cuBLAS multiplies. Which it
is, and in which tiles, was measured on an H100 (docs/decisions/015-fragments.md): it changes how long a product takes
and the order of its sums, no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import linear, pad

from compress.kernels.fragments import restore_up, rows_for
from compress.kernels.product import arrange_kernel, order_kernel, product_kernel, weight_kernel
from compress.kernels.wide import wide_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.fragments import Fragments

# Offsets of a symmetric grid, zero = 8, of the rows g and g + 8 (`instructions.decode`): −1032 and −72, or −136 twice
MIDDLE = {torch.float16: (-0x1BF71BF8, -0x2B7F2B80), torch.bfloat16: (-0x3CF73CF8, -0x3CF73CF8)}
WIDE = (33, 640)  # rows of x that the warp-group product takes; fewer than 65 only of enough rows of W
FUSED = {"enable_fp_fusion": True}  # a sum and a product are one instruction; from Triton 3.10 on it must be asked for
WARPS = 32  # of a multiprocessor, to share the columns among


class Tile(NamedTuple):
    """How the work is cut.

    Attributes:
        eights: of rows of x in a program.
        tiles: of 16 rows of W in a warp.
        across: warps beside each other, of other rows of W.
        along: warps of the same rows of W that share the columns.
        arranged: whether x is put in order first, by a kernel of its own.
        scaled: whether scales are applied to numbers rather than to sums.
        ahead: whether a step of W is read while the one before is multiplied.
    """

    eights: int
    tiles: int
    across: int
    along: int
    arranged: bool
    scaled: bool
    ahead: bool


class WideTile(NamedTuple):
    """How the work of `wide_kernel` is cut: rows of x and of W in a program, warps, stages of the pipeline."""

    rows: int
    outputs: int
    warps: int
    stages: int


WIDE_TILES = {33: WideTile(64, 64, 4, 4), 65: WideTile(128, 64, 4, 4)}


def wide_for(rows: int, w: Fragments, processors: int) -> WideTile | None:
    """The tile for the warp-group product of so many rows of x; None where another product is faster or knows more."""
    least, most = WIDE
    few = w.tiles < 3 * processors  # of W: the other kernel shares its columns among more warps
    if w.positions is not None or w.group < 64 or not (65 if few else least) <= rows <= most:
        return None
    return WIDE_TILES[33 if rows <= (128 if few else 64) else 65]


def tile_for(rows: int, w: Fragments, in_features: int, processors: int) -> Tile:
    """The tile for so many rows of x.

    Args:
        rows: of x.
        w: the weight.
        in_features: columns of x; x is put in order where W has more.
        processors: multiprocessors of the GPU.
    """
    sparse, codes = w.positions is not None, w.scale is not None
    whole = in_features == w.columns
    steps, busy = w.columns // w.step, w.tiles / processors  # tiles of W for a multiprocessor
    if rows <= 16:
        found = _few(rows, busy, steps, sparse, codes)
        if not whole:
            found = found._replace(arranged=True)
    else:
        found = _many(busy * -(-rows // 32), steps, sparse, codes)
    while found.tiles > w.tiles:
        found = found._replace(tiles=found.tiles // 2)
    while found.along > max(1, steps):
        found = found._replace(along=found.along // 2)
    return found


def _few(rows: int, busy: float, steps: int, sparse: bool, codes: bool) -> Tile:
    """Up to 16 rows: memory decides, so many warps read W; beside each other where they are many and x is, too."""
    few = busy < 4
    if rows > 8 and sparse:
        if few:
            return Tile(2, 1, 1, _along(busy, steps), True, False, True)
        return Tile(2, 2, 2, 4, True, False, codes or busy < 8)
    if rows > 8:
        return Tile(2, 1, 1, _along(busy, steps), False, False, False) if few else Tile(2, 1, 4, 4, False, False, False)
    tiles = 1 if busy < 8 else 4 if sparse and codes else 2
    if rows > 2 and not few and not sparse:
        return Tile(1, tiles, 2, 4, False, False, False)
    along = _along(busy * (2 if tiles == 4 else 1) / tiles, steps)
    return Tile(1, tiles, 1, along, sparse and rows > (4 if few else 2), False, True)


def _along(busy: float, steps: int) -> int:
    """Warps that share the columns: not too many at once, each with four steps or more."""
    most = min(16.0, WARPS / busy, steps / 4)
    return 1 << max(1, int(most).bit_length() - 1)


def _many(busy: float, steps: int, sparse: bool, codes: bool) -> Tile:
    """More rows: x decides, so warps read the same of it, and the rows of a program grow with the work."""
    if busy < 3:
        cut = (1, 1, 8)
    elif busy < 6:
        cut = (1, 2, 4) if steps < 64 else (2, 1, 8)
    elif busy < 10:
        cut = (2, 2, 4)
    elif busy < 20:
        cut = (4, 2, 2) if sparse and codes else (2, 4, 2)
    else:
        cut = (4, 4, 1)
    eights = 8 if busy >= 50 else 4
    return Tile(eights, *cut, True, codes, cut[0] < 4 and not (sparse and codes))


def multiply(
    x: Tensor,
    w: Fragments,
    out_features: int,
    up: Tensor | None = None,
    dx: Tensor | None = None,
    *,
    processors: int,
    hopper: bool = False,
) -> Tensor:
    """The product x Wᵀ + dx upᵀ, (rows, out) in the dtype of x.

    Args:
        x: (rows, in) float16 or bfloat16, contiguous, aligned to 16 bytes.
        w: arranged for this dtype.
        out_features: rows of W that are no filling.
        up: of a branch, as `arrange_up` has it.
        dx: (rows, rank), x downᵀ.
        processors: multiprocessors of the GPU.
        hopper: whether it has the warp-group product.
    """
    rows, columns = x.shape
    if not rows:
        return x.new_empty(0, out_features)
    wide = wide_for(rows, w, processors) if hopper else None
    if wide is None and rows <= rows_for(sparse=w.positions is not None):
        return launch(tile_for(rows, w, columns, processors), x, w, out_features, up, dx)
    if wide is not None:
        y = launch_wide(wide, x, w, out_features)
    else:
        y = linear(x, weight(x.dtype, w, out_features, columns))
    return y if up is None or dx is None else y.addmm_(dx, restore_up(up, x.dtype)[:out_features].T)


def launch(
    tile: Tile, x: Tensor, w: Fragments, out_features: int, up: Tensor | None = None, dx: Tensor | None = None
) -> Tensor:
    """`multiply` by the kernel, cut in this way. Without `tile.arranged` x must have all columns of W."""
    rows, steps = x.shape[0], w.columns // w.step
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    grid = (-(-w.tiles // (tile.tiles * tile.across)), -(-rows // (8 * tile.eights)))
    product_kernel[grid](
        arrange(x, w, grid[1] * tile.eights) if tile.arranged else x,
        *pointers(w),
        w.words if up is None else up,
        x if dx is None else dx,
        y,
        rows,
        out_features,
        w.tiles,
        steps,
        0 if up is None else up.shape[1],
        **constants(x.dtype, w),
        **cut(tile, w, branch=up is not None),
        num_warps=tile.across * tile.along,
        num_stages=1,
        **FUSED,
    )
    return y


def launch_wide(tile: WideTile, x: Tensor, w: Fragments, out_features: int) -> Tensor:
    """The product x Wᵀ by `wide_kernel`, cut in this way."""
    rows, blocks = x.shape[0], w.columns // 32
    x = _of_pairs(x)
    ordered = torch.empty(rows, w.columns, dtype=x.dtype, device=x.device)
    order_kernel[(-(-blocks * 16 // 1024), rows)](x, ordered, x.shape[1] // 2, blocks, BLOCK=1024, **FUSED)
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    words, _, scale, offset = pointers(w)
    wide_kernel[(-(-rows // tile.rows) * -(-out_features // tile.outputs),)](
        ordered,
        words,
        scale,
        offset,
        y,
        rows,
        out_features,
        w.tiles,
        w.columns // 64,
        **wide_constants(tile, x.dtype, w),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    return y


def wide_constants(tile: WideTile, dtype: torch.dtype, w: Fragments) -> dict[str, int | bool]:
    """What `wide_kernel` is compiled for."""
    found = {name: value for name, value in constants(dtype, w).items() if name not in ("CODES", "SPARSE", "STEP")}
    return found | {"BM": tile.rows, "BN": tile.outputs, "STAGES": tile.stages}


def _of_pairs(x: Tensor) -> Tensor:
    return pad(x, (0, 1)) if x.shape[1] % 2 else x


def pointers(w: Fragments) -> tuple[Tensor, ...]:
    """The tensors of a weight; where there is none, any other stands."""
    return w.words, *(w.words if part is None else part for part in (w.positions, w.scale, w.offset))


def constants(dtype: torch.dtype, w: Fragments) -> dict[str, int | bool]:
    """What kernels are compiled for, of the weight."""
    return {
        "CODES": w.scale is not None,
        "SPARSE": w.positions is not None,
        "GROUP": w.group or w.step,
        "STEP": w.step,
        "BF16": dtype is torch.bfloat16,
        "ZEROS": w.offset is not None,
        "MIDDLE0": MIDDLE[dtype][0],
        "MIDDLE1": MIDDLE[dtype][1],
    }


def cut(tile: Tile, w: Fragments, *, branch: bool) -> dict[str, int | bool]:
    """What `product_kernel` is compiled for besides."""
    return {
        "RANK": branch,
        "ARRANGED": tile.arranged,
        "EVEN": w.columns // w.step % tile.along == 0,
        "NT": tile.eights,
        "T": tile.tiles,
        "ACROSS": tile.across,
        "ALONG": tile.along,
        "SCALED": tile.scaled and w.scale is not None,
        "AHEAD": tile.ahead,
    }


def arrange(x: Tensor, w: Fragments, eights: int) -> Tensor:
    """Rows x in the order of the second operand, filled up to so many eights of rows."""
    blocks = w.columns // 32
    made = torch.empty(eights, blocks, 256, dtype=x.dtype, device=x.device)
    rows, x = x.shape[0], _of_pairs(x)
    grid = (-(-blocks * 128 // 1024), eights)
    arrange_kernel[grid](x, made, rows, x.shape[1] // 2, blocks, SPARSE=w.positions is not None, BLOCK=1024, **FUSED)
    return made


def weight(dtype: torch.dtype, w: Fragments, out_features: int, in_features: int) -> Tensor:
    """The weight (out, in) that it stands for, rounded once to `dtype`."""
    made = torch.empty(16 * w.tiles, w.columns, dtype=dtype, device=w.words.device)
    steps = w.columns // w.step
    weight_kernel[(steps, w.tiles)](*pointers(w), made, w.tiles, steps, **constants(dtype, w), num_warps=1, **FUSED)
    return made[:out_features, :in_features]
