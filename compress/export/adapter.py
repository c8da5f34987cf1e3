"""The low-rank branches as a PEFT LoRA adapter, in the folder ``adapter`` beside the weights.

For a linear (out, in) with ``y = W x + up (down x)``: `lora_A.weight` is down (r, in), `lora_B.weight` is up (out, r),
and `lora_alpha` equals r, so that PEFT's factor is 1. `PeftModel.from_pretrained(base, "DIR/adapter")` puts it on the
base that the directory holds. It is not merged: that would fill what was pruned and leave the grid.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint, Shard, Slot, read_json
from compress.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.lock import Linear, Lock

FOLDER = "adapter"
PREFIX = "base_model.model."


def adapter_shard(linears: Mapping[str, tuple[Linear, int]]) -> Shard | None:
    """The file of the branches of linears, by name with their ranks; None when there is none."""
    slots = []
    for name, (linear, rank) in linears.items():
        if rank:
            slots.append(Slot(f"{PREFIX}{name}.lora_A.weight", linear.dtype, (rank, linear.in_features)))
            slots.append(Slot(f"{PREFIX}{name}.lora_B.weight", linear.dtype, (linear.out_features, rank)))
    return Shard("adapter_model.safetensors", tuple(slots)) if slots else None


def write_config(lock: Lock, ranks: Mapping[str, int], directory: Path, base: str) -> None:
    """Write ``adapter_config.json`` for branches of these ranks by linear; those of rank 0 have none."""
    present = {name: rank for name, rank in ranks.items() if rank}
    usual = max(set(present.values()), key=list(present.values()).count)
    others = {name: rank for name, rank in present.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(present),
        "fan_in_fan_out": bool(lock.architecture.transposed),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class Branches:
    """The branches of an adapter folder, by the module name of their linear."""

    def __init__(self, directory: Path) -> None:
        """Read the headers. Raises ModelError for what is not an adapter of ours."""
        self.directory = directory
        config = read_json(directory / "adapter_config.json")
        plain = config.get("peft_type") == "LORA" and not config.get("use_dora") and not config.get("use_rslora")
        alphas = {**dict.fromkeys(config.get("target_modules") or (), config.get("lora_alpha"))}
        ranks = {**dict.fromkeys(config.get("target_modules") or (), config.get("r"))}
        alphas |= config.get("alpha_pattern") or {}
        ranks |= config.get("rank_pattern") or {}
        if not plain or alphas != ranks:
            raise ModelError(
                "is not a plain LoRA with alpha = r, as compress writes it",
                where=str(directory / "adapter_config.json"),
                fix="give an output of compress",
            )
        self._file = AdapterFile(directory)

    def names(self) -> list[str]:
        """Linears that have a branch."""
        ending = ".lora_A.weight"
        return [name.removeprefix(PREFIX).removesuffix(ending) for name in self._file.tensors if name.endswith(ending)]

    def product(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Up · down (out, in) float32 of a linear of this shape. Raises ModelError when it does not fit."""
        down = self._file.read(f"{PREFIX}{name}.lora_A.weight").float()
        up = self._file.read(f"{PREFIX}{name}.lora_B.weight").float()
        if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
            raise ModelError(
                f"the branch of {name} does not fit a linear of {shape[0]} × {shape[1]}",
                where=str(self.directory),
                fix="copy the whole output again",
            )
        return up @ down


class AdapterFile(Checkpoint):
    """The tensors of an adapter folder."""

    single = "adapter_model.safetensors"
    index = "adapter_model.safetensors.index.json"
