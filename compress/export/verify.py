"""Read back what was written and compare it, bit for bit, with what was evaluated in memory (decision D9).

The reader is the `safetensors` package, not our own: a mistake in our writer must not be repeated here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from compress.checkpoint import Checkpoint
from compress.errors import RunError
from compress.state import unpack_bits

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from compress.export.huggingface import FinalTensors


def verify(tensors: FinalTensors, directory: Path) -> tuple[int, int]:
    """Compare every emitted tensor with what it must be, and every mask with the zeros.

    Returns:
        how many tensors and how many bytes were compared.

    Raises:
        RunError: a tensor is missing, differs in a bit, or is not zero where its mask prunes.
    """
    lock = tensors.lock
    written = Checkpoint(directory).tensors
    expected = set(lock.checkpoint.tensors)
    if set(written) != expected:
        odd = sorted(set(written) ^ expected)[0]
        raise _differs(odd, directory, "is in only one of source and output")
    total = 0
    for shard in lock.shards:
        for slot in shard.slots:
            found = read_independently(directory / shard.file, slot.name)
            wanted = tensors[slot.name]
            if not same_bits(found, wanted):
                raise _differs(slot.name, directory, "differs from what was compressed")
            linear = tensors.linears.get(slot.name)
            packed = tensors.state(linear.block).get(f"{linear.name}:mask") if linear else None
            if linear and packed is not None:
                weight = found.T if linear.transposed else found
                if bool((weight[~unpack_bits(packed, linear.in_features)] != 0).any()):
                    raise _differs(slot.name, directory, "is not zero where its mask prunes")
            total += slot.bytes
    return len(written), total


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
