"""What all kernels are given: the tensors of a weight, and x in the order in which lanes hold W."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from compress.kernels.product import order_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from compress.kernels.fragments import Fragments

FUSED = {"enable_fp_fusion": True}  # a sum and a product are one instruction; from Triton 3.10 on it must be asked for


def pointers(w: Fragments) -> tuple[Tensor, ...]:
    """The tensors of a weight; where there is none, any other stands."""
    return w.words, *(w.words if part is None else part for part in (w.positions, w.scale, w.offset))


def of_pairs(x: Tensor) -> Tensor:
    """With an even number of columns."""
    return pad(x, (0, 1)) if x.shape[1] % 2 else x


def chained(dependent: bool) -> dict[str, bool]:
    """What a kernel is given that may start while the one before it ends: it waits for its results itself."""
    return {"DEPENDENT": dependent} | ({"launch_pdl": True} if dependent else {})


def order(x: Tensor, w: Fragments, *, dependent: bool) -> Tensor:
    """Rows x with the columns of W, in the order in which lanes hold them."""
    blocks, x = w.columns // 32, of_pairs(x)
    made = torch.empty(x.shape[0], w.columns, dtype=x.dtype, device=x.device)
    grid = (-(-blocks * 16 // 1024), x.shape[0])
    order_kernel[grid](
        x, made, x.shape[1] // 2, blocks, SPARSE=w.positions is not None, BLOCK=1024, **FUSED, **chained(dependent)
    )
    return made
