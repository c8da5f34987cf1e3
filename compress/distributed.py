"""Several processes, one run: `torchrun --nproc-per-node N -m compress plan.toml` (decision D10).

The first process, of rank 0, leads: it checks, keeps the journal and exports. The others follow it into every sweep and
barrier. In a sweep each process runs its own batches of calibration samples; the moments are added up over all of
them, each linear is solved by one process, and what it made of it goes to all. Where the whole model is trained, each
holds a share of it (FSDP2) and takes a share of every batch. Processes find each other, and shard, through accelerate;
they share the output's disk, from which those that follow read the journal. On GPUs they talk over NCCL, but for
messages, which are gloo's.
"""

from __future__ import annotations

import atexit
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import PlanError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

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
        """Meet the other processes, where torchrun has started some. `device`: the kind that the plan asks for.

        Raises:
            PlanError: there are more processes than GPUs on this machine.
        """
        self.rank, self.size, self.device = 0, int(os.environ.get("WORLD_SIZE", "1")), device
        self.together = False  # while all of them compute: then a message would not be heard
        if self.size == 1:
            return
        self.rank = int(os.environ["RANK"])
        from accelerate import PartialState

        if device.type == "cuda":
            _check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        self.device = torch.device("cpu") if device.type == "cpu" else state.device
        self._messages = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        atexit.register(self._part)

    def _part(self) -> None:
        """Join gloo's threads: a process that ends while one runs may be aborted for it (pytorch/pytorch#190489).

        NCCL's groups are left as they are where another process may have died: ending them could wait for it.
        """
        if torch.distributed.is_initialized():
            some = self.together and torch.distributed.get_backend() != "gloo"
            torch.distributed.destroy_process_group(self._messages if some else None)

    def announce(self, barrier: int | None) -> None:
        """Call the others to a sweep or barrier, by its number; None sends them home."""
        if self.size > 1 and self.rank == 0 and not self.together:
            with self._listening():
                torch.distributed.broadcast_object_list([barrier], src=0, group=self._messages)

    def hear(self) -> int | None:
        """What the first process announces. Raises RunError when it is gone."""
        heard: list[Any] = [None]
        with self._listening(who="the first process"):
            torch.distributed.broadcast_object_list(heard, src=0, group=self._messages)
        barrier: int | None = heard[0]
        return barrier

    @contextmanager
    def _listening(
        self, tells: Callable[[RuntimeError], bool] = lambda _: True, who: str = "another process"
    ) -> Iterator[None]:
        """Name what torch.distributed only hints at. Raises RunError when one that is waited for is gone.

        `tells`: whether an error is of that.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not tells(error):
                raise
            fix = "see its message; the same command resumes the run"
            raise RunError(f"{who} of the run ended", where=f"process {self.rank}", fix=fix) from error

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The same where others are waited for out of sight, as in the forward and backward of what is sharded."""
        with self._listening(lambda error: isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            yield

    def portion(self, count: int) -> slice:
        """This process's part of `count` batches: consecutive, and as many as any other's but for one."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def part(self, batches: list[int]) -> tuple[list[int], slice]:
        """This process's batches, by their numbers of samples, and its samples: a batch is the same wherever it is."""
        mine = self.portion(len(batches))
        first = sum(batches[: mine.start])
        return batches[mine], slice(first, first + sum(batches[mine]))

    def sum(self, tensor: Tensor) -> None:
        """Add up a tensor over the processes, in place; the sums are the same bits in all of them."""
        if self.size > 1:
            with self._listening():
                torch.distributed.all_reduce(tensor)

    def collect(self, mine: Any) -> list[Any]:
        """What each process has to say, by rank."""
        told: list[Any] = [mine] * self.size
        if self.size > 1:
            with self._listening():
                torch.distributed.all_gather_object(told, mine, group=self._messages)
        return told

    def exchange(self, mine: dict[str, Tensor], note: Any = None) -> tuple[dict[str, Tensor], list[Any]]:
        """All tensors of all processes, the first one's first, and each one's note; `mine` go to the others."""
        told = self.collect(({name: (tensor.dtype, tensor.shape) for name, tensor in mine.items()}, note))
        if self.size == 1:
            return mine, [note]
        tensors = {}
        for owner, (described, _) in enumerate(told):
            for name, (dtype, shape) in described.items():
                own = owner == self.rank
                tensor = mine[name].contiguous() if own else torch.empty(shape, dtype=dtype, device=self.device)
                sent = tensor.to(self.device).reshape(-1).view(torch.uint8)
                with self._listening():
                    torch.distributed.broadcast(sent, src=owner)
                tensors[name] = tensor
        return tensors, [note for _, note in told]

    def shard(self, module: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Leave each process a share of every parameter (accelerate's FSDP2); a block is whole while it computes.

        Parameters become other objects: get them anew. Buffers stay whole.
        """
        if self.size == 1:
            return
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils import fsdp2_prepare_model

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=sorted({type(block).__name__ for block in blocks}),
            cpu_ram_efficient_loading=False,  # what the module holds is not what its checkpoint has
        )
        self._accelerator.state.fsdp_plugin = plugin
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Slicing a flattened dim")  # accelerate slices, torch warns
            fsdp2_prepare_model(self._accelerator, module)

    @cached_property
    def _accelerator(self) -> Any:
        """accelerate's, for these processes. Its plugin is set by `shard`, as accelerate does itself on GPUs only."""
        from accelerate import Accelerator
        from accelerate.utils import ParallelismConfig

        made = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
        made.state.parallelism_config = ParallelismConfig(dp_shard_size=self.size)
        made.state.device_mesh = made.state.parallelism_config.build_device_mesh(self.device.type)
        return made

    def gather(self, module: nn.Module) -> None:
        """Have the parameters of a sharded module whole, until `scatter`."""
        if self.size > 1:
            module.unshard()  # type: ignore[operator]

    def scatter(self, module: nn.Module) -> None:
        """The inverse of `gather`."""
        if self.size > 1:
            module.reshard()  # type: ignore[operator]


def _check_gpus(processes: int) -> None:
    """Each process needs a GPU of its own, unless NCCL (2.31 on) is told otherwise. Raises PlanError."""
    gpus = torch.cuda.device_count()
    if processes > gpus and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        raise PlanError(
            f"{processes} processes on this machine, {gpus} GPU{'s' if gpus != 1 else ''}: each needs one of its own",
            where="torchrun",
            fix=f'--nproc-per-node {gpus}, or device = "cpu" in [run]',
        )


@dataclass(frozen=True)
class Job:
    """A piece of work: it costs `cost`, and `setup` once for all jobs of a `group` that one process does."""

    group: Hashable
    cost: float
    setup: float = 0.0


def assign(jobs: list[Job], size: int) -> list[int]:
    """Which of `size` processes does each job, so that the busiest has little.

    The longest-processing-time rule (Graham, 1969), the costliest first, each where it would be done soonest; once for
    single jobs and once for whole groups, of which the better is taken. Without setups the busiest has at most 4/3 of
    the least possible.
    """
    single = [[n] for n in range(len(jobs))]
    groups: dict[Hashable, list[int]] = {}
    for n, job in enumerate(jobs):
        groups.setdefault(job.group, []).append(n)
    spreads = [_longest_first(jobs, units, size) for units in (single, list(groups.values()))]
    return min(spreads, key=lambda found: found[0])[1]


def _longest_first(jobs: list[Job], units: list[list[int]], size: int) -> tuple[float, list[int]]:
    """The busiest process's load and the owner of each job, where units of jobs stay together."""

    def cost(unit: list[int], met: set[Hashable]) -> float:
        setup = 0.0 if jobs[unit[0]].group in met else jobs[unit[0]].setup
        return setup + sum(jobs[n].cost for n in unit)

    loads, owners = [0.0] * size, [0] * len(jobs)
    met: list[set[Hashable]] = [set() for _ in range(size)]
    for unit in sorted(units, key=lambda unit: -cost(unit, set())):
        after = [load + cost(unit, there) for load, there in zip(loads, met, strict=True)]
        owner = after.index(min(after))
        loads[owner] = after[owner]
        met[owner].add(jobs[unit[0]].group)
        for n in unit:
            owners[n] = owner
    return max(loads), owners


class Share:
    """The part of each batch that a process takes, and how its results join those of the others."""

    def __init__(self, world: World | None = None, count: Callable[[Tensor], float] = len) -> None:
        """`count`: what a mean over samples is taken over, by their indices, such as their predicted tokens."""
        self.world, self.size, self.count = world, world.size if world else 1, count

    def part(self, indices: Tensor) -> tuple[Tensor, float]:
        """This process's samples of a batch, and the weight that makes the mean over processes that over the batch.

        Every process must take part in every forward: one without samples takes another's, at the weight 0.
        """
        if self.world is None or self.size == 1:
            return indices, 1.0
        mine = self._mine(self.world, indices)
        if not len(mine):
            return self._stand_in(self.world, indices), 0.0
        return mine, self.size * self.count(mine) / max(self.count(indices), 1e-30)

    def _mine(self, world: World, indices: Tensor) -> Tensor:
        return indices[world.rank :: self.size]

    def _stand_in(self, world: World, indices: Tensor) -> Tensor:
        return indices[:1]

    def reduce(self, gradients: Iterable[Tensor]) -> None:
        """The mean of the gradients over the processes, where sharding has not made it so already."""

    def mean(self, value: float) -> float:
        """The mean of a number over the processes, the same in all of them."""
        if self.world is None or self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=self.world.device)
        self.world.sum(summed)
        return float(summed) / self.size


class OwnShare(Share):
    """Each process has samples of its own, and a whole copy of what is trained."""

    def __init__(self, world: World, own: slice, count: Callable[[Tensor], float]) -> None:
        """`own`: which samples are this process's; `count`: as for `Share`."""
        super().__init__(world, count)
        self._own = own

    def _mine(self, world: World, indices: Tensor) -> Tensor:
        return indices[(indices >= self._own.start) & (indices < self._own.stop)]

    def _stand_in(self, world: World, indices: Tensor) -> Tensor:
        return indices.new_tensor([self._own.start])

    def reduce(self, gradients: Iterable[Tensor]) -> None:
        """The mean of the gradients over the processes, in place."""
        for gradient in gradients:
            if self.world:
                self.world.sum(gradient)
                gradient /= self.size


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a share, gathered; all processes must ask for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """The share of a tensor that this process holds."""
    share = getattr(tensor, "to_local", None)
    return tensor if share is None else share()


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, where `pattern` is, and as shares like its own."""
    if not hasattr(pattern, "full_tensor"):
        return tensor.to(pattern.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
