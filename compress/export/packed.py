"""The `packed` format: 2:4, integer and NormalFloat codes, and low-rank branches, for `compress.load` and its kernels.

What is stored of a linear is in `compress.kernels.pack`. config.json says it for each linear, in `quantization_config`:

    {"quant_method": "compress", "version": 1, "schemes": [{"modules": [names], "shape": [out, in], "dtype": "float16",
      "sparsity": "2:4" or null, "rank": 0,
      "grid": null or {"kind": "int" or "nf", "bits": 4, "group_size": 128, "symmetric": true, "scale_dtype": "float16",
        "scale_codes": null or {"bits": 8, "group_size": 256, "peak_dtype": "float32"}}}]}

A module that no scheme names is a plain one. Weights are (out, in) also where the source stores the transpose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from compress.checkpoint import DTYPE_NAMES, DTYPES, Slot
from compress.errors import RunError
from compress.export.formats import PackedFormat, Stored
from compress.grid import Grid, GridSpec, ScaleSpec
from compress.kernels.pack import SUFFIXES, Layout, pack_part, unpack_branch, unpack_weight
from compress.passes.base import Invariant
from compress.state import Pattern, kept_low_rank, kept_weight, unpack_bits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from compress.checkpoint import TensorInfo
    from compress.lock import Linear, Lock

VERSION = 1
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Packed(PackedFormat):
    """Positions of kept weights, codes, and branches among the weights."""

    name: ClassVar[str] = "packed"
    method: ClassVar[str] = "compress"
    any_grid: ClassVar[bool] = True
    branches: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    markers: ClassVar[tuple[str, ...]] = ("codes", "values", "low_rank_up")
    scales: ClassVar[str] = "scale"

    def holds(self, linear: Linear) -> bool:
        """Whether more is stored than the plain weight."""
        return linear.grid is not None or linear.rank > 0 or _two_of_four(linear)

    def tells_mask(self, linear: Linear) -> bool:
        """Of exactly two of four columns the positions are the mask; a plain weight has zeros."""
        if linear.grid is None and not _two_of_four(linear):
            return True
        pruning = [one for _, one in linear.passes if Invariant.MASK in one.provides()]
        exact = len(pruning) == 1 and getattr(pruning[0], "pattern", None) in (Pattern(2, 4), Pattern(1, 2))
        return exact and _two_of_four(linear)

    def warnings(self, lock: Lock) -> list[str]:
        """Who reads it."""
        if any(self.holds(linear) for linear in lock.linears):
            return ["packed: compress.load reads it, and transformers after import compress; other servers do not"]
        return []

    def slots(self, linear: Linear) -> list[Slot]:
        """The tensors of the layout, or the plain weight."""
        if not self.holds(linear):
            return super().slots(linear)
        stem = linear.stored.removesuffix("weight")
        parts = layout_of(linear).tensors()
        return [Slot(f"{stem}{suffix}", DTYPE_NAMES[dtype], shape) for suffix, (dtype, shape) in parts.items()]

    def encode(self, linear: Linear, slot: Slot, kept: Mapping[str, Tensor]) -> Tensor:
        """A tensor of the layout, or the plain weight."""
        if not self.holds(linear):
            return super().encode(linear, slot, kept)
        packed = kept.get(f"{linear.name}:mask")
        mask = None if packed is None else unpack_bits(packed, linear.in_features)
        told = self.tells_mask(linear) and _two_of_four(linear)
        if told and (mask is None or int(mask.sum()) != mask.numel() // 2):
            raise RunError(
                f"{linear.name}: the mask does not keep exactly two of every four weights",
                where=str(self.name),
                fix="this is a mistake in the pass that promised the pattern; export huggingface instead",
            )
        weight = Grid.restore(linear.name, kept) or kept_weight(linear.name, kept, DTYPES[linear.dtype])
        branch = kept_low_rank(linear.name, kept)
        return pack_part(layout_of(linear), slot.name.rpartition(".")[2], weight, mask, branch)

    def decode(self, linear: Linear, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight beside the branch."""
        return unpack_weight(layout_of(linear), parts) if self.holds(linear) else super().decode(linear, parts)

    def config(self, lock: Lock) -> dict[str, Any]:
        """A scheme for each layout, and the modules that have it."""
        schemes: dict[Layout, list[str]] = {}
        for linear in lock.linears:
            if self.holds(linear):
                schemes.setdefault(layout_of(linear), []).append(linear.name)
        found = [write_scheme(layout, modules) for layout, modules in schemes.items()]
        return {"quant_method": self.method, "version": VERSION, "schemes": found}

    def modules(self, config: dict[str, Any]) -> set[str]:
        """Those of all schemes."""
        check_version(config)
        schemes = config.get("schemes")
        if not isinstance(schemes, list) or not all(isinstance(one.get("modules"), list) for one in schemes):
            raise ValueError("there is no list of schemes with modules")
        return {module for scheme in schemes for module in scheme["modules"]}

    def stored(
        self,
        config: dict[str, Any],
        module: str,
        infos: Mapping[str, TensorInfo],
        plain: set[torch.dtype],
        read: Callable[[TensorInfo], Tensor],
    ) -> Stored:
        """By the scheme of the module."""
        layout = find_layout(config, module)
        layout.check({suffix: (info.torch_dtype, info.shape) for suffix, info in infos.items()})

        def product(parts: Mapping[str, Tensor]) -> Tensor:
            branch = unpack_branch(layout, parts)
            assert branch is not None
            return branch.product()

        branch = product if layout.rank else None
        return Stored(layout, lambda parts: unpack_weight(layout, parts), lambda parts: parts, branch)


