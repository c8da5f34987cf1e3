"""Cut a product with a packed weight into programs of `compress.kernels.product`, by what was measured on GPUs.

Few rows of x are multiplied by `product_kernel`. On Hopper some hundred are multiplied by its warp-group product, where
W is codes of a dense weight: `wide_kernel`. For more, the weight is decoded, which another kernel does as fast as
memory takes it, and cuBLAS multiplies. Which it is, and in which tiles, was measured on an H200
(docs/decisions/015-fragments.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear, pad

from compress.kernels.fragments import PACKED_ROWS, ROWS, restore_up
from compress.kernels.operands import FUSED, chained, of_pairs, order, pointers
from compress.kernels.product import arrange_kernel, product_kernel, weight_kernel
from compress.kernels.wide import wide_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.fragments import Fragments

# Offsets of a symmetric grid, zero = 8, of the rows g and g + 8 (`instructions.decode`): −1032 and −72, or −136 twice
MIDDLE = {torch.float16: (-0x1BF71BF8, -0x2B7F2B80), torch.bfloat16: (-0x3CF73CF8, -0x3CF73CF8)}
ONE = 0x3F803F80  # a pair of ones in bfloat16
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
        ahead: steps of W that are read while one is multiplied, one in registers, 3 or 7 through shared memory; and
            a part of x, where a warp has one tile.
        once: whether warps that share the columns add their sums behind one barrier, not behind several for each sum.
        early: whether this kernel may start before the one that puts x in order does, where one does.
        split: programs that share the columns, and add their sums through memory; where x is put in order first.
    """

    eights: int
    tiles: int
    across: int
    along: int
    arranged: bool
    scaled: bool
    ahead: int
    once: bool = False  # this and what follows: not chosen yet
    early: bool = False
    split: int = 1


class WideTile(NamedTuple):
    """How the work of `wide_kernel` is cut: rows of x and of W in a program, warps, stages of the pipeline."""

    rows: int
    outputs: int
    warps: int
    stages: int


WIDE_TILES = {  # by rows of x, the largest that is not above
    33: WideTile(64, 64, 4, 5),
    65: WideTile(128, 64, 4, 4),
    129: WideTile(256, 64, 4, 3),
    257: WideTile(128, 64, 4, 3),
    385: WideTile(256, 64, 4, 3),
}
LARGE_TILE = WideTile(128, 128, 8, 4)  # in place of the second, where W has very many rows


def wide_for(rows: int, w: Fragments, processors: int) -> WideTile | None:
    """The tile for the warp-group product of so many rows of x; None where another product is faster or knows more."""
    busy, steps = w.tiles / processors, w.columns // w.step
    if w.positions is not None or w.group < 64 or not 33 <= rows <= 512:
        return None
    if busy < 3:  # the other kernel shares columns among warps, and cuBLAS among programs
        return WIDE_TILES[33] if 64 < rows <= 128 and steps < 64 else None
    if 64 < rows <= 128 and busy >= 10:
        return LARGE_TILE
    return next(tile for least, tile in reversed(WIDE_TILES.items()) if rows >= least)


