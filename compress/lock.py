"""The lock: every linear, its passes and settings, every output byte, known before a weight is read.

`compress.compiling` makes it from a plan.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.architecture import is_heterogeneous, of_block
from compress.checkpoint import MASKS, Checkpoint, Shard, Slot, index_text, lay_out
from compress.export.adapter import adapter_shard
from compress.export.scales import scale_shards, set_passes
from compress.grid import Grid
from compress.passes.base import BlockPass, Invariant, LinearPass, Pass, Statistics
from compress.state import kept_low_rank
from compress.structure import Sizes, found_sizes, slots_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.architecture import Architecture
    from compress.export.formats import Format
    from compress.grid import GridSpec
    from compress.plan import Plan
    from compress.stream import Skeleton


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block, and what will be done to it."""

    name: str
    stored: str  # the checkpoint's name of its weight
    block: int
    subset: int
    out_features: int
    in_features: int
    transposed: bool
    dtype: str
    passes: tuple[tuple[int, Pass], ...]  # (index in the plan, settings for this linear)
    found: tuple[GridSpec | None, int] | None = None  # grid and rank, where only the run could tell

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of the checkpoint's tensor."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    @property
    def grid(self) -> GridSpec | None:
        """The grid on which the passes leave it."""
        if self.found:
            return self.found[0]
        return next((p.grid() for _, p in reversed(self.passes) if p.grid() is not None), None)

    @property
    def rank(self) -> int:
        """The rank of the branch that the passes give it, at most; 0 for none."""
        if self.found:
            return self.found[1]
        adding = [(p, rank) for _, p in self.passes if (rank := p.added_rank()) is not None]
        more = sum(rank for p, rank in adding if getattr(p, "extend", False))
        ranks = [rank for p, rank in adding if not getattr(p, "extend", False)]
        if any(getattr(p, "budget", None) is not None for _, p in self.passes):
            return max(ranks, default=0) + more  # where the budget leaves none, a later pass may add its own
        return next(iter(ranks), 0) + more

    @property
    def masked(self) -> bool:
        """Whether the passes leave a mask."""
        return any(Invariant.MASK in p.provides() for _, p in self.passes)


