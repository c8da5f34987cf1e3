"""Cut a product of some hundred rows of x into programs of `compress.kernels.prompt`.

Nothing chooses it yet: no GPU has run it. `benchmarks/tiles.py` compares it with what is chosen, on a Hopper GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from compress.kernels.multiply import ONE, constants
from compress.kernels.operands import FUSED, order, pointers
from compress.kernels.prompt import prompt_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.fragments import Fragments


class Tile(NamedTuple):
    """How the work is cut.

    Attributes:
        rows: of x in a program.
        groups: groups of four warps beside each other, each of 64 rows of W.
        along: times as many, which share the columns.
        stages: of 64 columns of x, for each of these.
    """

    rows: int
    groups: int
    along: int
    stages: int

    @property
    def warps(self) -> int:
        """Of a program."""
        return 4 * self.groups * self.along


TILES = (
    Tile(64, 1, 1, 5), Tile(64, 1, 2, 3), Tile(64, 1, 4, 3), Tile(64, 2, 1, 5), Tile(64, 2, 2, 4), Tile(64, 4, 1, 5),
    Tile(128, 1, 1, 3), Tile(128, 2, 1, 3), Tile(128, 4, 1, 3), Tile(128, 4, 1, 7),
)  # fmt: skip


def launch(tile: Tile, x: Tensor, w: Fragments, out_features: int, *, dependent: bool = False) -> Tensor:
    """The product x Wᵀ (rows, out); what orders x may be `dependent` (`operands.chained`).

    Args:
        tile: how to cut it.
        x: (rows, in), contiguous, aligned to 16 bytes; of 2:4, `in` is a multiple of 8.
        w: arranged for the dtype of x, in groups of 64 or 128.
        out_features: rows of W that are no filling, a multiple of 8.
        dependent: whether it follows a kernel of ours.
    """
    rows, ordered = x.shape[0], order(x, w, dependent=dependent) if w.positions is None else x
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    prompt_kernel[(-(-rows // tile.rows) * -(-out_features // (64 * tile.groups)),)](
        ordered,
        *pointers(w),
        y,
        rows,
        out_features,
        ordered.shape[1],
        w.tiles,
        w.columns // w.step,
        ONE,
        **cut(tile, x.dtype, w),
        num_warps=tile.warps,
        num_stages=1,
        **FUSED,
    )
    return y


def cut(tile: Tile, dtype: torch.dtype, w: Fragments) -> dict[str, int | bool]:
    """What `prompt_kernel` is compiled for."""
    stages = tile.rows * tile.along * tile.stages // 8  # KiB
    sums = tile.groups * tile.along * tile.rows // 4 if tile.along > 1 else 0
    result = 8 * tile.groups * tile.along
    most = max(stages, sums, result)
    return constants(dtype, w) | {
        "BM": tile.rows,
        "GROUPS": tile.groups,
        "ALONG": tile.along,
        "STAGES": tile.stages,
        "KIB": 0 if most == stages <= 48 else 1 << most.bit_length(),
    }
