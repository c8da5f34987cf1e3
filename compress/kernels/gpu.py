"""The Triton kernels as kernels of the runtime, and as an operator that `torch.compile` knows.

Triton is imported when the first of them is used: it comes with torch's GPU builds, not with those for CPUs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from compress.kernels.fragments import Fragments, arrange_grid, arrange_up, arrange_values, refusal
from compress.kernels.kernel import Kernel, ready
from compress.kernels.pack import unpack_grid, unpack_positions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.kernels.pack import Layout

DTYPES = (torch.float16, torch.bfloat16)
PROVEN = ((3, 6), (3, 9))  # from and to: versions of Triton whose compiled instructions were tested
PARTS = ("words", "positions", "scale", "offset")


class Triton(Kernel):
    """A packed weight in the order of the tensor cores' fragments, its branch in the same launch."""

    runs_on: ClassVar[str | None] = "cuda"
    most_rows: ClassVar[int | None] = 32
    portable: ClassVar[bool] = False
    sparse: ClassVar[bool]
    does: ClassVar[str]

    def __init__(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Arrange the weight."""
        super().__init__(layout, parts, dtype)
        made = self.arranged(layout, parts, dtype)
        for name in PARTS:
            self.hold(name, getattr(made, name))
        self.group, self.step = made.group, made.step
        up, down = self.low_rank_up, self.low_rank_down
        if up is not None and down is not None and not self.portable:
            fill = -layout.rank % 16
            self.hold("low_rank_up", arrange_up(nn.functional.pad(up, (0, fill))))
            self.hold("low_rank_down", nn.functional.pad(down, (0, 0, 0, fill)))

    @classmethod
    def arranged(cls, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Fragments:
        """The weight, as the kernels read it."""
        sparse = layout.sparse if cls.portable else cls.sparse
        stored = unpack_positions(parts["positions"], layout.in_features) if sparse else None
        if layout.grid is not None:
            return arrange_grid(unpack_grid(layout, parts), dtype, stored, portable=cls.portable)
        values = parts["values"].to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"a value is not finite in {str(dtype).removeprefix('torch.')}")
        assert stored is not None
        return arrange_values(values, stored, portable=cls.portable)

    @classmethod
    def refusal(cls, layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
        """What it needs of device, dtype and layout."""
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        if find_spec("triton") is None:
            return "Triton is not installed"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs a GPU of compute capability 8.0"
        return (None if cls.portable else unproven()) or cls.unfit(layout, dtype)

    @classmethod
    def unfit(cls, layout: Layout, dtype: torch.dtype) -> str | None:
        """What it cannot multiply, whatever the device."""
        if dtype not in DTYPES:
            return f"computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
        if cls.sparse and not layout.sparse:
            return "is not 2:4"
        return refusal(layout.grid, layout.in_features, sparse=cls.sparse)

    @classmethod
    def says(cls, layout: Layout, dtype: torch.dtype) -> str:
        """What it does."""
        name = str(dtype).removeprefix("torch.")
        return f"{cls.does}, {name}"

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in) → (rows, out), in the dtype of x."""
        rows = x.to(self.dtype).contiguous()
        up, down = self.low_rank_up, self.low_rank_down
        dx = None if down is None else nn.functional.linear(rows, down)
        held = [self._buffers[name] for name in PARTS]
        y: Tensor = packed_matmul(rows, *held, up, dx, self.group, self.step, self.layout.out_features)
        return y.to(x.dtype)


class TritonInt4(Triton):
    """2, 3 and 4 bits as codes of 4."""

    name: ClassVar[str] = "triton-int4"
    sparse: ClassVar[bool] = False
    does: ClassVar[str] = "codes of 4 bits"


class TritonSparse24(Triton):
    """2:4, with or without codes, by the tensor cores' instruction for it."""

    name: ClassVar[str] = "triton-sparse24"
    sparse: ClassVar[bool] = True
    does: ClassVar[str] = "values of 2:4"

    @classmethod
    def unfit(cls, layout: Layout, dtype: torch.dtype) -> str | None:
        """Besides: codes are another kernel's."""
        return super().unfit(layout, dtype) or (None if layout.grid is None else "has codes")


class TritonSparse24Int4(Triton):
    """2:4 with codes of 2, 3 or 4 bits."""

    name: ClassVar[str] = "triton-sparse24-int4"
    sparse: ClassVar[bool] = True
    does: ClassVar[str] = "codes of 4 bits of 2:4"

    @classmethod
    def unfit(cls, layout: Layout, dtype: torch.dtype) -> str | None:
        """Besides: values are another kernel's."""
        return super().unfit(layout, dtype) or ("has no codes" if layout.grid is None else None)


class TritonPortable(Triton):
    """Codes, 2:4 or both without instructions of one vendor's tensor cores: 2:4 is expanded in registers."""

    name: ClassVar[str] = "triton-portable"
    portable: ClassVar[bool] = True
    fallback: ClassVar[bool] = True

    @classmethod
    def unfit(cls, layout: Layout, dtype: torch.dtype) -> str | None:
        """What it cannot multiply, whatever the device."""
        if dtype not in DTYPES:
            return f"computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
        return refusal(layout.grid, layout.in_features, sparse=layout.sparse)

    @classmethod
    def says(cls, layout: Layout, dtype: torch.dtype) -> str:
        """What it does."""
        what = "codes of 4 bits" if layout.grid is not None else "values"
        what += ", 2:4 expanded in registers" if layout.sparse else ""
        name = str(dtype).removeprefix("torch.")
        return f"{what}, {name}, in Triton without PTX"

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in) → (rows, out), in the dtype of x."""
        return Kernel.forward(self, x.to(self.dtype).contiguous()).to(x.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """``x Wᵀ`` for x (rows, in), in the dtype of x."""
        held = [self._buffers[name] for name in PARTS]
        y: Tensor = portable_matmul(x, *held, self.group, self.step, self.layout.out_features)
        return y


def unproven() -> str | None:
    """Why instructions of NVIDIA's tensor cores may not stand in kernels here; None where they were tested."""
    import triton

    if torch.version.hip:
        return "made of instructions of NVIDIA's tensor cores"
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not PROVEN[0] <= found <= PROVEN[1]:
        least, most = (f"{major}.{minor}" for major, minor in PROVEN)
        return f"its instructions were tested with Triton {least} to {most}, not with {triton.__version__}"
    return None


