"""What a kernel is: a module that multiplies with one packed linear, and says in advance whether it can.

A kernel is chosen by `compress.kernels.choose` from the layout, the device and the dtype alone, so what will run is
known before a weight is read. It takes the packed tensors once, in the order that it wants them, and never asks again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Self

    from compress.kernels.pack import Layout


class Kernel(nn.Module):
    """A packed linear without its bias: ``y = x Wᵀ + (x downᵀ) upᵀ``.

    Attributes:
        layout: of the linear.
        dtype: of activations.
    """

    name: ClassVar[str]
    runs_on: ClassVar[str | None] = None  # the type of device; None is any
    moves: ClassVar[bool] = False  # whether it may change its device and dtype after it was made
    fallback: ClassVar[bool] = False  # whether to say why those before it were not taken
    most_rows: ClassVar[int | None] = None  # of x; for more a plain weight is faster, if there is memory for it, too
    low_rank_up: Tensor | None
    low_rank_down: Tensor | None

    def __init__(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Take the packed tensors by suffix, on the device that is to multiply.

        Raises:
            ValueError: they are none that the layout can have.
        """
        super().__init__()
        self.layout, self.dtype = layout, dtype
        self.device = next(iter(parts.values())).device
        for suffix in ("low_rank_up", "low_rank_down"):
            part = parts.get(suffix)
            if part is not None and not bool(torch.isfinite(part).all()):
                raise ValueError("a value of the branch is not finite")
            self.hold(suffix, None if part is None else part.to(dtype))

    @classmethod
    def refusal(cls, layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot multiply with such a linear; None when it can."""
        return None

    @classmethod
    def says(cls, layout: Layout, dtype: torch.dtype) -> str:
        """What it does with such a linear, in a few words."""
        raise NotImplementedError

    def hold(self, name: str, tensor: Tensor | None) -> None:
        """Keep a tensor that moves with the module and is not saved."""
        self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in) → (rows, out), in the dtype of x."""
        y = self.multiply(x)
        if self.low_rank_up is not None and self.low_rank_down is not None:
            y = y + nn.functional.linear(nn.functional.linear(x, self.low_rank_down), self.low_rank_up)
        return y

    def multiply(self, x: Tensor) -> Tensor:
        """``x Wᵀ`` for x (rows, in), in the dtype of x."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if not self.moves:
            refuse_change(fn, self.name, self.device, self.dtype)
            fn = partial(_as_bytes, fn)  # operands may have another dtype than activations, and keep it
        result: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.name}, {self.dtype}"


class Guard(nn.Module):
    """The first module of a packed model, so that a change its kernels refuse is refused before others have made it."""

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        """Remember where, and in which dtype, kernels must stay."""
        super().__init__()
        self.fixed = {(kernel.name, kernel.device, kernel.dtype) for kernel in kernels if not kernel.moves}

    def put_before(self, module: nn.Module) -> None:
        """Become the first child of a module."""
        others = dict(module.named_children())
        module._modules.clear()
        module._modules |= {"compress_guard": self, **others}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, device, dtype in self.fixed:
            refuse_change(fn, name, device, dtype)
        return self


def refuse_change(fn: Callable[[Tensor], Tensor], kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RunError where `fn`, as `Module.to` applies it, would give a kernel another type of device or dtype."""
    probe = fn(torch.empty(0, dtype=dtype, device=device))
    if (probe.device.type, probe.dtype) != (device.type, dtype):
        raise RunError(
            f"the weights are packed for {device.type} and {dtype}, not {probe.device.type} and {probe.dtype}",
            where=f"the kernel {kernel}",
            fix="give device and dtype to compress.load, not to the loaded model",
        )


def _as_bytes(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What `fn` makes of the bytes of a tensor, which it may move but not round."""
    return fn(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


def ready(x: Tensor, dtype: torch.dtype, alignment: int = 64) -> Tensor:
    """X (rows, in) as operators want it that read whole vectors: in `dtype`, contiguous, and aligned in memory."""
    x = x.to(dtype).contiguous()
    return x.clone() if x.data_ptr() % alignment else x
