"""Cut a product with a packed weight into programs of `compress.kernels.product`, by what was measured on a GPU.

Few rows of x are multiplied by `product_kernel`. On Hopper some hundred are multiplied by its warp-group product: with
codes of a dense weight by `wide_kernel`, with 2:4 by `portable_kernel`. For more, the weight is decoded, which another
kernel does as fast as memory takes it, and cuBLAS multiplies. Which it is, and in which tiles, was measured on an H100
(docs/decisions/015-fragments.md), except `portable_kernel`, which has not run on a GPU: it changes how long a product
takes and the order of its sums, no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear, pad

from compress.kernels import multiply_portable
from compress.kernels.fragments import PACKED_ROWS, ROWS, restore_up
from compress.kernels.operands import FUSED, of_pairs, order, pointers
from compress.kernels.product import arrange_kernel, product_kernel, weight_kernel
from compress.kernels.wide import wide_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.fragments import Fragments

# Offsets of a symmetric grid, zero = 8, of the rows g and g + 8 (`instructions.decode`): −1032 and −72, or −136 twice
MIDDLE = {torch.float16: (-0x1BF71BF8, -0x2B7F2B80), torch.bfloat16: (-0x3CF73CF8, -0x3CF73CF8)}
ONE = 0x3F803F80  # a pair of ones in bfloat16
WIDE = (33, 640)  # rows of x that the warp-group product takes; fewer than 65 only of enough rows of W
EXPANDED = (65, 640)  # rows of x for which, with a warp-group product, 2:4 is expanded in registers
RAN = False  # whether a GPU has run that: until then `bench --check` compares and times it, and nothing chooses it
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


EXPANDED_TILE = multiply_portable.Tile(128, 64, 4, 2)
WIDE_TILES = {33: WideTile(64, 64, 4, 4), 65: WideTile(128, 64, 4, 4)}


def wide_for(rows: int, w: Fragments, processors: int) -> WideTile | None:
    """The tile for the warp-group product of so many rows of x; None where another product is faster or knows more."""
    least, most = WIDE
    few = w.tiles < 3 * processors  # of W: the other kernel shares its columns among more warps
    if w.positions is not None or w.group < 64 or not (65 if few else least) <= rows <= most:
        return None
    return WIDE_TILES[33 if rows <= (128 if few else 64) else 65]


def tile_for(rows: int, w: Fragments, processors: int) -> Tile:
    """The tile for so many rows of x.

    Args:
        rows: of x.
        w: the weight.
        processors: multiprocessors of the GPU.
    """
    sparse, codes = w.positions is not None, w.scale is not None
    steps, busy = w.columns // w.step, w.tiles / max(processors, 8)  # tiles of W for a multiprocessor
    if rows > 16:
        return _many(busy * -(-rows // 32), steps, sparse, codes)
    return _few(rows, busy, steps, sparse, codes)


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
    return 1 << max(2, int(most).bit_length() - 1)


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
    return Tile(4, *cut, True, codes, cut[0] < 4 and not (sparse and codes))


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
    rows = x.shape[0]
    if not rows:
        return x.new_empty(0, out_features)
    wide = wide_for(rows, w, processors) if hopper else None
    whole = w.positions is not None and w.group in (0, w.step)  # smaller groups: up to 20 instructions per weight
    expanded = RAN and hopper and whole and EXPANDED[0] <= rows <= EXPANDED[1]
    if wide is None and not expanded and rows <= PACKED_ROWS:
        return launch(tile_for(rows, w, processors), x, w, out_features, up, dx)
    if wide is not None:
        y = launch_wide(wide, x, w, out_features)
    elif expanded:
        y = multiply_portable.launch(EXPANDED_TILE, x, w, out_features, masks=False)
    else:
        y = decoded(x, w, out_features)
    return y if up is None or dx is None else y.addmm_(dx, restore_up(up, x.dtype)[:out_features].T)


def launch(
    tile: Tile, x: Tensor, w: Fragments, out_features: int, up: Tensor | None = None, dx: Tensor | None = None
) -> Tensor:
    """`multiply` by the kernel, cut in this way."""
    rows, steps = x.shape[0], w.columns // w.step
    if not tile.arranged and x.shape[1] < w.columns:
        x = pad(x, (0, w.columns - x.shape[1]))
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    grid = (-(-w.tiles // (tile.tiles * tile.across)), -(-rows // (8 * tile.eights)))
    product_kernel[grid](
        arrange(x, w, grid[1], tile.eights) if tile.arranged else x,
        *pointers(w),
        w.words if up is None else up,
        x if dx is None else dx,
        y,
        rows,
        out_features,
        w.tiles,
        steps,
        0 if up is None else up.shape[1],
        ONE,
        **constants(x.dtype, w),
        **cut(tile, w, branch=up is not None),
        num_warps=tile.across * tile.along,
        num_stages=1,
        **FUSED,
        **register_options(tile, w),
    )
    return y


def register_options(tile: Tile, w: Fragments) -> dict[str, Any]:
    """What ptxas is told about registers: for more warps on a multiprocessor it spills one or two.

    A maximum that is enough keeps it from that, and from saving registers; the level does where it takes few anyway.
    """
    if tile.eights * tile.tiles == 1:
        return {"maxnreg": 64 if w.offset is None else 72}
    if tile.eights * tile.tiles == 8 and tile.ahead and w.scale is None:
        return {"maxnreg": 160}
    return {"ptx_options": "--register-usage-level=3"}


def launch_wide(tile: WideTile, x: Tensor, w: Fragments, out_features: int) -> Tensor:
    """The product x Wᵀ by `wide_kernel`, cut in this way."""
    rows, ordered = x.shape[0], order(x, w)
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


def arrange(x: Tensor, w: Fragments, programs: int, eights: int) -> Tensor:
    """Rows x in the order of the second operand, filled up to so many programs with so many eights of rows."""
    blocks = w.columns // 32
    made = torch.empty(programs, blocks, eights, 256, dtype=x.dtype, device=x.device)
    rows, x = x.shape[0], of_pairs(x)
    grid = (-(-blocks * 128 // 1024), programs * eights)
    sparse = w.positions is not None
    arrange_kernel[grid](x, made, rows, x.shape[1] // 2, blocks, eights, SPARSE=sparse, BLOCK=1024, **FUSED)
    return made


def decoded(x: Tensor, w: Fragments, out_features: int, parts: int = 1) -> Tensor:
    """The product x Wᵀ by cuBLAS, of a weight that is decoded for it, in so many parts of its rows.

    A part that fits the L2 cache, each in the memory of the one before, need never be written to the GPU's memory; but
    cuBLAS wants enough rows of it for all multiprocessors.
    """
    if parts == 1:
        return linear(x, weight(x.dtype, w, out_features, x.shape[1]))
    y = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    each = -(-w.tiles // parts)
    for first in range(0, w.tiles, each):
        rows = min(16 * each, out_features - 16 * first)
        part = weight(x.dtype, w, rows, x.shape[1], first)
        torch.mm(x, part.T, out=y[:, 16 * first : 16 * first + rows])
        del part  # the next one gets its memory
    return y


def weight(dtype: torch.dtype, w: Fragments, rows: int, in_features: int, first: int = 0) -> Tensor:
    """So many rows of the weight, (rows, in), from a tile on, rounded once to `dtype`."""
    tiles, steps = -(-rows // ROWS), w.columns // w.step
    made = torch.empty(ROWS * tiles, w.columns, dtype=dtype, device=w.words.device)
    fixed = constants(dtype, w)
    weight_kernel[(steps, tiles)](*pointers(w), made, w.tiles, steps, first, **fixed, num_warps=1, **FUSED)
    return made[:rows, :in_features]
