"""The `huggingface` format: the tensors, names and dtypes of the source, zeros where pruned, and its other files."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from compress.checkpoint import INDEX, index_text, is_inside, write_shard
from compress.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

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
    """The tensors to be emitted, by stored name: compressed linears from the journal, all else from the source."""

    def __init__(self, lock: Lock, block_state: Callable[[int], dict[str, Tensor]]) -> None:
        """`block_state` reads what the journal keeps of a block; the last one read is held."""
        self.lock, self._block_state = lock, block_state
        self.linears: dict[str, Linear] = {linear.stored: linear for linear in lock.linears if linear.passes}
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})

    def state(self, block: int) -> dict[str, Tensor]:
        """The journal's tensors of one block."""
        if self._held[0] != block:
            self._held = (block, self._block_state(block))
        return self._held[1]

    def __getitem__(self, stored: str) -> Tensor:
        linear = self.linears.get(stored)
        if linear is None:
            return self.lock.checkpoint.read(stored)
        weight = self.state(linear.block)[f"{linear.name}:weight"]
        return weight.T.contiguous() if linear.transposed else weight


def export(lock: Lock, lock_json: dict[str, Any], tensors: FinalTensors, directory: Path) -> None:
    """Write the model, its plan and `lock_json` into `directory`, which must be empty, a tensor at a time."""
    for shard in lock.shards:
        write_shard(shard, directory, tensors)
    index = index_text(list(lock.shards))
    if index:
        (directory / INDEX).write_text(index, encoding="utf-8")
    for path in copied_files(lock.directory, code=lock.plan.model.trust_remote_code):
        shutil.copyfile(path, directory / path.name)
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
