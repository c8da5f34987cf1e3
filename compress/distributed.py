"""Several processes, one run: `torchrun --nproc-per-node N -m compress plan.toml` (decision D10).

The first process, of rank 0, does what a process alone does: sweeps, journal, export. The others follow it to where the
whole model is trained, and there each holds a share of the model (FSDP2, `torch.distributed.fsdp.fully_shard`) and
takes a share of every batch. Processes find each other through accelerate, and share the output's disk, from which
those that follow read the journal.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

PATIENCE = timedelta(days=7)  # for the first process: a sweep over a large model takes long


class World:
    """The processes of a run. One alone needs nothing of it, and every method is then the identity.

    Attributes:
        rank: of this process.
        size: how many there are.
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        """Meet the other processes, where torchrun has started some. `device`: the kind that the plan asks for."""
        self.rank, self.size, self.device = 0, int(os.environ.get("WORLD_SIZE", "1")), device
        self.together = False  # while all of them compute: then a message would not be heard
        if self.size == 1:
            return
        self.rank = int(os.environ["RANK"])
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        self.device = torch.device("cpu") if device.type == "cpu" else state.device
        self._messages = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def announce(self, barrier: int | None) -> None:
        """Call the others to a barrier, by its sweep; None sends them home."""
        if self.size > 1 and self.rank == 0 and not self.together:
            torch.distributed.broadcast_object_list([barrier], src=0, group=self._messages)

    def hear(self) -> int | None:
        """What the first process announces. Raises RunError when it is gone."""
        heard: list[Any] = [None]
        try:
            torch.distributed.broadcast_object_list(heard, src=0, group=self._messages)
        except RuntimeError as error:
            raise RunError(
                "the first process of the run ended", where=f"process {self.rank}", fix="see its message"
            ) from error
        barrier: int | None = heard[0]
        return barrier

    def shard(self, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Leave each process a share of every parameter; a block is gathered whole while it computes.

        Parameters become other objects: get them anew. Buffers stay whole.
        """
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)

    def gather(self, module: nn.Module) -> None:
        """Have the parameters of a sharded module whole, until `scatter`."""
        if self.size > 1:
            module.unshard()  # type: ignore[operator]

    def scatter(self, module: nn.Module) -> None:
        """The inverse of `gather`."""
        if self.size > 1:
            module.reshard()  # type: ignore[operator]


class Share:
    """The part of each batch that a process takes, and how its results join those of the others."""

    def __init__(self, world: World | None = None, count: Callable[[Tensor], int] = len) -> None:
        """`count`: what a mean over samples is taken over, by their indices, such as their predicted tokens."""
        self.world, self.size, self._count = world, world.size if world else 1, count

    def part(self, indices: Tensor) -> tuple[Tensor, float]:
        """This process's samples of a batch, and the weight that makes the mean over processes that over the batch.

        Every process must take part in every forward: one without samples takes another's, at the weight 0.
        """
        if self.world is None or self.size == 1:
            return indices, 1.0
        mine = indices[self.world.rank :: self.size]
        if not len(mine):
            return indices[:1], 0.0
        return mine, self.size * self._count(mine) / max(1, self._count(indices))

    def mean(self, value: float) -> float:
        """The mean of a number over the processes, the same in all of them."""
        if self.world is None or self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=self.world.device)
        torch.distributed.all_reduce(summed)
        return float(summed) / self.size


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a share, gathered; all processes must ask for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """The share of a tensor that this process holds."""
    share = getattr(tensor, "to_local", None)
    return tensor if share is None else share()


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, as shares like those of `pattern`."""
    if not hasattr(pattern, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
