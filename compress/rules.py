"""What a plan cannot mean: the questions that the lock asks of passes, linears, formats and texts together.

The rules of composition are data (`RULES`): a pass names the rule that places it, and declares what it establishes,
requires and preserves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.calibration.plan_source import SELF, located
from compress.calibration.sources import is_file, texts
from compress.checkpoint import DTYPES
from compress.errors import PlanError, nearest
from compress.evals.planned import check_tasks
from compress.export.formats import Format, known_formats
from compress.hub import reason
from compress.passes.base import BlockPass, Invariant, LinearPass, SettingError, matches
from compress.passes.pruning import PruningPass
from compress.passes.structured import Structured
from compress.track import check_track

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.grid import GridSpec
    from compress.lock import Linear, Lock
    from compress.passes.base import Pass
    from compress.plan import Plan
    from compress.plan_text import Location, Source

# The rules of composition (DESIGN section 6). A pass names the rule that places it; what it may not break is what
# earlier passes established and it does not preserve.
RULES: dict[int, tuple[str, str]] = {
    1: ("rewrites that preserve the function work on dense, unquantized weights", "move the rewrite to the front"),
    2: ("structured pruning comes before any mask or grid", "move it before the pass that makes the mask or grid"),
    3: ("a mask is chosen before weights are put on a grid", "prune first, then quantize"),
    4: ("recovery keeps the mask; a LoRA is never merged after a mask or a grid exists", "use a variant that keeps it"),
    5: ("quantization respects the mask, and comes after weights stop moving", "quantize once, before compensation"),
    6: ("scales are trained with codes and mask fixed, so there must be a grid", "put a quantizer before it"),
    7: ("compensation comes last, on frozen weights", "move it to the end"),
    8: ("packing reads mask and codes", "export after all passes"),
}
# What a pass would break of earlier ones, where the fix of its rule mends it; `_mend` has the others.
MENDED: dict[int, frozenset[Invariant]] = {
    1: frozenset(Invariant),
    2: frozenset({Invariant.MASK, Invariant.PATTERN, Invariant.GRID}),
    3: frozenset({Invariant.GRID}),
    4: frozenset(Invariant),
}


def check_order(plan: Plan, stage: tuple[int, ...], linears: Iterable[Linear]) -> None:
    """Refuse passes that break what an earlier one established, or lack what they require, on any one linear.

    Structured pruning at the end of a `stage` changes every linear, also those that it does not read.
    """
    checked: set[tuple[int, ...]] = set()
    last = plan.passes[stage[-1]]
    everywhere = {stage[-1]: last} if isinstance(last, Structured) else {}
    for linear in linears:
        key = tuple(index for index, _ in linear.passes)
        if key in checked and not any(one.where for one in plan.passes):
            continue
        checked.add(key)
        established: dict[Invariant, int] = {}
        for index, one in (dict(linear.passes) | everywhere).items():
            missing = one.requires - set(established)
            broken = set(established) & ((set(established) - one.preserves) | one.breaks())
            if missing or broken:
                raise _out_of_order(plan, linear, index, one, established, missing, broken)
            established |= dict.fromkeys(one.provides(), index)


def _out_of_order(
    plan: Plan,
    linear: Linear,
    index: int,
    one: Pass,
    established: dict[Invariant, int],
    missing: set[Invariant] | frozenset[Invariant],
    broken: set[Invariant],
) -> PlanError:
    rule, fix = RULES[one.rule]
    if missing:
        needs = " and ".join(sorted(missing))
        problem = f"{one.use()} needs a {needs}, which no earlier pass makes for {linear.name}"
    else:
        what = sorted(broken)[0]
        earlier = established[what]
        fix = _mend(plan, one, established, broken)
        problem = f"{one.use()} would break the {what} that pass[{earlier}] {plan.passes[earlier].use()} makes"
        problem += f" for {linear.name}"
    if not type(one).__module__.startswith("compress."):
        fix += "; a pass of your own must list what it preserves"
    return PlanError(f"{problem}; rule {one.rule}: {rule}", where=plan.source.where(("pass", index)), fix=fix)


def _mend(plan: Plan, one: Pass, established: dict[Invariant, int], broken: Iterable[Invariant]) -> str:
    """What to do about a pass that would break something of earlier ones."""
    twice = sorted(set(broken) & one.provides())
    if twice:
        return f"leave one of the two out: a linear has one {twice[0]}"
    if set(broken) <= MENDED.get(one.rule, frozenset()) and (one.rule != 3 or isinstance(one, PruningPass)):
        return RULES[one.rule][1]
    index = min(established[what] for what in broken)
    return f"move it before pass[{index}] {plan.passes[index].use()}"


def check_format(plan: Plan, linears: Iterable[Linear], form: Format) -> None:
    """Refuse a grid that the plan's format cannot hold, and name the formats that can."""
    grids: set[GridSpec] = set()
    for linear in linears:
        _check_codes(plan, linear, form)
        if linear.grid is None or linear.grid.kind != "int":
            continue
        grids.add(linear.grid)
        location = ("pass", max(index for index, one in linear.passes if one.grid() is not None))
        stored = linear.grid.scale_dtype or DTYPES[linear.dtype]
        if torch.promote_types(stored, DTYPES[linear.dtype]) != DTYPES[linear.dtype]:
            name = str(stored).removeprefix("torch.")
            raise PlanError(
                f"{linear.name}: readers cast {name} scales to the model's {linear.dtype}, which does not hold them",
                where=plan.source.where((*location, "scale_dtype")),
                fix='leave scale_dtype out: "auto" is the dtype of the checkpoint',
            )
        reason = form.refusal(linear, linear.grid)
        if reason:
            fitting = [name for name, other in known_formats().items() if not other.refusal(linear, linear.grid)]
            raise _unfit(plan, form, f"{linear.name}: {reason}", location, fitting)
    reason = form.conflict(grids)
    if reason:
        fitting = [name for name, other in known_formats().items() if not other.conflict(grids)]
        raise _unfit(plan, form, reason, ("export", 0, "format"), fitting)