def layout_of(linear: Linear) -> Layout:
    """How a linear of the lock is stored."""
    dtype = DTYPES[linear.dtype]
    return Layout(linear.out_features, linear.in_features, dtype, linear.grid, _two_of_four(linear), linear.rank)


def _two_of_four(linear: Linear) -> bool:
    """Whether a pattern of a pass leaves at most two of every four columns."""
    if linear.in_features % 4:
        return False
    for _, one in linear.passes:
        pattern = getattr(one, "pattern", None)
        if isinstance(pattern, Pattern) and Invariant.PATTERN in one.provides():
            inside = pattern.kept * (4 // pattern.group) if 4 % pattern.group == 0 else 4
            if inside <= 2 or (pattern.group % 4 == 0 and pattern.kept <= 2):
                return True
    return False


def write_scheme(layout: Layout, modules: list[str]) -> dict[str, Any]:
    """A layout and the modules that have it, as JSON values."""
    grid, second = layout.grid, layout.grid and layout.grid.second
    return {
        "modules": modules,
        "shape": [layout.out_features, layout.in_features],
        "dtype": _name(layout.dtype),
        "sparsity": "2:4" if layout.sparse else None,
        "grid": grid
        and {
            "kind": grid.kind,
            "bits": grid.bits,
            "group_size": grid.group_size,
            "symmetric": grid.symmetric,
            "scale_dtype": _name(grid.scale_dtype or layout.dtype),
            "scale_codes": second
            and {"bits": second.bits, "group_size": second.group, "peak_dtype": _name(second.peak_dtype)},
        },
        "rank": layout.rank,
    }


def read_scheme(scheme: dict[str, Any]) -> Layout:
    """The inverse of `write_scheme`. Raises ValueError, LookupError or TypeError for what it does not write."""
    out, width = scheme["shape"]
    rank, given, spec = scheme["rank"], scheme["grid"], None
    if not all(type(n) is int and n > 0 for n in (out, width)) or type(rank) is not int or rank < 0:
        raise ValueError(f"there is no linear of {out} × {width} with a branch of rank {rank}")
    if scheme["sparsity"] not in (None, "2:4") or (scheme["sparsity"] and width % 4):
        raise ValueError(f"there is no sparsity {scheme['sparsity']} of {width} inputs")
    if given is not None:
        bits, size, kind, second = given["bits"], given["group_size"], given["kind"], given["scale_codes"]
        known = type(size) is int and (size == -1 or size > 0) and _bits(bits) and kind in ("int", "nf")
        if not known or width % (width if size == -1 else size) or (kind == "nf" and not given["symmetric"]):
            raise ValueError(f"there is no grid of {bits} bits ({kind}) with groups of {size} for {width} inputs")
        of_scales = None
        if second is not None:
            of_scales = ScaleSpec(second["bits"], second["group_size"], FLOATS[second["peak_dtype"]])
            if not _bits(of_scales.bits) or type(of_scales.group) is not int or of_scales.group < 1:
                raise ValueError(f"there are no scales of {of_scales.bits} bits in groups of {of_scales.group}")
        spec = GridSpec(bits, size, bool(given["symmetric"]), FLOATS[given["scale_dtype"]], kind, of_scales)
    return Layout(out, width, FLOATS[scheme["dtype"]], spec, scheme["sparsity"] is not None, rank)


def _bits(value: object) -> bool:
    """Whether codes have so many bits; JSON's 4.0 is no integer."""
    return type(value) is int and value in (2, 3, 4, 8)


def check_version(config: dict[str, Any]) -> None:
    """Raise ValueError for a version of the format that is not this one."""
    version = config.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(f"version {version} of the packed format is newer than {VERSION}; update compress")
    if version != VERSION:
        raise ValueError(f"there is no version {version} of the packed format")


def find_layout(config: dict[str, Any], module: str) -> Layout:
    """The layout of a module. Raises ValueError, LookupError or TypeError for a configuration that gives none."""
    check_version(config)
    schemes = [one for one in config["schemes"] if module in one["modules"]]
    if len(schemes) != 1:
        raise ValueError(f"{len(schemes)} schemes name it")
    return read_scheme(schemes[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