@torch.library.custom_op("compress::portable_matmul", mutates_args=())
def portable_matmul(
    x: Tensor,
    words: Tensor,
    masks: Tensor | None,
    scale: Tensor | None,
    zeros: Tensor | None,
    group: int,
    step: int,
    out_features: int,
) -> Tensor:
    """`compress.kernels.multiply_portable.multiply` on the device of x."""
    from compress.kernels.multiply_portable import multiply

    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # which need not be the current one
        return multiply(ready(x, x.dtype, 16), Fragments(words, masks, scale, zeros, group, step), out_features)


@portable_matmul.register_fake
def _portable(
    x: Tensor,
    words: Tensor,
    masks: Tensor | None,
    scale: Tensor | None,
    zeros: Tensor | None,
    group: int,
    step: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("compress::packed_matmul", mutates_args=())
def packed_matmul(
    x: Tensor,
    words: Tensor,
    positions: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    up: Tensor | None,
    dx: Tensor | None,
    group: int,
    step: int,
    out_features: int,
) -> Tensor:
    """`compress.kernels.multiply.multiply` on the device of x."""
    from compress.kernels.multiply import multiply

    weight = Fragments(words, positions, scale, offset, group, step)
    processors, hopper = 1, False
    if x.is_cuda:
        found = torch.cuda.get_device_properties(x.device)
        processors, hopper = found.multi_processor_count, found.major == 9
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # which need not be the current one
        return multiply(ready(x, x.dtype, 16), weight, out_features, up, dx, processors=processors, hopper=hopper)


@packed_matmul.register_fake
def _(
    x: Tensor,
    words: Tensor,
    positions: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    up: Tensor | None,
    dx: Tensor | None,
    group: int,
    step: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)