def _check_codes(plan: Plan, linear: Linear, form: Format) -> None:
    """The codes of packed formats are integers on a grid that the lock knows."""
    for index, one in linear.passes:
        grid = one.grid()
        if form.any_grid or Invariant.GRID not in one.provides() or (grid is not None and grid.kind == "int"):
            continue
        reason = f"{one.use()} makes NormalFloat codes" if grid else f"{one.use()} chooses grids during the run"
        fitting = [name for name, other in known_formats().items() if other.any_grid]
        raise _unfit(plan, form, f"{linear.name}: {reason}", ("pass", index), fitting)


def _unfit(plan: Plan, form: Format, reason: str, location: Location, fitting: list[str]) -> PlanError:
    return PlanError(
        f"the format {form.name} cannot hold it: {reason}",
        where=plan.source.where(location),
        fix=f"other bits or group_size, or an [[export]] format that holds it: {', '.join(fitting)}",
    )


def check_patterns(plan: Plan, stage: tuple[int, ...], names: list[str], head: str) -> None:
    """Every glob must match something, and every pass of a stage must have something to do."""
    for index in stage:
        one = plan.passes[index]
        targets = [name for name in names if one.targets(name)]
        for pattern in one.match:
            if matches(head, (pattern,)) and not any(matches(name, (pattern,)) for name in names):
                raise PlanError(
                    f'"{pattern}" is the output head, which is in no decoder block; passes work on blocks',
                    where=plan.source.where(("pass", index, "match")),
                    fix="leave the head dense",
                )
            _must_match(pattern, names, plan.source, ("pass", index, "match"))
        for pattern in one.except_:
            _must_match(pattern, [*names, head], plan.source, ("pass", index, "except"))
        for number, table in enumerate(one.where):
            for pattern in table.match:
                _must_match(pattern, targets, plan.source, ("pass", index, "where", number, "match"))
        if not targets:
            raise PlanError("excepts every linear", where=plan.source.where(("pass", index)), fix="remove an except")


