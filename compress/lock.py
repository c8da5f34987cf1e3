"""Plan + config.json + safetensors headers -> Lock: every linear, its passes and settings, every output byte.

Nothing here reads a weight. What the plan cannot mean is refused here: patterns that match nothing, shapes that a
setting does not fit, passes in an order that would break what an earlier one promised.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.architecture import architecture_for
from compress.checkpoint import MASKS, Checkpoint, Shard, Slot, index_text, lay_out
from compress.errors import CompressError, ModelError, PlanError
from compress.export.adapter import adapter_shard
from compress.export.formats import Format, known_formats
from compress.export.huggingface import copied_files
from compress.export.scales import scale_shards, set_passes
from compress.grid import Grid
from compress.hub import config_digest, find_model, load_config
from compress.passes.base import BlockPass, Invariant, LinearPass, ModelPass, Pass, SettingError, Statistics, matches
from compress.passes.structured import Structured
from compress.rules import check_calibration, check_format, check_order, check_passes, check_patterns, check_texts
from compress.state import kept_low_rank
from compress.stream import Skeleton
from compress.structure import Sizes, sketch, slots_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.architecture import Architecture
    from compress.grid import GridSpec
    from compress.plan import Plan


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
        return (*(self.before.warnings if self.before else _warnings(self.plan, self.skeleton)), *self._form_warnings)

    @property
    def _form_warnings(self) -> tuple[str, ...]:
        return tuple(self.form.warnings(self)) if self.ends else ()

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
            p.needed_of(name, self.architecture, self.config) if isinstance(p, BlockPass) else p.needed()
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
        """The lock with the grids and ranks that a run has found, where passes choose them under a budget or from data.

        `kept` reads what the journal keeps of a block in the end.
        """
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
        shards = tuple(_files(self.plan, self.skeleton, linears, self.form))
        return replace(self, linears=tuple(linears), shards=shards)

    @property
    def undecided(self) -> bool:
        """Whether a run chooses ranks or bits under a budget: then sizes are the largest there may be."""
        return any(getattr(self.plan.passes[index], "budget", None) is not None for index in self.stage)

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
        } | ({"left": asdict(self.left)} if self.left else {})

    def digest(self) -> str:
        """SHA-256 of the lock."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def compile_plan(plan: Plan) -> Lock:
    """Compile a plan against the headers of its model; the last stage, where it has several.

    Raises:
        PlanError: the plan asks for something impossible of this model.
        ModelError: the model cannot be used.
    """
    lock = None
    for stage in stages_of(plan):
        lock = compile_stage(plan, stage, lock)
    assert lock is not None
    check_texts(plan)
    return lock


def compile_stage(plan: Plan, stage: tuple[int, ...], before: Lock | None, directory: Path | None = None) -> Lock:
    """Compile one stage.

    Args:
        plan: of all stages.
        stage: the indices of its passes.
        before: the stage before.
        directory: what the stage before has made; without it, a sketch of that is made.

    Raises:
        PlanError, ModelError: as `compile_plan`.
    """
    if before is None:
        directory = find_model(plan.model, plan.folder, plan.source.where(("model", "path")))
    elif directory is None:
        assert before.left is not None
        with sketch(before.skeleton, before.left, before.shards) as drawn:
            return compile_stage(plan, stage, before, drawn)
    config = load_config(directory, trust_remote_code=plan.model.trust_remote_code)
    architecture = architecture_for(config.model_type)
    checkpoint = Checkpoint(directory)
    skeleton = _skeleton(plan, checkpoint, config, architecture)
    bare = list(_block_linears(skeleton))
    check_patterns(plan, stage, [linear.name for linear in bare], architecture.head)
    linears = _with_block_passes(plan, stage, skeleton, [_with_passes(linear, plan, stage) for linear in bare])
    check_order(plan, stage, linears)
    left = _left(plan, stage, architecture, config)
    form = known_formats()["huggingface" if left else plan.exports[0].format]
    if left and stage[-1] == len(plan.passes) - 1 and plan.exports[0].format != form.name:
        where, fix = plan.source.where(("export", 0, "format")), "leave it out, or put a quantizer behind"
        raise PlanError("structured pruning at the end leaves plain weights", where=where, fix=fix)
    check_format(plan, linears, form)
    shards = tuple(_files(plan, skeleton, linears, form, left))
    lock = Lock(
        plan,
        directory,
        checkpoint,
        config,
        skeleton,
        linears,
        _sweeps(plan, stage),
        shards,
        form,
        stage,
        left,
        before,
        config_digest(directory),
    )
    check_calibration(lock)
    check_passes(lock)
    copied_files(directory, code=plan.model.trust_remote_code)
    if left and lock.ends:
        with sketch(skeleton, left, shards) as drawn:  # that transformers builds what config.json will say
            smaller = load_config(drawn, trust_remote_code=plan.model.trust_remote_code)
            _skeleton(plan, Checkpoint(drawn), smaller, architecture)
    return lock


def stages_of(plan: Plan) -> list[tuple[int, ...]]:
    """Indices of the passes of each stage: a pass of structured pruning ends one."""
    stages: list[list[int]] = [[]]
    for index, one in enumerate(plan.passes):
        stages[-1].append(index)
        if isinstance(one, Structured):
            stages.append([])
    return [tuple(stage) for stage in stages if stage]


