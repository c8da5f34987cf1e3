"""The low-rank branches as a PEFT LoRA adapter, in the folder ``adapter`` beside the weights.

For a linear (out, in) with ``y = W x + up (down x)``: `lora_A.weight` is down (r, in), `lora_B.weight` is up (out, r),
and `lora_alpha` equals r, so that PEFT's factor is 1. `PeftModel.from_pretrained(base, "DIR/adapter")` puts it on the
base that the directory holds. It is not merged: that would fill what was pruned and leave the grid.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint, Shard, Slot
from compress.errors import ModelError
from compress.model_files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.lock import Linear, Lock

FOLDER = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ABSENT = object()
UP, DOWN = ".lora_B.weight", ".lora_A.weight"


def adapter_shard(linears: Iterable[Linear]) -> Shard | None:
    """The file of the branches of linears; None when there is none."""
    slots = []
    for linear in linears:
        if linear.rank:
            slots.append(Slot(f"{PREFIX}{linear.name}{DOWN}", linear.dtype, (linear.rank, linear.in_features)))
            slots.append(Slot(f"{PREFIX}{linear.name}{UP}", linear.dtype, (linear.out_features, linear.rank)))
    return Shard(WEIGHTS, tuple(slots)) if slots else None


def write_config(lock: Lock, directory: Path, base: str) -> None:
    """Write ``adapter_config.json`` for the branches of a lock."""
    ranks = {linear.name: linear.rank for linear in lock.linears}
    config = {"base_model_name_or_path": base} | _config(ranks, transposed=bool(lock.architecture.transposed))
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(ranks: Mapping[str, int], *, transposed: bool) -> dict[str, Any]:
    """The configuration of branches of these ranks, all but the name of the base."""
    present = {name: rank for name, rank in ranks.items() if rank}
    counts = Counter(present.values())
    usual = max(counts, key=lambda rank: (counts[rank], rank))
    others = {name: rank for name, rank in present.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(present),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


class Branches:
    """The branches of an adapter folder, by the module name of their linear."""

    def __init__(self, directory: Path, *, transposed: bool) -> None:
        """Read the headers, and check that they and the configuration belong together.

        Args:
            directory: the folder.
            transposed: whether the base stores linears as (in, out), which the configuration must say, too.

        Raises:
            ModelError: it is not an adapter of ours, or damaged.
        """
        self.directory = directory
        found = read_json(directory / CONFIG)
        self._file = AdapterFile(directory)
        self.shapes = self._read_shapes()
        ranks = {name: self.rank(name) for name in self.shapes}
        wanted = _config(ranks, transposed=transposed)
        found.pop("base_model_name_or_path", None)
        every = sorted(wanted.keys() | found.keys())
        wrong = [key for key in every if found.get(key, ABSENT) != wanted.get(key, ABSENT)]
        if wrong:
            raise ModelError(
                f"is not the plain LoRA with alpha = r that compress writes for these tensors: {', '.join(wrong)}",
                where=str(directory / CONFIG),
                fix="give an output of compress, and copy all of it",
            )

    def _read_shapes(self) -> dict[str, tuple[int, int]]:
        """The (out, in) of each branch. Raises ModelError for tensors that are not pairs of matrices."""
        tensors = self._file.tensors
        shapes = {}
        for name in [name.removesuffix(end) for name in tensors for end in (DOWN, UP) if name.endswith(end)]:
            pair = tensors.get(name + UP), tensors.get(name + DOWN)
            module = name.removeprefix(PREFIX)
            for info, end in zip(pair, (UP, DOWN), strict=True):
                if info is None:
                    raise self._damaged(f"{module}{end} is missing")
                if len(info.shape) != 2 or not info.torch_dtype.is_floating_point:
                    raise self._damaged(f"{module}{end} is {info.dtype} {list(info.shape)}, not a matrix of numbers")
            up, down = (info.shape for info in pair if info is not None)
            if up[1] != down[0] or not up[1]:
                raise self._damaged(f"the branch of {module} is {list(up)} times {list(down)}")
            shapes[module] = up[0], down[1]
        names = {f"{PREFIX}{module}{end}" for module in shapes for end in (UP, DOWN)}
        odd = sorted(tensors.keys() ^ names)
        if odd or not shapes:
            raise self._damaged(f"{odd[0] if odd else 'nothing'} is not of a branch")
        return shapes

    def product(self, name: str) -> Tensor:
        """Up · down (out, in) float32 of a linear."""
        up, down = self.factors(name)
        return up.float() @ down.float()

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Up (out, r) and down (r, in) of a linear, as stored."""
        return self._file.read(f"{PREFIX}{name}{UP}"), self._file.read(f"{PREFIX}{name}{DOWN}")

    def rank(self, name: str) -> int:
        """The r of a linear's branch."""
        return self._file.tensors[f"{PREFIX}{name}{DOWN}"].shape[0]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """The weight of a linear must have the shape of its branch. Raises ModelError."""
        if self.shapes[name] != shape:
            raise self._damaged(f"the branch of {name} is for {list(self.shapes[name])}, the model has {list(shape)}")

    def _damaged(self, problem: str) -> ModelError:
        return ModelError(problem, where=str(self.directory), fix="copy the whole output again")


class AdapterFile(Checkpoint):
    """The tensors of an adapter folder."""

    single = WEIGHTS
    index = f"{WEIGHTS}.index.json"
