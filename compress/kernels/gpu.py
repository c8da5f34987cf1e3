"""The Triton kernels as kernels of the runtime, and as operators that `torch.compile` knows.

Triton is imported when the first of them is used: it comes with torch's GPU builds, not with those for CPUs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from compress.grid import Grid, GridSpec
from compress.kernels.kernel import Kernel
from compress.kernels.pack import unpack_grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.kernels.pack import Layout

DTYPES = (torch.float16, torch.bfloat16)
WAVES = 4  # programs of a streaming multiprocessor that the columns are split for


class TritonInt4(Kernel):
    """2, 3 and 4 bits as codes of 4, the branch in the same launch."""

    name: ClassVar[str] = "triton-int4"
    runs_on: ClassVar[str | None] = "cuda"

    def __init__(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Shuffle the codes into the order of fragments."""
        from compress.kernels.int4 import shuffle

        super().__init__(layout, parts, dtype)
        made = shuffle(as_four_bits(unpack_grid(layout, parts)), dtype)
        for name in ("words", "scale", "offset"):
            self.hold(name, getattr(made, name).to(self.device))
        self.group, self.tiles = made.group, made.tiles
        if self.low_rank_up is not None and self.low_rank_down is not None:
            fill = -layout.rank % 16
            self.hold("low_rank_up", nn.functional.pad(self.low_rank_up, (0, fill)).contiguous())
            self.hold("low_rank_down", nn.functional.pad(self.low_rank_down, (0, 0, 0, fill)).contiguous())

    @classmethod
    def refusal(cls, layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
        """What the kernel needs of device, dtype and grid."""
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        if find_spec("triton") is None:
            return "Triton is not installed"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs a GPU of compute capability 8.0"
        return cls.unfit(layout, dtype)

    @classmethod
    def unfit(cls, layout: Layout, dtype: torch.dtype) -> str | None:
        """What it cannot multiply, whatever the device."""
        if layout.grid is None or layout.grid.kind != "int" or layout.grid.bits > 4:
            return "there are no integer codes of at most 4 bits"
        if dtype not in DTYPES:
            return f"computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
        width = layout.grid.group_size
        return f"32 does not divide groups of {width} columns" if width != -1 and width % 32 else None

    @classmethod
    def says(cls, layout: Layout, dtype: torch.dtype) -> str:
        """What it does."""
        return f"codes of 4 bits from memory to registers, {str(dtype).removeprefix('torch.')}, sums in float32"

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in) → (rows, out), in the dtype of x."""
        rows = x.to(self.dtype).contiguous()
        up, down = self.low_rank_up, self.low_rank_down
        dx = None if down is None else nn.functional.linear(rows, down)
        words, scale, offset = (self.get_buffer(name) for name in ("words", "scale", "offset"))
        y: Tensor = int4_matmul(rows, words, scale, offset, up, dx, self.group, self.tiles, self.layout.out_features)
        return y.to(x.dtype)


def as_four_bits(grid: Grid) -> Grid:
    """The same weights on a grid of 4 bits: fewer bits around any zero-point become code − zero + 8, exactly."""
    if grid.spec.bits == 4:
        return grid
    spec = GridSpec(4, grid.spec.group_size, scale_dtype=grid.spec.scale_dtype)
    codes = (grid.codes.int() - grid.spread(grid.zero).int() + 8).to(torch.uint8)
    return Grid(spec, grid.scale, torch.full_like(grid.zero, 8), codes)


@torch.library.custom_op("compress::int4_matmul", mutates_args=())
def int4_matmul(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor,
    up: Tensor | None,
    dx: Tensor | None,
    group: int,
    tiles: int,
    out_features: int,
) -> Tensor:
    """`compress.kernels.int4.matmul` on as many programs as the device has room for."""
    from compress.kernels.int4 import Shuffled, matmul

    programs = WAVES * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    weight = Shuffled(words, scale, offset, group, tiles)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # which need not be the current one
        return matmul(x, weight, out_features, up, dx, programs=programs)


@int4_matmul.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    offset: Tensor,
    up: Tensor | None,
    dx: Tensor | None,
    group: int,
    tiles: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)
