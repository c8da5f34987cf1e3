"""The reference as a kernel: any layout, on any device, by the arithmetic of `compress.kernels.pack` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from compress.kernels.kernel import Kernel
from compress.kernels.pack import SUFFIXES, linear, unpack_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from compress.kernels.pack import Layout


class Reference(Kernel):
    """Packed in memory, decoded in every call, multiplied in float32. Slow: it is there to compare with."""

    name: ClassVar[str] = "reference"

    def __init__(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Keep the tensors as they are stored, once they were decoded to see that they can be."""
        super().__init__(layout, parts, dtype)
        unpack_weight(layout, parts)
        for suffix, part in parts.items():
            self.hold(suffix, part)

    @classmethod
    def says(cls, layout: Layout, dtype: torch.dtype) -> str:
        """What it does."""
        return "packed in memory, decoded in every call, multiplied in float32"

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in) → (rows, out), in the dtype of x."""
        parts = {suffix: getattr(self, suffix) for suffix in SUFFIXES if getattr(self, suffix, None) is not None}
        return linear(x, self.layout, parts)


class Decoded(Kernel):
    """The reference's weight, decoded once and kept in the dtype of activations: as fast and large as a plain one."""

    name: ClassVar[str] = "decoded"
    moves: ClassVar[bool] = True
    fallback: ClassVar[bool] = True
    weight: Tensor

    def __init__(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Decode the weight."""
        super().__init__(layout, parts, dtype)
        self.hold("weight", unpack_weight(layout, parts).to(dtype))

    @classmethod
    def says(cls, layout: Layout, dtype: torch.dtype) -> str:
        """What it does."""
        if layout.grid is None and not layout.sparse:
            return "a plain weight"
        return f"decoded to {str(dtype).removeprefix('torch.')} at load"

    def multiply(self, x: Tensor) -> Tensor:
        """``x Wᵀ``."""
        return nn.functional.linear(x, self.weight)
