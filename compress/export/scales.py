"""Named sets of scales for one set of codes, one per task, in the folder ``scales`` beside the weights.

`scales/NAME.safetensors` holds, for every linear on a grid, `<linear>.scale` (out, groups) in the dtype in which the
model's own files store them. All sets share codes, zero-points and masks, so that a set is all that a task needs (PEQA,
Kim et al. 2023, arXiv 2305.14152). The model's files hold the last one; `compress.swap_scales` puts in another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.checkpoint import Shard, Slot, lay_out, write_shard
from compress.errors import RunError
from compress.export.formats import scale_dtype
from compress.export.verify import read_independently, same_bits
from compress.passes.peqa import PEQA

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.lock import Linear, Lock
    from compress.plan import Plan

FOLDER = "scales"
SUFFIX = ".scale"


def set_passes(plan: Plan) -> dict[int, str]:
    """Index → name of the passes that make a set."""
    return {index: one.name for index, one in enumerate(plan.passes) if isinstance(one, PEQA) and one.name}


def scale_shards(plan: Plan, linears: Iterable[Linear]) -> dict[str, Shard]:
    """The file of each set, by name."""
    slots = [
        Slot(
            f"{linear.name}{SUFFIX}", scale_dtype(linear, grid), (linear.out_features, grid.groups(linear.in_features))
        )
        for linear in linears
        if (grid := linear.grid) is not None
    ]
    return {name: Shard(f"{name}.safetensors", lay_out(slots, 1 << 62)[0].slots) for name in set_passes(plan).values()}


class ScaleSet:
    """The tensors of one set, from what the journal keeps after the sweep that made it."""

    def __init__(self, lock: Lock, name: str, kept: Callable[[int, int], Mapping[str, Tensor]]) -> None:
        """`kept` reads what the journal keeps after a sweep of a block; that of one block is held."""
        index = next(index for index, other in set_passes(lock.plan).items() if other == name)
        self._sweep, self._kept = lock.sweep_of(index), kept
        self._linears = {f"{linear.name}{SUFFIX}": linear for linear in lock.linears}
        self._held: tuple[int, Mapping[str, Tensor]] = (-1, {})

    def __getitem__(self, name: str) -> Tensor:
        linear = self._linears[name]
        if self._held[0] != linear.block:
            self._held = (linear.block, self._kept(self._sweep, linear.block))
        return self._held[1][f"{linear.name}:scale"]


def write_sets(lock: Lock, kept: Callable[[int, int], Mapping[str, Tensor]], directory: Path) -> None:
    """Write every set into the folder of an output."""
    for name, shard in lock.scale_sets.items():
        (directory / FOLDER).mkdir(exist_ok=True)
        write_shard(shard, directory / FOLDER, ScaleSet(lock, name, kept))


def verify_sets(lock: Lock, kept: Callable[[int, int], Mapping[str, Tensor]], directory: Path) -> tuple[int, int]:
    """Compare every set, as the safetensors package reads it, with what was trained.

    Returns:
        how many tensors and how many bytes were compared.

    Raises:
        RunError: one differs in a bit.
    """
    count = total = 0
    for name, shard in lock.scale_sets.items():
        tensors, path = ScaleSet(lock, name, kept), directory / FOLDER / shard.file
        for slot in shard.slots:
            if not same_bits(read_independently(path, slot.name), tensors[slot.name]):
                raise RunError(
                    f"verification failed: {slot.name} of the set {name} differs from what was trained",
                    where=str(path),
                    fix="check the disk and its free space; nothing was published, the same command tries again",
                )
            count, total = count + 1, total + slot.bytes
    return count, total
