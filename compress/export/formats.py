"""What a checkpoint format is, and which there are.

A format says which linears it can hold, under which tensor names, and turns a linear's final state into these tensors
and back. What it does not hold in a way of its own is written as a plain weight. The tensors of a linear are known
from the lock alone, so the exact output size is, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from compress.checkpoint import DTYPE_NAMES, DTYPES, Slot
from compress.grid import Grid
from compress.state import kept_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.grid import GridSpec
    from compress.lock import Linear, Lock


class Format:
    """The `huggingface` format: plain weights of the source's names and dtypes, zeros where pruned.

    A quantized weight is written as the values of its codes.
    """

    name: ClassVar[str] = "huggingface"
    packs: ClassVar[bool] = False  # whether it stores codes, and the masks beside them

    def holds(self, linear: Linear) -> bool:
        """Whether this format stores a linear as codes."""
        return self.packs and linear.grid is not None

    def refusal(self, linear: Linear, spec: GridSpec) -> str | None:
        """Why this format cannot hold a linear on such a grid; None when it can."""
        return None

    def conflict(self, grids: set[GridSpec]) -> str | None:
        """Why this format cannot hold these grids in one checkpoint; None when it can."""
        return None

    def warnings(self, lock: Lock) -> list[str]:
        """What a user should know of the readers of what will be written."""
        if lock.scale_sets:
            return [f"{self.name}: compress swap-scales needs codes; export gptq or compressed-tensors to use it"]
        return []

    def slots(self, linear: Linear) -> list[Slot]:
        """The tensors that hold a linear's weight."""
        return [Slot(linear.stored, linear.dtype, linear.stored_shape)]

    def encode(self, linear: Linear, slot: Slot, kept: Mapping[str, Tensor]) -> Tensor:
        """One of these tensors, from what the journal keeps of the linear."""
        weight = kept_weight(linear.name, kept, DTYPES[linear.dtype])
        return weight.T.contiguous() if linear.transposed else weight

    def config(self, lock: Lock) -> dict[str, Any] | None:
        """The ``quantization_config`` of config.json; None where the model stays a plain one."""
        return None


class PackedFormat(Format):
    """The base of formats that store codes."""

    packs: ClassVar[bool] = True
    # Suffixes of the tensors of a linear: all there may be, the one with the codes, its scales, what tells its shape.
    suffixes: ClassVar[tuple[str, ...]]
    marker: ClassVar[str]
    scales: ClassVar[str]
    shapes: ClassVar[str]

    def slots(self, linear: Linear) -> list[Slot]:
        """The tensors of the codes, or the plain weight where there is no grid."""
        if linear.grid is None:
            return super().slots(linear)
        return [
            Slot(f"{linear.stored.removesuffix('weight')}{suffix}", dtype or scale_dtype(linear, linear.grid), shape)
            for suffix, (dtype, shape) in self.parts(linear.out_features, linear.in_features, linear.grid).items()
        ]

    def encode(self, linear: Linear, slot: Slot, kept: Mapping[str, Tensor]) -> Tensor:
        """A tensor of the codes, or the plain weight."""
        grid = Grid.restore(linear.name, kept)
        if grid is None:
            return super().encode(linear, slot, kept)
        return self.part(slot.name.rpartition(".")[2], grid)

    def parts(self, out: int, width: int, spec: GridSpec) -> dict[str, tuple[str | None, tuple[int, ...]]]:
        """Suffix → dtype (None: that of the scales) and shape of each tensor of a linear (out, width)."""
        raise TypeError(f"{type(self).__name__} must say which tensors it stores")

    def part(self, suffix: str, grid: Grid) -> Tensor:
        """The tensor of this suffix."""
        raise TypeError(f"{type(self).__name__} must say how it encodes {suffix}")

    def stored_scale(self, scale: Tensor) -> Tensor:
        """Scales (out, groups) as the tensor `scales` holds them."""
        return scale

    def read_spec(self, config: dict[str, Any], name: str) -> GridSpec:
        """The grid of a linear by a ``quantization_config``. Raises ValueError or KeyError for what is not read."""
        raise TypeError(f"{type(self).__name__} must say how it reads a configuration")

    def read_shape(self, shapes: Mapping[str, tuple[int, ...]], stored: Tensor | None) -> tuple[int, int]:
        """(out, in) of a linear by the shapes of its tensors; `stored` is the tensor `shapes` if it has two values."""
        raise TypeError(f"{type(self).__name__} must say how it reads a shape")

    def decode(self, parts: Mapping[str, Tensor], spec: GridSpec) -> Grid:
        """The inverse of `part` for all suffixes together."""
        raise TypeError(f"{type(self).__name__} must say how it decodes")


def scale_dtype(linear: Linear, spec: GridSpec) -> str:
    """The dtype in which the scales of a linear are stored, by its name in files."""
    return DTYPE_NAMES[spec.scale_dtype] if spec.scale_dtype else linear.dtype


def known_formats() -> dict[str, Format]:
    """Every format, by the name that a plan uses."""
    from compress.export.compressed_tensors import CompressedTensors
    from compress.export.gptq import GPTQFormat

    return {one.name: one for one in (Format(), GPTQFormat(), CompressedTensors())}


def split_layers(lock: Lock, form: str) -> list[str]:
    """A warning where linears that share an input, which vLLM fuses, have different grids."""
    subsets: dict[tuple[int, int], set[GridSpec | None]] = {}
    for linear in lock.linears:
        subsets.setdefault((linear.block, linear.subset), set()).add(linear.grid)
    if any(len(grids) > 1 for grids in subsets.values()):
        return [f"{form}: linears that share an input have different grids; vLLM fuses them and refuses that"]
    return []
