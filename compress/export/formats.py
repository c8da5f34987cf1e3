"""What a checkpoint format is, and which there are.

A format says which linears it can hold, under which tensor names, and turns a linear's final state into these tensors
and back. What it does not hold in a way of its own is written as a plain weight. The tensors of a linear are known
from the lock alone, so the exact output size is, too.
"""

from __future__ import annotations

import math
import re
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from compress.checkpoint import DTYPE_NAMES, DTYPES, Slot
from compress.grid import Grid
from compress.kernels.pack import Layout, check_scale, pack_part
from compress.state import kept_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from compress.checkpoint import TensorInfo
    from compress.grid import GridSpec
    from compress.lock import Linear, Lock

SCALES = ("F16", "BF16", "F32")  # the dtypes that scales may have


class Format:
    """The `huggingface` format: plain weights of the source's names and dtypes, zeros where pruned.

    A quantized weight is written as the values of its codes.
    """

    name: ClassVar[str] = "huggingface"
    packs: ClassVar[bool] = False  # whether it stores codes, and the masks beside them
    any_grid: ClassVar[bool] = True  # NormalFloat grids too, and those that are chosen during the run
    branches: ClassVar[bool] = False  # whether low-rank branches lie among the weights, not in an adapter

    def holds(self, linear: Linear) -> bool:
        """Whether this format stores a linear as codes."""
        return self.packs and linear.grid is not None

    def tells_mask(self, linear: Linear) -> bool:
        """Whether the tensors of a linear say by themselves what its mask keeps."""
        return not self.packs

    def refusal(self, linear: Linear, spec: GridSpec) -> str | None:
        """Why this format cannot hold a linear on such a grid; None when it can."""
        return None

    def conflict(self, grids: set[GridSpec]) -> str | None:
        """Why this format cannot hold these grids in one checkpoint; None when it can."""
        return None

    def warnings(self, lock: Lock) -> list[str]:
        """What a user should know of the readers of what will be written."""
        if lock.scale_sets:
            return [
                f"{self.name}: compress swap-scales needs codes; export gptq, compressed-tensors or packed to use it"
            ]
        return []

    def slots(self, linear: Linear) -> list[Slot]:
        """The tensors that hold a linear's weight."""
        return [Slot(linear.stored, linear.dtype, linear.stored_shape)]

    def encode(self, linear: Linear, slot: Slot, kept: Mapping[str, Tensor]) -> Tensor:
        """One of these tensors, from what the journal keeps of the linear."""
        weight = kept_weight(linear.name, kept, DTYPES[linear.dtype])
        return weight.T.contiguous() if linear.transposed else weight

    def decode(self, linear: Linear, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight (out, in) beside the branch, in the dtype of the checkpoint, from the tensors by suffix."""
        return parts["weight"].T if linear.transposed else parts["weight"]

    def config(self, lock: Lock) -> dict[str, Any] | None:
        """The ``quantization_config`` of config.json; None where the model stays a plain one."""
        return None


class Stored(NamedTuple):
    """A linear of a quantized directory: how the packed format would store it, and whether it has a branch.

    `weight` makes the weight (out, in), without the branch, of the tensors by suffix; `packed` the tensors of the
    layout; `branch` the branch's product. All raise ValueError for what tensors cannot be.
    """

    layout: Layout
    weight: Callable[[Mapping[str, Tensor]], Tensor]
    packed: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    branch: Callable[[Mapping[str, Tensor]], Tensor] | None = None


class PackedFormat(Format):
    """The base of formats that store codes."""

    packs: ClassVar[bool] = True
    any_grid: ClassVar[bool] = False
    method: ClassVar[str]  # the quant_method of config.json
    # Suffixes of the tensors of a linear: all there may be, those of which one is always there, and the scales.
    suffixes: ClassVar[tuple[str, ...]]
    markers: ClassVar[tuple[str, ...]]
    scales: ClassVar[str]

    def stored_scale(self, scale: Tensor) -> Tensor:
        """Scales (out, groups) as the tensor `scales` holds them."""
        return scale

    def modules(self, config: dict[str, Any]) -> set[str]:
        """The linears that a ``quantization_config`` names one by one. Raises ValueError where it cannot be read."""
        return set()

    def stored(
        self,
        config: dict[str, Any],
        module: str,
        infos: Mapping[str, TensorInfo],
        plain: set[torch.dtype],
        read: Callable[[TensorInfo], Tensor],
    ) -> Stored:
        """How a linear is stored.

        Args:
            config: the ``quantization_config``.
            module: the name of the linear.
            infos: its tensors by suffix.
            plain: the dtypes of the model's plain weights.
            read: reads one of them, for formats that store a shape as a tensor.

        Raises:
            ValueError, LookupError, TypeError: tensors and configuration do not belong together.
        """
        raise TypeError(f"{type(self).__name__} must say how it reads a linear")


class CodesFormat(PackedFormat):
    """The base of formats of integer codes, a scale per group of columns; what has no grid is a plain weight."""

    shapes: ClassVar[str]  # the suffix of the tensor that tells the shape

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

    def decode(self, linear: Linear, parts: Mapping[str, Tensor]) -> Tensor:
        """The values of the codes."""
        if linear.grid is None:
            return super().decode(linear, parts)
        dtype = DTYPES[linear.dtype]
        return self.grid(parts, linear.grid).dequantize(dtype).to(dtype)

    def stored(
        self,
        config: dict[str, Any],
        module: str,
        infos: Mapping[str, TensorInfo],
        plain: set[torch.dtype],
        read: Callable[[TensorInfo], Tensor],
    ) -> Stored:
        """By the shapes of the tensors, which must be those that follow from them."""
        if "weight" in infos:
            raise ValueError("there is a plain weight beside the codes")
        spec, shapes = self.read_spec(config, module), {suffix: info.shape for suffix, info in infos.items()}
        where = infos[self.shapes]
        out, width = self.read_shape(shapes, read(where) if math.prod(where.shape) == 2 else None)
        if spec.bits not in (2, 3, 4, 8) or spec.group_size < -1 or spec.group_size == 0 or width % spec.width(width):
            raise ValueError(
                f"there is no grid of {spec.bits} bits with groups of {spec.group_size} for {width} inputs"
            )
        parts = self.parts(out, width, spec)
        odd = sorted(infos.keys() ^ parts.keys())
        if odd:
            raise ValueError(f"{odd[0]} is {'surplus' if odd[0] in infos else 'missing'}")
        for suffix, (name, wanted) in parts.items():
            found = infos[suffix]
            if found.shape != wanted or found.dtype not in ((name,) if name else SCALES):
                raise ValueError(
                    f"{suffix} is {found.dtype} {list(found.shape)}, not {name or 'scales'} {list(wanted)}"
                )
        scale = infos[self.scales].torch_dtype
        # Scales have the dtype of the weight or a smaller one; config.json may name any other.
        value = scale if scale in plain else reduce(torch.promote_types, plain, scale)
        layout = Layout(out, width, value, spec._replace(scale_dtype=scale))

        def grid(tensors: Mapping[str, Tensor]) -> Grid:
            check_scale(tensors[self.scales])
            return self.grid(tensors, spec)

        def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = grid(tensors)
            return {suffix: pack_part(layout, suffix, found, None, None) for suffix in layout.tensors()}

        return Stored(layout, lambda tensors: grid(tensors).dequantize(value).to(value), packed)

    def parts(self, out: int, width: int, spec: GridSpec) -> dict[str, tuple[str | None, tuple[int, ...]]]:
        """Suffix → dtype (None: that of the scales) and shape of each tensor of a linear (out, width)."""
        raise TypeError(f"{type(self).__name__} must say which tensors it stores")

    def part(self, suffix: str, grid: Grid) -> Tensor:
        """The tensor of this suffix."""
        raise TypeError(f"{type(self).__name__} must say how it encodes {suffix}")

    def read_spec(self, config: dict[str, Any], name: str) -> GridSpec:
        """The grid of a linear by a ``quantization_config``. Raises ValueError or KeyError for what is not read."""
        raise TypeError(f"{type(self).__name__} must say how it reads a configuration")

    def read_shape(self, shapes: Mapping[str, tuple[int, ...]], stored: Tensor | None) -> tuple[int, int]:
        """(out, in) of a linear by the shapes of its tensors; `stored` is the tensor `shapes` if it has two values."""
        raise TypeError(f"{type(self).__name__} must say how it reads a shape")

    def grid(self, parts: Mapping[str, Tensor], spec: GridSpec) -> Grid:
        """The inverse of `part` for all suffixes together."""
        raise TypeError(f"{type(self).__name__} must say how it decodes")


def selects(pattern: str, module: str) -> bool:
    """Whether a regular expression of a ``quantization_config`` matches the name of a linear from its start on.

    Raises:
        ValueError: matching could take forever: a repeated group, more than two repetitions, a flag, great length.
    """
    bare = re.sub(r"\\.|\[[^\]]*\]", "_", pattern, flags=re.DOTALL)  # escapes and classes are single characters
    endless = re.search(r"\)[*+?{]|\(\?[^:]", bare) or len(re.findall(r"[*+{]", bare)) > 2
    if endless or len(pattern) > 1000 or len(module) > 1000:
        raise ValueError(f"the pattern {pattern[:100]!r} could take forever to match")
    return re.match(pattern, module) is not None


def scale_dtype(linear: Linear, spec: GridSpec) -> str:
    """The dtype in which the scales of a linear are stored, by its name in files."""
    return DTYPE_NAMES[spec.scale_dtype] if spec.scale_dtype else linear.dtype


def known_formats() -> dict[str, Format]:
    """Every format, by the name that a plan uses."""
    from compress.export.compressed_tensors import CompressedTensors
    from compress.export.gptq import GPTQFormat
    from compress.export.packed import Packed

    return {one.name: one for one in (Format(), GPTQFormat(), CompressedTensors(), Packed())}


def split_layers(lock: Lock, form: str) -> list[str]:
    """A warning where linears that share an input, which vLLM fuses, have different grids."""
    subsets: dict[tuple[int, int], set[GridSpec | None]] = {}
    for linear in lock.linears:
        subsets.setdefault((linear.block, linear.subset), set()).add(linear.grid)
    if any(len(grids) > 1 for grids in subsets.values()):
        return [f"{form}: linears that share an input have different grids; vLLM fuses them and refuses that"]
    return []
