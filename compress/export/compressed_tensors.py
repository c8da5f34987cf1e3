"""The `compressed-tensors` format, `pack-quantized`, weights only: what transformers and vLLM read.

For a linear (out, in) with groups of g columns: `weight_packed` (out, ⌈in · bits / 32⌉) int32, a stream of codes along
each row; `weight_scale` (out, groups); `weight_shape` (2,) int64; and for asymmetric grids `weight_zero_point`
(⌈out · bits / 32⌉, groups) int32, a stream of zero-points down each column. The format thinks of signed codes and
stores them plus 2^(bits−1): our codes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from compress.export.bitstream import pack, unpack, words
from compress.export.formats import CodesFormat, selects, split_layers
from compress.grid import Grid, GridSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.lock import Linear, Lock

VERSION = "0.20.0"  # of the compressed-tensors package whose layout this is; 3 bits were packed otherwise before

STRATEGIES = ("group", "channel")


class CompressedTensors(CodesFormat):
    """Codes along the rows, schemes by layer name in config.json."""

    name: ClassVar[str] = "compressed-tensors"
    method: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    markers: ClassVar[tuple[str, ...]] = ("weight_packed",)
    scales: ClassVar[str] = "weight_scale"
    shapes: ClassVar[str] = "weight_shape"

    def refusal(self, linear: Linear, spec: GridSpec) -> str | None:
        """Its readers know nn.Linear only."""
        return "its readers do not take transposed linears (Conv1D)" if linear.transposed else None

    def warnings(self, lock: Lock) -> list[str]:
        """What fewer readers understand."""
        grids = {linear.grid for linear in lock.linears if linear.grid}
        found = []
        odd = sorted({grid.bits for grid in grids} - {4, 8})
        if odd:
            found.append(f"compressed-tensors: vLLM reads 4 and 8 bits of this format, not {odd[0]} (on a CPU only 4)")
        if any(not grid.symmetric for grid in grids):
            found.append("compressed-tensors: transformers reads asymmetric grids with dequantize=True only")
        return found + split_layers(lock, self.name)

    def parts(self, out: int, width: int, spec: GridSpec) -> dict[str, tuple[str | None, tuple[int, ...]]]:
        """The tensors of a linear."""
        groups = spec.groups(width)
        found: dict[str, tuple[str | None, tuple[int, ...]]] = {
            "weight_packed": ("I32", (out, words(width, spec.bits))),
            "weight_scale": (None, (out, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not spec.symmetric:
            found["weight_zero_point"] = ("I32", (words(out, spec.bits), groups))
        return found

    def part(self, suffix: str, grid: Grid) -> Tensor:
        """One of them."""
        if suffix == "weight_packed":
            return pack(grid.codes, grid.spec.bits)
        if suffix == "weight_scale":
            return grid.scale
        if suffix == "weight_zero_point":
            return pack(grid.zero.T.contiguous(), grid.spec.bits).T.contiguous()
        return torch.tensor(grid.codes.shape, dtype=torch.int64)

    def grid(self, parts: Mapping[str, Tensor], spec: GridSpec) -> Grid:
        """A grid from the tensors of a linear."""
        out, width = parts["weight_shape"].tolist()
        scale = parts["weight_scale"]
        if spec.symmetric:
            zero = torch.full(scale.shape, spec.middle, dtype=torch.uint8, device=scale.device)
        else:
            zero = unpack(parts["weight_zero_point"].T.contiguous(), spec.bits, out).T.contiguous()
        return Grid(spec, scale, zero, unpack(parts["weight_packed"], spec.bits, width))

    def read_spec(self, config: dict[str, Any], name: str) -> GridSpec:
        """The scheme whose targets match the linear."""
        schemes = [group for group in config["config_groups"].values() if _targets(group["targets"], name)]
        weights = schemes[0]["weights"]
        if config["format"] != "pack-quantized" or weights["type"] != "int" or weights["strategy"] not in STRATEGIES:
            raise ValueError(f"the scheme of {name} is not pack-quantized integers by group or channel")
        if any(schemes[0].get(key) is not None for key in ("input_activations", "output_activations")):
            raise ValueError(f"the scheme of {name} quantizes activations, which is not read")
        group_size = -1 if weights["strategy"] == "channel" else int(weights["group_size"])
        return GridSpec(int(weights["num_bits"]), group_size, bool(weights["symmetric"]))

    def read_shape(self, shapes: Mapping[str, tuple[int, ...]], stored: Tensor | None) -> tuple[int, int]:
        """The shape is a tensor of its own."""
        if stored is None:
            raise ValueError("weight_shape does not hold two numbers")
        out, width = stored.tolist()
        if not 0 < out == shapes["weight_packed"][0] or not 0 < width <= 32 * shapes["weight_packed"][1]:
            raise ValueError(f"weight_shape says {out} × {width}, which the codes do not fill")
        return out, width

    def config(self, lock: Lock) -> dict[str, Any]:
        """A scheme for each grid and the layers that have it; what has none is ignored."""
        schemes: dict[GridSpec, list[str]] = {}
        for linear in lock.linears:
            if linear.grid:
                schemes.setdefault(linear.grid, []).append(linear.name)
        whole = len(schemes) == 1 and all(linear.grid for linear in lock.linears)
        groups = {}
        for number, (spec, names) in enumerate(schemes.items()):
            weights: dict[str, Any] = {
                "num_bits": spec.bits,
                "type": "int",
                "symmetric": spec.symmetric,
                "strategy": "channel" if spec.group_size == -1 else "group",
                "group_size": None if spec.group_size == -1 else spec.group_size,
                "dynamic": False,
            }
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if whole else [rf"re:^{re.escape(name)}$" for name in names],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        ours = {linear.name for linear in lock.linears}
        every = lock.skeleton.model.named_modules()
        outside = [name for name, module in every if isinstance(module, nn.Linear) and name not in ours]
        dense = [linear.name for linear in lock.linears if linear.grid is None]
        return {
            "quant_method": self.method,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": [*outside, *dense],
            "version": VERSION,
        }


def _targets(targets: list[str], name: str) -> bool:
    """Whether targets name a linear: the class, a name or a regular expression, as the format spells them."""
    patterns = (target.removeprefix("re:") for target in targets if target.startswith("re:"))
    return "Linear" in targets or name in targets or any(selects(pattern, name) for pattern in patterns)
