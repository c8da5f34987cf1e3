"""The `gptq` format: what AutoGPTQ defined, and GPTQModel, transformers and vLLM read.

For a linear (out, in) with groups of g columns: `qweight` (in · bits / 32, out) int32, a stream of codes down each
column; `qzeros` (groups, out · bits / 32) int32, a stream of zero-points along each row; `scales` (groups, out);
`g_idx` (in,) int32, the group of each input. Version 1 ("gptq") stores zero-points less one and so has none that is 0:
symmetric grids are written in it. Version 2 ("gptq_v2") stores them as they are: asymmetric grids are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from compress import __version__
from compress.export.bitstream import pack, unpack, words
from compress.export.formats import CodesFormat, selects, split_layers
from compress.grid import Grid, GridSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.lock import Linear, Lock

# vLLM fuses these linears and looks rules up by the fused name.
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # what GPTQModel 7.6, the format's reference reader, takes


class GPTQFormat(CodesFormat):
    """Codes down the columns, zero-points packed, an index of groups."""

    name: ClassVar[str] = "gptq"
    method: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    markers: ClassVar[tuple[str, ...]] = ("qweight",)
    scales: ClassVar[str] = "scales"
    shapes: ClassVar[str] = "g_idx"

    def refusal(self, linear: Linear, spec: GridSpec) -> str | None:
        """Streams must fill whole words in both directions."""
        for what, width in (("input", linear.in_features), ("output", linear.out_features)):
            if width * spec.bits % 32:
                return f"{width} {what} features of {spec.bits} bits do not fill 32-bit words"
        if spec.group_size not in GROUP_SIZES:
            return f"its readers take group sizes {', '.join(map(str, GROUP_SIZES))}, not {spec.group_size}"
        return None

    def conflict(self, grids: set[GridSpec]) -> str | None:
        """The version, and so the way zero-points are stored, is one for all."""
        mixed = len({grid.symmetric for grid in grids}) > 1
        return "one checkpoint of it has symmetric grids or asymmetric ones, not both" if mixed else None

    def warnings(self, lock: Lock) -> list[str]:
        """What fewer readers understand."""
        grids = {linear.grid for linear in lock.linears if linear.grid}
        found = []
        if len(grids) > 1:
            found.append("gptq: linears have different grids, which transformers does not read in this format")
        if any(not g.symmetric or g.bits not in (4, 8) or g.group_size not in (-1, 32, 64, 128) for g in grids):
            wanted = "symmetric 4 and 8 bits (on a CPU 4), groups of 32, 64, 128 or a row"
            found.append(f"gptq: vLLM reads only {wanted}")
        if grids and lock.architecture.transposed:
            found.append("gptq: GPTQModel reads transposed linears (Conv1D), transformers does not")
        return found + split_layers(lock, self.name)

    def parts(self, out: int, width: int, spec: GridSpec) -> dict[str, tuple[str | None, tuple[int, ...]]]:
        """The four tensors of a linear."""
        groups = spec.groups(width)
        return {
            "qweight": ("I32", (words(width, spec.bits), out)),
            "qzeros": ("I32", (groups, words(out, spec.bits))),
            "scales": (None, (groups, out)),
            "g_idx": ("I32", (width,)),
        }

    def part(self, suffix: str, grid: Grid) -> Tensor:
        """One of the four."""
        spec, width = grid.spec, grid.codes.shape[1]
        if suffix == "qweight":
            return pack(grid.codes, spec.bits).T.contiguous()
        if suffix == "qzeros":
            return pack((grid.zero - _less(spec)).T.contiguous(), spec.bits)
        if suffix == "scales":
            return self.stored_scale(grid.scale)
        return torch.arange(width, dtype=torch.int32) // spec.width(width)

    def stored_scale(self, scale: Tensor) -> Tensor:
        """A row per group."""
        return scale.T.contiguous()

    def grid(self, parts: Mapping[str, Tensor], spec: GridSpec) -> Grid:
        """A grid from the four tensors, whose groups must be of neighbouring columns."""
        scale = parts["scales"].T.contiguous()
        out, width = scale.shape[0], parts["g_idx"].shape[0]
        index = torch.arange(width, dtype=torch.int32, device=scale.device) // spec.width(width)
        if not torch.equal(parts["g_idx"], index):
            raise ValueError("its groups are gathered by an index (desc_act), which is not read")
        codes = unpack(parts["qweight"].T.contiguous(), spec.bits, width)
        zero = unpack(parts["qzeros"], spec.bits, out).T.contiguous() + _less(spec) & spec.largest
        if spec.symmetric and bool((zero != spec.middle).any()):
            raise ValueError("a zero-point of a symmetric grid is not the middle code")
        return Grid(spec, scale, zero, codes)

    def read_spec(self, config: dict[str, Any], name: str) -> GridSpec:
        """The grid that the configuration gives a linear."""
        found = {key: config[key] for key in ("bits", "group_size", "sym")}
        for pattern, other in (config.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and selects(pattern.removeprefix("+:"), name):
                found |= {key: value for key, value in other.items() if key in found}
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version != ("gptq" if found["sym"] else "gptq_v2"):
            kind = "symmetric" if found["sym"] else "asymmetric"
            raise ValueError(f"{kind} grids in the version {version} are not read")
        return GridSpec(int(found["bits"]), int(found["group_size"]), bool(found["sym"]))

    def read_shape(self, shapes: Mapping[str, tuple[int, ...]], stored: Tensor | None) -> tuple[int, int]:
        """Scales have a column per output, the index an entry per input."""
        return shapes["scales"][1], shapes["g_idx"][0]

    def config(self, lock: Lock) -> dict[str, Any]:
        """What readers need to rebuild the layers: the commonest grid, and by layer what differs from it."""
        held = [linear for linear in lock.linears if linear.grid]
        grids = [linear.grid for linear in held]
        usual = max(dict.fromkeys(grids), key=grids.count)
        assert usual is not None
        version = "gptq" if usual.symmetric else "gptq_v2"
        config: dict[str, Any] = {
            "quant_method": self.method,
            "bits": usual.bits,
            "group_size": usual.group_size,
            "sym": usual.symmetric,
            "desc_act": False,
            "format": version,
            "checkpoint_format": version,
            "pack_dtype": "int32",
            "lm_head": False,
            "damp_percent": 0.01,
            "true_sequential": False,
            "meta": {"quantizer": [f"compress:{__version__}"]},
        }
        if len(held) < len(lock.linears):
            config["modules_in_block_to_quantize"] = [_endings(lock, held)]
        dynamic: dict[str, dict[str, Any]] = {}
        for linear in lock.linears:
            pattern = _rule(linear.name)
            if linear.grid is None:
                dynamic[f"-:{pattern}"] = {}
            elif linear.grid != usual:
                one = linear.grid
                dynamic[f"+:{pattern}"] = {"bits": one.bits, "group_size": one.group_size, "sym": one.symmetric}
        return config | ({"dynamic": dynamic} if dynamic else {})


def _rule(name: str) -> str:
    """A regular expression for a linear, by its own name and the one that vLLM gives it."""
    parent, _, leaf = name.rpartition(".")
    leaves = f"(?:{leaf}|{FUSED[leaf]})" if leaf in FUSED else re.escape(leaf)
    return rf"^{re.escape(parent)}\.{leaves}$"


def _less(spec: GridSpec) -> int:
    """What version 1 takes from a zero-point."""
    return 1 if spec.symmetric else 0


def _endings(lock: Lock, held: list[Linear]) -> list[str]:
    """Names that end like those of all quantized linears and no other: within blocks if possible, else in full."""
    prefixes = {linear.name: lock.skeleton.prefix(linear.block) for linear in lock.linears}
    inside = {linear.name.removeprefix(prefixes[linear.name]) for linear in held}
    left = {linear.name.removeprefix(prefixes[linear.name]) for linear in lock.linears if linear.grid is None}
    return sorted(linear.name for linear in held) if inside & left else sorted(inside)
