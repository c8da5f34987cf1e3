"""A directory that readers load: the weights in the plan's format, the source's other files, the plan and its lock."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch

from compress.checkpoint import INDEX, write_shard
from compress.errors import ModelError
from compress.export.adapter import FOLDER as ADAPTER
from compress.export.adapter import PREFIX, write_config
from compress.model_files import is_inside, read_json
from compress.passes.base import BlockPass, ModelPass
from compress.state import kept_of, pack_bits
from compress.structure import CutTensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint import Slot
    from compress.lock import Linear, Lock

# Beside the weights, what a transformers model directory may hold; anything else is not ours to copy.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)


class FinalTensors:
    """The tensors to be emitted, by name: compressed linears from the journal, all else from the source."""

    def __init__(
        self, lock: Lock, block_state: Callable[[int], dict[str, Tensor]], outside: dict[str, Tensor] | None = None
    ) -> None:
        """`block_state` reads what the journal keeps of a block (the last is held); `outside` belongs to no block."""
        self.lock, self._block_state = lock, block_state
        self.linears: dict[str, tuple[Linear, Slot]] = {
            slot.name: (linear, slot) for linear in lock.linears if linear.passes for slot in lock.form.slots(linear)
        }
        more = any(isinstance(p, (BlockPass, ModelPass)) for p in lock.plan.passes)
        self._parameters = _block_parameters(lock) if more else {}
        stored = lock.skeleton.stored
        self._outside = {stored[key.rpartition(":")[0]]: value for key, value in (outside or {}).items()}
        self._masks = {f"{linear.name}.mask": linear for linear in lock.linears if linear.masked}
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})
        self._branches = {
            f"{PREFIX}{linear.name}.{part}.weight": (linear, kind)
            for linear in lock.linears
            for part, kind in (("lora_A", "down"), ("lora_B", "up"))
        }

    def state(self, block: int) -> dict[str, Tensor]:
        """The journal's tensors of one block."""
        if self._held[0] != block:
            self._held = (block, self._block_state(block))
        return self._held[1]

    def kept(self, linear: Linear) -> dict[str, Tensor]:
        """The journal's tensors of one linear."""
        return kept_of(linear.name, self.state(linear.block))

    def mask(self, linear: Linear) -> Tensor | None:
        """The bit-packed mask of a linear."""
        return self.kept(linear).get(f"{linear.name}:mask")

    def __getitem__(self, name: str) -> Tensor:
        if name in self.linears:
            linear, slot = self.linears[name]
            return self.lock.form.encode(linear, slot, self.kept(linear))
        if name in self._masks:
            linear = self._masks[name]
            packed = self.mask(linear)  # a pass that may prune need not have
            whole = torch.ones(linear.out_features, linear.in_features, dtype=torch.bool)
            return pack_bits(whole) if packed is None else packed
        if name in self._branches:
            linear, kind = self._branches[name]
            return self.kept(linear)[f"{linear.name}:{kind}"]
        if name in self._outside:
            return self._outside[name]
        if name in self._parameters:
            block, parameter = self._parameters[name]
            changed = self.state(block).get(f"{parameter}:parameter")
            if changed is not None:
                return changed
        return self.lock.checkpoint.read(name)


def _block_parameters(lock: Lock) -> dict[str, tuple[int, str]]:
    """Stored name → block and full name of each parameter of a block: a block pass may have changed it."""
    names = ((block, name) for block in range(lock.blocks) for name in lock.skeleton.block_parameters(block))
    return {lock.skeleton.stored[name]: (block, name) for block, name in names}


def export(lock: Lock, lock_json: dict[str, Any], tensors: FinalTensors | CutTensors, directory: Path) -> None:
    """Write the model, its plan and `lock_json` into `directory`, which must be empty, a tensor at a time."""
    for shard in lock.shards:
        write_shard(shard, directory, tensors)
    if lock.index:
        (directory / INDEX).write_text(lock.index, encoding="utf-8")
    for path in copied_files(lock.directory, code=lock.plan.model.trust_remote_code):
        shutil.copyfile(path, directory / path.name)
    if lock.adapter:
        folder = directory / ADAPTER
        folder.mkdir()
        write_shard(lock.adapter, folder, tensors)
        write_config(lock, folder, base=lock.plan.run.output.rpartition("/")[2])
    quantization = lock.form.config(lock) if any(lock.form.holds(linear) for linear in lock.linears) else None
    config = tensors.config() if isinstance(tensors, CutTensors) else None
    if quantization:
        config = read_json(lock.directory / "config.json") | {"quantization_config": quantization}
    if config:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "plan.toml").write_text(lock.plan.source.text, encoding="utf-8")
    text = json.dumps(lock_json, indent=1, sort_keys=True)
    (directory / "lock.json").write_text(text + "\n", encoding="utf-8")


def copied_files(directory: Path, *, code: bool) -> list[Path]:
    """The files of a model directory that go along with the weights; `code`: its Python modules too.

    Raises:
        ModelError: one of them is a link that leads outside, and would publish what it points to.
    """
    patterns = (*COPIED, "*.py") if code else COPIED
    found = {path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}
    for path in sorted(found):
        if not is_inside(path, directory):
            fix = "copy the file into the model directory, or remove the link"
            raise ModelError("is a link that leads outside the model directory", where=str(path), fix=fix)
    return sorted(path for path in found if path.name != INDEX and path.suffix != ".safetensors")
