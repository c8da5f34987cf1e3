"""Read back what was written and compare it, bit for bit, with what was evaluated in memory (decision D9).

The reader is the `safetensors` package, not our own: a mistake in our writer must not be repeated here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from compress.checkpoint import DTYPES, MASKS, Checkpoint
from compress.errors import RunError
from compress.export.adapter import FOLDER as ADAPTER
from compress.state import kept_weight, unpack_bits
from compress.structure import CutTensors

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.export.huggingface import FinalTensors
    from compress.lock import Linear


def verify(tensors: FinalTensors | CutTensors, directory: Path) -> tuple[int, int]:
    """Compare every emitted tensor with what it must be, every decoded weight with `effective()`, masks with zeros.

    Returns:
        how many tensors and how many bytes were compared.

    Raises:
        RunError: a tensor is missing, differs in a bit, or is not zero where its mask prunes.
    """
    lock = tensors.lock
    written = set(Checkpoint(directory).tensors)
    expected = {slot.name for shard in lock.shards if shard.file != MASKS for slot in shard.slots}
    if written != expected:
        odd = sorted(written ^ expected)[0]
        raise _differs(odd, directory, "is in only one of lock and output")
    files = {slot.name: directory / shard.file for shard in lock.shards for slot in shard.slots}
    branches = lock.adapter
    shards = [*lock.shards, *([branches] if branches else [])]
    if branches:
        files |= {slot.name: directory / ADAPTER / branches.file for slot in branches.slots}
    total = 0
    for shard in shards:
        for slot in shard.slots:
            if not same_bits(read_independently(files[slot.name], slot.name), tensors[slot.name]):
                raise _differs(slot.name, directory, "differs from what was compressed")
            total += slot.bytes
    for linear in lock.linears:
        if linear.passes and not isinstance(tensors, CutTensors):
            _verify_linear(linear, tensors, files, directory)
    return len(files), total


def _verify_linear(linear: Linear, tensors: FinalTensors, files: dict[str, Path], directory: Path) -> None:
    """Decode a linear from its files: it must be `effective()`, and 0 where its mask prunes."""
    form = tensors.lock.form
    parts = {slot.name: read_independently(files[slot.name], slot.name) for slot in form.slots(linear)}
    weight = form.decode(linear, {name.rpartition(".")[2]: part for name, part in parts.items()})
    if not same_bits(weight, kept_weight(linear.name, tensors.kept(linear), DTYPES[linear.dtype])):
        raise _differs(linear.name, directory, "decodes to another weight than was evaluated")
    packed = tensors.mask(linear)
    if packed is not None and bool((weight[~unpack_bits(packed, linear.in_features)] != 0).any()):
        raise _differs(linear.name, directory, "is not zero where its mask prunes")


def read_independently(path: Path, name: str) -> Tensor:
    """One tensor through the safetensors package; the file is opened anew so that its pages do not pile up."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise _differs(name, path.parent, f"cannot be read back: {error}") from None


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit (−0 is not +0, NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _differs(name: str, directory: Path, problem: str) -> RunError:
    return RunError(
        f"verification failed: {name} {problem}",
        where=str(directory),
        fix="check the disk and its free space; nothing was published, the same command tries again",
    )