def _left(plan: Plan, stage: tuple[int, ...], architecture: Architecture, config: Any) -> Sizes | None:
    """The sizes that the structured pass at the end of a stage leaves."""
    one = plan.passes[stage[-1]]
    if not isinstance(one, Structured):
        return None
    try:
        return one.left(Sizes.of(architecture, config), architecture, config)
    except SettingError as error:
        raise plan.refusal(stage[-1], error) from None


def _skeleton(plan: Plan, checkpoint: Checkpoint, config: Any, architecture: Architecture) -> Skeleton:
    """The model without weights; a configuration that transformers cannot build is the model's mistake."""
    where = str(checkpoint.directory / "config.json")
    blocks, stored = getattr(config, "num_hidden_layers", None), len(checkpoint.tensors)
    if isinstance(blocks, int) and not 0 < blocks <= stored:  # before a hostile number of blocks is built
        fix = "weights and config.json are of different models; copy both again"
        raise ModelError(f"{blocks} blocks do not match the {stored} stored tensors", where=where, fix=fix)
    try:
        return Skeleton(checkpoint, config, architecture, trust_remote_code=plan.model.trust_remote_code)
    except CompressError:
        raise
    except Exception as error:  # transformers and torch raise many kinds for a wrong configuration
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise ModelError(
            f"the model cannot be built from it: {reason}", where=where, fix="correct config.json"
        ) from None


def _block_linears(skeleton: Skeleton) -> Iterator[Linear]:
    """Every linear of every block, without passes, in the order in which the model runs them."""
    architecture = skeleton.architecture
    for index in range(len(skeleton.blocks)):
        for subset, names in enumerate(architecture.subsets):
            for name in names:
                full = skeleton.prefix(index) + name
                stored = skeleton.stored.get(f"{full}.weight")
                if stored is None:
                    raise ModelError(
                        f"{full}.weight is missing",
                        where=str(skeleton.checkpoint.directory),
                        fix=f"the model is not a plain {skeleton.config.model_type}",
                    )
                info = skeleton.checkpoint.tensors[stored]
                transposed = name in architecture.transposed
                rows, columns = info.shape[::-1] if transposed else info.shape
                yield Linear(full, stored, index, subset, rows, columns, transposed, info.dtype, ())


def _with_passes(linear: Linear, plan: Plan, stage: tuple[int, ...]) -> Linear:
    chosen: list[tuple[int, Pass]] = []
    for index in stage:
        one = plan.passes[index]
        if not one.targets(linear.name):
            continue
        bare = one.for_linear(linear.name)
        try:
            bare.check_shape(linear.out_features, linear.in_features)
        except SettingError as error:
            where = plan.source.where(_to_blame(one, index, linear))
            raise PlanError(f"{linear.name}: {error}", where=where, fix=error.fix) from None
        chosen.append((index, bare))
    return replace(linear, passes=tuple(chosen))


def _with_block_passes(
    plan: Plan, stage: tuple[int, ...], skeleton: Skeleton, linears: list[Linear]
) -> tuple[Linear, ...]:
    """A block pass works on the linears that it takes, which may be others than those that its patterns name."""
    for index in stage:
        one = plan.passes[index]
        if not isinstance(one, BlockPass):
            continue
        for block in range(len(skeleton.blocks)):
            prefix = skeleton.prefix(block)
            inside = {lin.name.removeprefix(prefix): n for n, lin in enumerate(linears) if lin.block == block}
            targets = [name for name, n in inside.items() if index in dict(linears[n].passes)]
            later = {name for name, n in inside.items() if any(i > index and p.grid() for i, p in linears[n].passes)}
            try:
                taken = one.takes(skeleton.architecture, skeleton.config, targets, later) if targets else []
            except SettingError as error:
                raise plan.refusal(index, error) from None
            for name, n in inside.items():
                others = {i: p for i, p in linears[n].passes if i != index}
                mine = {index: one.for_linear(linears[n].name)} if name in taken else {}
                linears[n] = replace(linears[n], passes=tuple(sorted((others | mine).items())))
    return tuple(linears)


def _to_blame(one: Pass, index: int, linear: Linear) -> tuple[str | int, ...]:
    """The table whose settings do not fit a linear's shape: the last `where` that matches, or else the pass's own."""
    matching = [number for number, table in enumerate(one.where) if matches(linear.name, table.match)]
    try:
        one.with_settings({}).check_shape(linear.out_features, linear.in_features)
    except SettingError:
        return ("pass", index)
    return ("pass", index, "where", matching[-1]) if matching else ("pass", index)


def _sweeps(plan: Plan, stage: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Consecutive local passes share a sweep; one that surveys the whole model or works on blocks begins a new one."""
    sweeps: list[list[int]] = [[]]
    for index in stage:
        one = plan.passes[index]
        if not isinstance(one, (LinearPass, BlockPass, ModelPass)):
            where = plan.source.where(("pass", index))
            fix = "derive it from LinearPass, BlockPass or ModelPass"
            raise PlanError(f"{one.use()} has no way to be applied", where=where, fix=fix)
        if one.barrier():
            sweeps += [[index], []]
            continue
        every = [one, *(one.with_settings(table.overrides()) for table in one.where)]
        begins = isinstance(one, BlockPass) or any(each.surveys() for each in every if isinstance(each, LinearPass))
        if begins and sweeps[-1]:
            sweeps.append([])
        sweeps[-1].append(index)
    return tuple(tuple(sweep) for sweep in sweeps if sweep)


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


def _files(
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
