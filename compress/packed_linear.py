"""The module that stands where a linear stood: packed tensors as they are loaded, then the kernel that they become."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.kernels.choose import Choice, Kernels, choose
from compress.kernels.reference import Decoded

if TYPE_CHECKING:
    from compress.kernels.kernel import Kernel
    from compress.kernels.pack import Layout


class PackedLinear(nn.Module):
    """``y = x Wᵀ + up (down x) + bias`` for x (…, in), of weights that are packed.

    It is made with a buffer for each stored tensor (`compress.kernels.pack.Layout`), under the names that files have.
    `settle` turns them into a kernel. The weight is (out, in) also where the model's own module has the transpose.

    Attributes:
        layout: of the linear.
        dtype: of activations.
        kernel: None until `settle`.
        plain: what multiplies more rows than `choice.most_rows`, if anything.
        choice: which kernel, and why.
    """

    bias: nn.Parameter | None
    choice: Choice

    def __init__(self, layout: Layout, dtype: torch.dtype, *, bias: bool) -> None:
        """Make room for the tensors of a linear, on torch's default device."""
        super().__init__()
        self.layout, self.dtype = layout, dtype
        self.in_features, self.out_features = layout.in_features, layout.out_features
        for suffix, (stored, shape) in layout.tensors().items():
            self.register_buffer(suffix, torch.empty(shape, dtype=stored))
        room = nn.Parameter(torch.empty(layout.out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_parameter("bias", room)
        self.kernel: Kernel | None = None
        self.plain: Kernel | None = None
        if "weight" not in self._buffers:
            # transformers' GPT-2 initializes the weights of some linears whatever they are; what is marked, it leaves.
            self.weight = torch.empty(0)
            self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def settle(self, name: str, kernels: Kernels = "auto", device: torch.device | None = None) -> Choice:
        """Choose the kernel, and put it in the place of the stored tensors.

        Args:
            name: of the linear, for messages.
            kernels: those to choose from.
            device: where it will multiply; the one that the tensors are on by default.

        Raises:
            ModelError: the tensors are none that the layout can have.
        """
        parts = {suffix: self._buffers[suffix] for suffix in self.layout.tensors()}
        held = {suffix: part.to(device) for suffix, part in parts.items() if part is not None}
        self.choice = choose(self.layout, next(iter(held.values())).device, self.dtype, kernels)
        try:
            self.layout.check({suffix: (part.dtype, tuple(part.shape)) for suffix, part in held.items()})
            self.kernel = self.choice.kernel(self.layout, held, self.dtype)
            self.plain = Decoded(self.layout, held, self.dtype) if self.choice.most_rows else None
        except ValueError as error:
            raise ModelError(str(error), where=name, fix="copy the model again; its weights are damaged") from None
        for suffix in parts:
            del self._buffers[suffix]
        self.__dict__.pop("weight", None)
        return self.choice

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        assert self.kernel is not None, "settle comes first"
        rows = x.reshape(-1, self.in_features)
        few = self.choice.most_rows is None or len(rows) <= self.choice.most_rows
        kernel = self.kernel if few or self.plain is None else self.plain
        y: Tensor = kernel(rows)  # (rows, out)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
