"""Which kernel multiplies with a linear, by its layout, the device and the dtype of activations; and why.

A new backend is one more class in `KERNELS`: the first that does not refuse is taken, and the last never refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from compress.kernels.cpu import Int4, Int8
from compress.kernels.gpu import TritonInt4, TritonPortable, TritonSparse24, TritonSparse24Int4
from compress.kernels.reference import Decoded, Reference

if TYPE_CHECKING:
    import torch

    from compress.kernels.kernel import Kernel
    from compress.kernels.pack import Layout

Kernels = Literal["auto", "both", "portable", "decoded", "reference"]
FASTEST = (TritonSparse24Int4, TritonSparse24, TritonInt4, TritonPortable, Int8, Int4, Decoded)  # the fastest first
KERNELS: dict[str, tuple[type[Kernel], ...]] = {
    "auto": FASTEST,
    "both": FASTEST,  # and a plain weight beside it
    "portable": (TritonPortable, Decoded),
    "decoded": (Decoded,),
    "reference": (Reference,),
}


class Choice(NamedTuple):
    """A kernel and, in words, what it does and why no faster one does it.

    Attributes:
        most_rows: of x that it multiplies; more are multiplied with a plain weight. None: all.
    """

    kernel: type[Kernel]
    why: str
    most_rows: int | None = None


def choose(layout: Layout, device: torch.device, dtype: torch.dtype, kernels: Kernels = "auto") -> Choice:
    """The first kernel that can multiply with such a linear."""
    refused: dict[str, list[str]] = {}  # reason -> kernels
    for kernel in KERNELS[kernels]:
        if kernel.runs_on not in (None, device.type):
            continue
        problem = kernel.refusal(layout, device, dtype)
        if problem is None:
            why, most = kernel.says(layout, dtype), kernel.most_rows if kernels == "both" else None
            if most:
                why += f"; more than {most} rows with a plain weight"
            elif kernel.most_rows:
                why += "; for many rows decoded in each product"
            packed = layout.grid is not None or layout.sparse
            if refused and packed and kernel.fallback:
                reasons = [f"{' and '.join(names)}: {reason}" for reason, names in refused.items()]
                why += f" ({'; '.join(reasons)})"
            return Choice(kernel, why, most)
        refused.setdefault(problem, []).append(kernel.name)
    raise AssertionError(f"the last of the kernels {kernels} refuses a layout")
