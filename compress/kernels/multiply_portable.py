"""Products with a packed weight by `compress.kernels.portable`, where `mma` is not proven."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import linear

from compress.kernels.fragments import PACKED_ROWS
from compress.kernels.operands import FUSED, order, pointers
from compress.kernels.portable import portable_kernel, portable_weight_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.fragments import Fragments


class Tile(NamedTuple):
    """How the work of `portable_kernel` is cut: rows of x and of W in a program, warps, stages of the pipeline."""

    rows: int
    outputs: int
    warps: int
    stages: int


# By rows of x, the largest that is not above. None of them was measured: they are those whose code is the shortest.
TILES = {1: Tile(16, 128, 4, 2), 17: Tile(32, 64, 4, 2), 33: Tile(64, 64, 4, 2)}


def tile_for(rows: int) -> Tile:
    """The tile of `portable_kernel` for so many rows of x."""
    return next(tile for least, tile in reversed(TILES.items()) if rows >= least)


def multiply(x: Tensor, w: Fragments, out_features: int) -> Tensor:
    """The product x Wᵀ, (rows, out) in the dtype of x, by `compress.kernels.portable` alone.

    Args:
        x: (rows, in) float16 or bfloat16, contiguous.
        w: arranged for this dtype and this kernel.
        out_features: rows of W that are no filling.
    """
    rows, columns = x.shape
    if not rows:
        return x.new_empty(0, out_features)
    if rows > PACKED_ROWS:
        return linear(x, weight(x.dtype, w, out_features, columns))
    return launch(tile_for(rows), x, w, out_features)


def launch(tile: Tile, x: Tensor, w: Fragments, out_features: int) -> Tensor:
    """`multiply` by the kernel, cut in this way."""
    rows, ordered = x.shape[0], order(x, w, dependent=False)
    sums = ordered if w.scale is None else ordered.view(rows, -1, w.group).sum(-1, dtype=torch.float32)
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    portable_kernel[(-(-rows // tile.rows) * -(-out_features // tile.outputs),)](
        ordered,
        sums,
        *pointers(w),
        y,
        rows,
        out_features,
        w.tiles,
        w.columns // w.step,
        **constants(w),
        **cut(tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **FUSED,
    )
    return y


def weight(dtype: torch.dtype, w: Fragments, out_features: int, in_features: int) -> Tensor:
    """The weight (out, in) that it stands for, rounded once to `dtype`, by `compress.kernels.portable` alone."""
    made = torch.empty(16 * w.tiles, w.columns, dtype=dtype, device=w.words.device)
    steps = w.columns // w.step
    grid = (steps, w.tiles)
    portable_weight_kernel[grid](*pointers(w), made, w.tiles, steps, **constants(w), num_warps=1, **FUSED)
    return made[:out_features, :in_features]


def constants(w: Fragments) -> dict[str, int | bool]:
    """What `compress.kernels.portable` is compiled for, of the weight."""
    return {
        "CODES": w.scale is not None,
        "SPARSE": w.positions is not None,
        "GROUP": w.group or w.step,
        "STEP": w.step,
        "ZEROS": w.offset is not None,
    }


def cut(tile: Tile) -> dict[str, int | bool]:
    """What `portable_kernel` is compiled for besides."""
    return {"BM": tile.rows, "BN": tile.outputs, "STAGES": tile.stages}