def tile_for(rows: int, w: Fragments, processors: int) -> Tile:
    """The tile for so many rows of x.

    Args:
        rows: of x.
        w: the weight.
        processors: multiprocessors of the GPU.
    """
    sparse, codes = w.positions is not None, w.scale is not None
    steps, busy = w.columns // w.step, w.tiles / max(processors, 8)  # tiles of W for a multiprocessor
    if rows <= 8:
        return _up_to_8(rows, busy, steps, sparse, codes)
    if rows <= 16:
        return _up_to_16(busy, steps, sparse, codes)
    if rows <= 32:
        return _up_to_32(busy, steps, sparse, codes)
    return _many(busy * -(-rows // 32), steps, sparse, codes, rows > 64)


def _up_to_8(rows: int, busy: float, steps: int, sparse: bool, codes: bool) -> Tile:
    """Memory decides, so many warps read W."""
    if not sparse:
        tiles = 1 if busy < 8 else 2
        return Tile(1, tiles, 1, _along(busy / tiles, steps), False, False, 1)
    if codes and busy >= 10:
        return Tile(1, 1, 2, 2, rows > 1, False, 1)
    return Tile(1, 1, 1, _along(busy, steps, 16 if codes else 8), rows > (2 if codes else 1), False, 1)


def _up_to_16(busy: float, steps: int, sparse: bool, codes: bool) -> Tile:
    """Where W has few rows, twice as many programs of 8 rows of x; where many, warps that read the same of x."""
    few, some = busy < 4, busy < 10
    if few:
        along = _along(2 * busy, steps, 8 if codes else 4)
        return Tile(1, 1, 1 if sparse else 2, along, sparse, False, 1)
    if some:
        return Tile(2, 1, 1 if sparse else 2, 4, True, False, 1)
    if sparse:
        return Tile(2, 1, 4 if codes else 2, 2, True, False, 1)
    return Tile(2, 2, 4, 2, True, False, 1)


def _up_to_32(busy: float, steps: int, sparse: bool, codes: bool) -> Tile:
    """As with 16, and of many rows of W programs of 32 rows of x."""
    few, some = busy < 4, busy < 10
    if few:
        along = 4 if sparse and steps < 64 else 8
        return Tile(2, 1 if sparse or busy < 1 else 2, 1, along, True, False, 1)
    if some and codes:
        return Tile(2, 2, 4, 2, True, False, 1)
    return Tile(4, 2, 4, 2, True, codes and not sparse, int(not (sparse and codes)))


def _along(busy: float, steps: int, limit: int = 16) -> int:
    """Warps that share the columns: not too many at once, each with four steps or more."""
    most = min(limit, WARPS / busy, steps / 4)
    return 1 << max(2, int(most).bit_length() - 1)


def _many(busy: float, steps: int, sparse: bool, codes: bool, more: bool) -> Tile:
    """More rows: x decides, so warps read the same of it, and the rows of a program grow with the work."""
    values = sparse and not codes
    if busy < 3:
        cut = (1, 1, 8)
    elif busy < 6:
        cut = (1, 2, 4) if steps < 64 else (2, 2, 4) if values else (2, 1, 8)
    elif busy < 10:
        cut = (2, 2, 4)
    elif busy < 20:
        cut = (4, 2, 2) if values else (2, 4, 2)
    else:
        cut = (4, 4, 1)
    ahead = cut[0] < 4 and not (sparse and codes) and not (values and more)
    return Tile(4, *cut, True, codes, int(ahead))


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
    if wide is None and rows <= PACKED_ROWS:
        return launch(tile_for(rows, w, processors), x, w, out_features, up, dx, dependent=hopper)
    if wide is not None:
        y = launch_wide(wide, x, w, out_features, dependent=hopper)
    else:
        y = decoded(x, w, out_features, dependent=hopper)
    return y if up is None or dx is None else y.addmm_(dx, restore_up(up, x.dtype)[:out_features].T)


def launch(
    tile: Tile,
    x: Tensor,
    w: Fragments,
    out_features: int,
    up: Tensor | None = None,
    dx: Tensor | None = None,
    *,
    dependent: bool = False,
) -> Tensor:
    """`multiply` by the kernel, cut in this way; `dependent`: it may start while the kernel before it ends."""
    rows, steps = x.shape[0], w.columns // w.step
    if not tile.arranged and x.shape[1] < w.columns:
        x = pad(x, (0, w.columns - x.shape[1]))
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    grid = (-(-w.tiles // (tile.tiles * tile.across)), -(-rows // (8 * tile.eights)), tile.split)
    partial = counters = None
    if tile.split > 1:
        assert tile.arranged, "counters are set to 0 where x is put in order"
        assert tile.once, "sums of programs go the way of those of warps"
        counters = torch.empty(grid[0] * grid[1], dtype=torch.int32, device=x.device)
        sums = tile.split * tile.tiles * tile.eights * 32 * tile.across * 4  # of a program
        partial = torch.empty(counters.numel() * sums, dtype=torch.float32, device=x.device)
    product_kernel[grid](
        arrange(x, w, grid[1], tile, counters, dependent=dependent) if tile.arranged else x,
        *pointers(w),
        w.words if up is None else up,
        x if dx is None else dx,
        y,
        partial,
        counters,
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
        **chained(dependent),
        **register_options(tile, w),
    )
    return y


def register_options(tile: Tile, w: Fragments) -> dict[str, Any]:
    """What ptxas is told about registers: for more warps on a multiprocessor it spills one or two.

    A maximum that is enough keeps it from that, and from saving registers; the level does where it takes few anyway.
    Which of these does for which tile was tried with `compress.kernels.aot --all`, Triton 3.6 and 3.9.
    """
    size = tile.eights * tile.tiles
    if size == 1:
        return {"maxnreg": 64 if w.offset is None else 72}
    if tile.once or tile.ahead > 1 or tile.tiles not in (1, 2, 4):  # not chosen yet
        most = {2: 112, 3: 128, 4: 160, 5: 192, 6: 224}.get(size, 255)
        return {"maxnreg": min(most, 2048 // (tile.across * tile.along))}  # so many there are for each thread
    if size == 4 and not tile.ahead:
        return {}
    if size == 8 and tile.ahead and w.scale is None:
        return {"maxnreg": 160}
    both = w.scale is not None and w.positions is not None
    more = both and w.offset is None if size == 2 else size == 8 and not tile.ahead and not tile.scaled
    level = 7 if more else 3
    return {"ptx_options": f"--register-usage-level={level}"}


def launch_wide(tile: WideTile, x: Tensor, w: Fragments, out_features: int, *, dependent: bool = False) -> Tensor:
    """The product x Wᵀ by `wide_kernel`, cut in this way; what orders x may be `dependent`, it is not.

    Programs that start one by one as others end fill some multiprocessors before others (decision 015).
    """
    rows, ordered = x.shape[0], order(x, w, dependent=dependent)
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
        "EVEN": w.columns // w.step % (tile.along * tile.split) == 0,
        "NT": tile.eights,
        "T": tile.tiles,
        "ACROSS": tile.across,
        "ALONG": tile.along,
        "SPLIT": tile.split,
        "SCALED": tile.scaled and w.scale is not None,
        "AHEAD": tile.ahead,
        "AHEAD_X": tile.arranged or (tile.ahead > 0 and tile.tiles == 1),
        "ONCE": tile.once and tile.along * tile.split > 1,
    }


def arrange(
    x: Tensor, w: Fragments, programs: int, tile: Tile, counters: Tensor | None = None, *, dependent: bool = False
) -> Tensor:
    """Rows x in the order of the second operand, filled up to so many programs; `counters` become 0."""
    blocks, eights = w.columns // 32, tile.eights
    made = torch.empty(programs, blocks, eights, 256, dtype=x.dtype, device=x.device)
    rows, x = x.shape[0], of_pairs(x)
    grid = (-(-blocks * 128 // 1024), programs * eights)
    fixed = {"SPARSE": w.positions is not None, "BLOCK": 1024, "EARLY": tile.early}
    fixed["COUNTERS"] = 0 if counters is None else counters.numel()
    arrange_kernel[grid](
        x, made, counters, rows, x.shape[1] // 2, blocks, eights, **fixed, **FUSED, **chained(dependent)
    )
    return made


def decoded(x: Tensor, w: Fragments, out_features: int, *, dependent: bool = False) -> Tensor:
    """The product x Wᵀ by cuBLAS, of a weight that is decoded for it."""
    return linear(x, weight(x.dtype, w, out_features, x.shape[1], dependent=dependent))


def weight(dtype: torch.dtype, w: Fragments, out_features: int, in_features: int, *, dependent: bool = False) -> Tensor:
    """The weight (out, in), rounded once to `dtype`."""
    steps = w.columns // w.step
    made = torch.empty(ROWS * w.tiles, w.columns, dtype=dtype, device=w.words.device)
    fixed = constants(dtype, w)
    options = {"num_warps": 1} | FUSED | chained(dependent)
    weight_kernel[(steps, w.tiles)](*pointers(w), made, w.tiles, steps, **fixed, **options)
    return made[:out_features, :in_features]
