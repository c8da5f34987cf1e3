"""Plan + config.json + safetensors headers -> Lock, stage by stage.

Nothing here reads a weight. What the plan cannot mean is refused here: patterns that match nothing, shapes that a
setting does not fit, passes in an order that would break what an earlier one promised.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architecture import architecture_for, is_heterogeneous, of_block
from compress.checkpoint import Checkpoint
from compress.errors import ModelError, PlanError
from compress.export.formats import known_formats
from compress.export.huggingface import copied_files
from compress.hub import config_digest, find_model, load_config
from compress.lock import Linear, Lock, files_of
from compress.passes.base import BlockPass, LinearPass, ModelPass, Pass, SettingError, matches
from compress.passes.quantizing import GridSettings
from compress.passes.structured import Narrowing, Structured
from compress.rules import (
    check_calibration,
    check_format,
    check_order,
    check_output,
    check_passes,
    check_patterns,
    check_texts,
)
from compress.stream import Skeleton
from compress.structure import Sizes, sketch, width_named

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from compress.architecture import Architecture
    from compress.export.formats import Format
    from compress.plan import Plan


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
    check_output(plan, lock.root.directory)
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
    skeleton = Skeleton(checkpoint, config, architecture, trust_remote_code=plan.model.trust_remote_code)
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
    if before:
        _check_widths(plan, before, linears, form)
    shards = tuple(files_of(plan, skeleton, linears, form, left))
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
            Skeleton(Checkpoint(drawn), smaller, architecture, trust_remote_code=plan.model.trust_remote_code)
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
        if is_heterogeneous(config):
            problem = "blocks have different widths already, and structured pruning makes them of one"
            fix = "put it in front of the pass with heterogeneous = true" if stage[0] else "give the model from before"
            raise SettingError(problem, fix)
        return one.left(Sizes.of(architecture, config), architecture, config)
    except SettingError as error:
        raise plan.refusal(stage[-1], error) from None


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
        _check_shape(plan, index, bare, linear)
        chosen.append((index, bare))
    return replace(linear, passes=tuple(chosen))


def _check_shape(plan: Plan, index: int, bare: Pass, linear: Linear) -> None:
    """That the settings of a pass for a linear, `bare`, fit its shape."""
    try:
        bare.check_shape(linear.out_features, linear.in_features)
    except SettingError as error:
        where = plan.source.where(_to_blame(plan.passes[index], index, linear))
        raise PlanError(f"{linear.name}: {error}", where=where, fix=error.fix) from None


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
            later = {
                name
                for name, n in inside.items()
                if any(i > index and isinstance(p, GridSettings) and p.grid() for i, p in linears[n].passes)
            }
            try:
                config = of_block(skeleton.config, block)
                taken = one.takes(skeleton.architecture, config, targets, later) if targets else []
            except SettingError as error:
                raise plan.refusal(index, error) from None
            for name, n in inside.items():
                others = {i: p for i, p in linears[n].passes if i != index}
                mine = {index: one.for_linear(linears[n].name)} if name in taken else {}
                linears[n] = replace(linears[n], passes=tuple(sorted((others | mine).items())))
    return tuple(linears)


def _check_widths(plan: Plan, before: Lock, linears: tuple[Linear, ...], form: Format) -> None:
    """What the sketch cannot show: later settings must fit every width that a block may be left with.

    Raises:
        PlanError: they do not.
    """
    one = plan.passes[before.stage[-1]]
    if before.left is None or not isinstance(one, Narrowing):
        return
    for name in before.left.different:
        width, step = width_named(before.architecture, name), one.step(name)
        left, most = before.left.total(name), before.sizes.at(name, 0) // step * step
        rest = before.blocks - 1
        possible = range(max(step, left - rest * most), min(most, left - rest * step) + 1, step)
        whole = {linear.name: linear for linear in before.linears}
        for linear in linears:
            inside = linear.name.removeprefix(before.skeleton.prefix(linear.block))
            if not linear.passes or inside not in (*width.rows, *width.columns):
                continue
            key = "in_features" if inside in width.columns else "out_features"
            each = getattr(whole[linear.name], key) // before.sizes.at(name, linear.block)
            others = [replace(linear, **{key: each * units}) for units in possible]
            for other in others:
                for index, bare in other.passes:
                    _check_shape(plan, index, bare, other)
            check_format(plan, others, form)


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
        if isinstance(one, BlockPass) and one.scores():
            sweeps.append([index])
    return tuple(tuple(sweep) for sweep in sweeps if sweep)