def _must_match(pattern: str, names: list[str], source: Source, location: tuple[str | int, ...]) -> None:
    if any(matches(name, (pattern,)) for name in names):
        return
    leaf = {name.rsplit(".", 1)[-1]: f"*.{name.rsplit('.', 1)[-1]}" for name in names}
    close = nearest(pattern, [*leaf.values(), *leaf, *names])
    some = ", ".join(list(dict.fromkeys(leaf.values()))[:8])
    raise PlanError(
        f'"{pattern}" matches no linear{close}', where=source.where(location), fix=f"patterns that match: {some}"
    )


def check_calibration(lock: Lock) -> None:
    plan = lock.plan
    context = getattr(lock.config, "max_position_embeddings", None)
    if lock.calibrated and plan.calibration is None:
        needing = [i for lin in lock.linears for i, p in lin.passes if _needs_data(p)]
        index = needing[0]
        raise PlanError(
            f"{plan.passes[index].use()} needs calibration data",
            where=plan.source.where(("pass", index)),
            fix='add [calibration] with source = a text file, a hub dataset or "self"',
        )
    for table, key in (("calibration", "length"), ("evaluate", "window")):
        value = getattr(getattr(plan, table), key, None)
        if context and value and value > context:
            raise PlanError(
                f"{key} {value} is more than the model's context of {context}",
                where=plan.source.where((table, key)),
                fix=f"{key} = {context} or less",
            )


def check_passes(lock: Lock) -> None:
    """What passes say of the model and the calibration set, and what none of them can have."""
    plan = lock.plan
    for index in lock.stage:
        one = plan.passes[index]
        try:
            one.check_lock(lock, index)
            if one.where and not isinstance(one, LinearPass):
                problem = f"{one.use()} works on many linears together: it has one set of settings"
                raise SettingError(problem, "leave where out; match and except choose the linears", ("where", 0))
        except SettingError as error:
            raise plan.refusal(index, error) from None


def _needs_data(one: Pass) -> bool:
    return one.learns() or (isinstance(one, (LinearPass, BlockPass)) and bool(one.needed()))


def check_output(plan: Plan, model: Path) -> None:
    """The output must not be the model, nor be in it, nor hold it: replacing it would destroy the model.

    `model`: its directory.
    """
    where = plan.source.where(("run", "output"))
    try:
        output, model = plan.resolve(plan.run.output).resolve(), model.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise PlanError(f"cannot be looked for: {reason(error)}", where=where, fix="choose another output") from None
    if output == model or output.is_relative_to(model) or model.is_relative_to(output):
        relation = "is" if output == model else "lies in" if output.is_relative_to(model) else "holds"
        raise PlanError(f"the output {relation} the model directory", where=where, fix="choose another output")


def check_texts(plan: Plan) -> None:
    """Texts must be there, and be of a kind that is read, before hours of work, not when their turn comes."""
    calibration, named = plan.calibration, []
    if calibration and calibration.source != SELF:
        keys = {key: getattr(calibration, key) for key in ("name", "split", "column")}
        named = [(("calibration", "source"), calibration.source, keys)]
    elif calibration:
        for key in ("name", "split", "column"):
            if getattr(calibration, key) is not None:
                where = plan.source.where(("calibration", key))
                raise PlanError(f'text that the model samples ("self") has no {key}', where=where, fix=f"remove {key}")
    named += [(("evaluate", "perplexity"), text, {}) for text in (plan.evaluate.perplexity if plan.evaluate else ())]
    for location, source, keys in named:
        place = located(source, plan.folder)
        path, where = Path(place).expanduser(), plan.source.where(location)
        if is_file(place) and not path.is_file():
            others = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
            raise PlanError(
                f'no such file "{path}"{nearest(path.name, others)}',
                where=where,
                fix="correct the path; it is relative to the plan file",
            )
        try:
            texts(place, **keys, default_split="train")  # opens nothing yet
        except PlanError as error:
            raise PlanError(f'"{source}": {error.problem}', where=where, fix=error.fix) from None
    check_tasks(plan)
    check_track(plan)