@dataclass(frozen=True)
class Lock:
    """The compiled plan, or one stage of it.

    A pass of structured pruning ends a stage: the smaller model that it leaves is the next stage's model.

    Attributes:
        stage: indices of the passes of this stage.
        left: the sizes that the stage leaves, where it ends with structured pruning.
        before: the stage before.
    """

    plan: Plan
    directory: Path
    checkpoint: Checkpoint
    config: Any
    skeleton: Skeleton
    linears: tuple[Linear, ...]
    sweeps: tuple[tuple[int, ...], ...]  # indices of the passes that share a walk over the blocks
    shards: tuple[Shard, ...]
    form: Format
    stage: tuple[int, ...]
    left: Sizes | None
    before: Lock | None
    config_digest: str  # of the model's config.json, which is gone where the stage before has not run

    @property
    def stages(self) -> tuple[Lock, ...]:
        """All stages up to this one."""
        return (*(self.before.stages if self.before else ()), self)

    @property
    def root(self) -> Lock:
        """The first stage, whose model is the plan's."""
        return self.stages[0]

    def stage_of(self, index: int) -> Lock:
        """The stage of a pass."""
        return next(one for one in self.stages if index in one.stage)

    @property
    def ends(self) -> bool:
        """Whether it is the last stage of the plan."""
        return self.stage[-1] == len(self.plan.passes) - 1

    @property
    def sizes(self) -> Sizes:
        """Those of the model that the stage works on."""
        return Sizes.of(self.architecture, self.config)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before the run."""
        earlier = self.before.warnings if self.before else _warnings(self.plan, self.skeleton)
        return (*earlier, *self._form_warnings, *self._width_warnings)

    @property
    def _form_warnings(self) -> tuple[str, ...]:
        return tuple(self.form.warnings(self)) if self.ends else ()

    @property
    def _width_warnings(self) -> tuple[str, ...]:
        if not (self.ends and self.heterogeneous):
            return ()
        text = "blocks will have different widths: compress.load reads the result, and transformers after import "
        text += f"compress; stock transformers, GPTQModel and vLLM do not, their {self.architecture.model_types[0]} "
        return (f"{text}has one width for all blocks",)

    @property
    def index(self) -> str | None:
        """The text of the index file. With masks beside the weights there is always one: readers take all else."""
        weights = [shard for shard in self.shards if shard.file != MASKS]
        return index_text(weights, always=len(weights) < len(self.shards))

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self.skeleton.blocks)

    @property
    def calibrated(self) -> bool:
        """Whether any pass needs activations."""
        sweeps = range(len(self.sweeps))
        learns = any(self.plan.passes[index].learns() for index in self.stage)
        return learns or any(self.statistics(linear, sweep) for linear in self.linears for sweep in sweeps)

    def in_block(self, block: int) -> list[Linear]:
        """The linears of a block, in the order in which it runs them."""
        return [linear for linear in self.linears if linear.block == block]

    def passes(self, linear: Linear, sweep: int) -> list[tuple[int, Pass]]:
        """What one sweep does to a linear."""
        return [(i, p) for i, p in linear.passes if i in self.sweeps[sweep]]

    def linear_passes(self, linear: Linear, sweep: int) -> list[tuple[int, LinearPass]]:
        """Of this, what looks at the linear alone."""
        return [(i, p) for i, p in self.passes(linear, sweep) if isinstance(p, LinearPass)]

    def block_passes(self, sweep: int) -> list[tuple[int, BlockPass]]:
        """The passes over whole blocks with which a sweep begins."""
        passes = self.plan.passes
        found = [(i, passes[i]) for i in self.sweeps[sweep]]
        return [(i, one) for i, one in found if isinstance(one, BlockPass) and not one.barrier()]

    def is_barrier(self, sweep: int) -> bool:
        """Whether a sweep is a pass over the whole model instead."""
        return any(self.plan.passes[index].barrier() for index in self.sweeps[sweep])

    def sweep_of(self, index: int) -> int:
        """The sweep of a pass."""
        return next(number for number, sweep in enumerate(self.sweeps) if index in sweep)

    def begins_with(self, sweep: int) -> int:
        """The sweep whose result a sweep begins with: the one before; all that make a named set of scales share one."""
        sets = set_passes(self.plan) if self.ends else {}
        first = self.sweep_of(min(sets)) if sets else len(self.sweeps)
        return min(sweep, first) - 1

    @property
    def scale_sets(self) -> dict[str, Shard]:
        """The file of each named set of scales."""
        return scale_shards(self.plan, self.linears) if self.ends else {}

    @property
    def architecture(self) -> Architecture:
        """The model's family."""
        return self.skeleton.architecture

    def statistics(self, linear: Linear, sweep: int) -> Statistics:
        """The statistics that a sweep needs of a linear's input."""
        name = linear.name.removeprefix(self.skeleton.prefix(linear.block))
        needed = [
            p.needed_of(name, self.architecture, of_block(self.config, linear.block))
            if isinstance(p, BlockPass)
            else p.needed()
            for _, p in self.passes(linear, sweep)
            if isinstance(p, (LinearPass, BlockPass)) and not p.barrier()
        ]
        return max(needed, default=Statistics.NONE)

    @property
    def output_bytes(self) -> int:
        """Exact bytes of the weights to be written: headers, index, branches and sets of scales included."""
        files = [*self.shards, *([self.adapter] if self.adapter else []), *self.scale_sets.values()]
        return sum(shard.bytes for shard in files) + len((self.index or "").encode())

    @property
    def adapter(self) -> Shard | None:
        """The file of the low-rank branches, where the format does not hold them."""
        return None if self.form.branches else adapter_shard(self.linears)

    def settled(self, kept: Callable[[int], Mapping[str, Tensor]]) -> Lock:
        """The lock with the grids, ranks and widths that a run has found, where passes choose them from data.

        `kept` reads what the journal keeps of a block in the end.
        """
        if self.left and not self.left.alike:
            left = found_sizes(self, kept)
            return replace(self, left=left, shards=tuple(files_of(self.plan, self.skeleton, (), self.form, left)))
        provided = {one for index in self.stage for one in self.plan.passes[index].provides()}
        if self.left or not {Invariant.GRID, Invariant.LOW_RANK} & provided:
            return self
        linears: list[Linear] = []
        for block in range(self.blocks):
            tensors = kept(block)
            for linear in self.in_block(block):
                grid, branch = Grid.restore(linear.name, tensors), kept_low_rank(linear.name, tensors)
                found = linear.grid or (grid.spec if grid else None), branch.rank if branch else 0
                linears.append(replace(linear, found=found))
        shards = tuple(files_of(self.plan, self.skeleton, linears, self.form))
        return replace(self, linears=tuple(linears), shards=shards)

    @property
    def undecided(self) -> bool:
        """Whether a run chooses ranks or bits under a budget: then sizes are the largest there may be."""
        return any(getattr(self.plan.passes[index], "budget", None) is not None for index in self.stage)

    @property
    def spread(self) -> bool:
        """Whether a run chooses how blocks differ in width: the number of parameters is exact, headers may differ."""
        return any(one.left is not None and not one.left.alike for one in self.stages)

    @property
    def heterogeneous(self) -> bool:
        """Whether blocks of what is left have different widths."""
        return self.spread or is_heterogeneous(self.config)

    def canonical(self) -> dict[str, Any]:
        """The settings of the plan that make the result of this stage."""
        plan = self.plan.canonical()
        return plan if self.ends else plan | {"pass": plan["pass"][: self.stage[-1] + 1]}

    def to_json(self) -> dict[str, Any]:
        """The lock as it is written beside the weights; equal locks give equal bytes."""
        return {
            "lock_version": 1,
            "compress_version": __version__,
            "plan": self.canonical(),
            "model": {
                "architecture": self.config.model_type,
                "config": self.config_digest,
                "headers": self.checkpoint.digest(),
                "bytes": sum(self.checkpoint.sizes.values()),
            },
            "sweeps": [list(sweep) for sweep in self.sweeps],
            "linears": [
                {
                    "name": linear.name,
                    "tensor": linear.stored,
                    "block": linear.block,
                    "subset": linear.subset,
                    "shape": [linear.out_features, linear.in_features],
                    "dtype": linear.dtype,
                    "grid": linear.grid and dict(zip(("bits", "group_size", "symmetric"), linear.grid, strict=False)),
                    "rank": linear.rank,
                    "passes": [{"pass": index, "use": p.use()} | p.settings() for index, p in linear.passes],
                }
                for linear in self.linears
            ],
            "format": self.form.name,
            "files": [{"name": shard.file, "bytes": shard.bytes, "tensors": len(shard.slots)} for shard in self.shards],
            "scale_sets": [{"name": name, "bytes": shard.bytes} for name, shard in self.scale_sets.items()],
            "output_bytes": self.output_bytes,
        } | ({"left": self.left.shown()} if self.left else {})

    def digest(self) -> str:
        """SHA-256 of the lock."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _in_model_order(skeleton: Skeleton) -> Iterator[Any]:
    """Stored tensors as files will hold them: what is outside the blocks, then block by block."""
    tensors = skeleton.checkpoint.tensors
    by_stored = {stored: name for name, stored in skeleton.stored.items()}
    prefix = f"{skeleton.architecture.blocks}."

    def key(stored: str) -> tuple[int, str]:
        name = by_stored.get(stored, stored)
        inside = name.startswith(prefix)
        return (int(name.removeprefix(prefix).split(".")[0]) if inside else -1, stored)

    yield from (tensors[stored] for stored in sorted(tensors, key=key))


def files_of(
    plan: Plan, skeleton: Skeleton, linears: Iterable[Linear], form: Format, left: Sizes | None = None
) -> Iterator[Shard]:
    """The files to be written: the weights, and the masks where the format packs weights."""
    if left is not None:
        before = Sizes.of(skeleton.architecture, skeleton.config)
        slots_left = slots_after(skeleton, before, left, [info.name for info in _in_model_order(skeleton)])
        yield from lay_out(slots_left, int(plan.exports[0].shard_size))
        return
    by_stored = {linear.stored: linear for linear in linears if linear.passes}
    slots: list[Slot] = []
    for info in _in_model_order(skeleton):
        linear = by_stored.get(info.name)
        slots += form.slots(linear) if linear else [Slot(info.name, info.dtype, info.shape)]
    yield from lay_out(slots, int(plan.exports[0].shard_size))
    unsaid = [linear for linear in linears if linear.masked and not form.tells_mask(linear)]
    masks = [Slot(f"{n.name}.mask", "U8", (n.out_features, -(-n.in_features // 8))) for n in unsaid]
    if masks:
        yield Shard(MASKS, tuple(masks))


def _warnings(plan: Plan, skeleton: Skeleton) -> Iterator[str]:
    if "/" in plan.model.path and not plan.resolve(plan.model.path).is_dir() and plan.model.revision is None:
        yield "the hub model has no revision: the lock is not reproducible"
    if skeleton.extra:
        count = len(skeleton.extra)
        yield f"{count} stored tensors are unknown to the model and copied as they are: {skeleton.extra[0]}"
