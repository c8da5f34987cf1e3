"""The tasks and the gate of a plan: checked before a weight is read, measured on the staged directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from compress.evals.outcomes import Outcomes
    from compress.evals.results import GateResult, TaskLine, TasksInfo, TokenLine
    from compress.plan import Plan

DENSE = "the dense model"


@dataclass(frozen=True)
class Measured:
    """What a report has of tasks and of the gate; nothing where the plan names none."""

    lines: tuple[TaskLine, ...] = ()
    info: TasksInfo | None = None
    gate: GateResult | None = None


def check_tasks(plan: Plan) -> None:
    """Refuse tasks and a gate that could not be carried out, as far as that is known without loading a task.

    Raises:
        PlanError: lm-eval is not installed; a task, its file or the folder of task files is not there; or the gate has
            nothing to judge or a baseline that is not to be compared with.
    """
    tasks = plan.evaluate.tasks if plan.evaluate else ()
    gate = plan.gate
    if not tasks and not gate:
        return
    from compress.evals.commands import settings_for
    from compress.evals.harness import need_harness, quiet
    from compress.evals.specs import check_names, read_specs

    need_harness()
    where = plan.source.where(("evaluate", "tasks"))
    specs = read_specs(tasks, plan.folder, where)
    with quiet():
        check_names(specs, _include_path(plan), where)
    if gate and gate.baseline:
        same, folder = settings_for(_baseline(plan, gate.baseline)), plan.resolve(gate.baseline).parent
        own = folder / same.include_path if same.include_path else None
        with quiet():
            check_names(read_specs(same.tasks, folder, where), own, plan.source.where(("gate", "baseline")))
    elif gate and not tasks:
        fix = 'give tasks = [...] in [evaluate], or baseline = "FILE" here'
        raise PlanError("the gate has nothing to judge", where=plan.source.where(("gate",)), fix=fix)


def _include_path(plan: Plan) -> Path | None:
    """The folder of the user's own task files. Raises PlanError where it is not there."""
    if not plan.evaluate or not plan.evaluate.include_path:
        return None
    path = plan.folder / plan.evaluate.include_path
    if not path.is_dir():
        where = plan.source.where(("evaluate", "include_path"))
        raise PlanError(f'no such folder "{path}"', where=where, fix="give the folder of your task files")
    return path


def _baseline(plan: Plan, name: str) -> Outcomes:
    """The baseline that a gate names, its samples found."""
    from compress.evals.commands import check_early, settings_for
    from compress.evals.outcomes import Outcomes
    from compress.evals.specs import read_specs

    path = plan.resolve(name)
    where = plan.source.where(("gate", "baseline"))
    try:
        known = Outcomes.load(path)
        model = plan.resolve(plan.model.path)
        here = model if model.is_dir() else None
        check_early(known, path, here, trust_remote_code=plan.model.trust_remote_code)
        read_specs(settings_for(known).tasks, path.parent, str(path))
    except ModelError:  # of the plan's own model
        raise
    except PlanError as error:
        raise PlanError(f"{error.where}: {error.problem}", where=where, fix=error.fix) from None
    return known


def measure(
    plan: Plan, staged: Path, dense: Path, *, name: str, device: torch.device, say: Callable[[str], None]
) -> Measured:
    """Evaluate the tasks of a plan on both models, and hold its gate.

    Args:
        plan: names tasks, baseline and margins.
        staged: the directory that was written.
        dense: the model it came from.
        name: of the output.
        device: where to compute.
        say: takes a line for each task.

    Raises:
        PlanError: a task cannot be loaded, or the gate's two sides do not compare.
    """
    from compress.evals.commands import settings_for
    from compress.evals.divergence import token_lines
    from compress.evals.gate import compare
    from compress.evals.harness import run_tasks
    from compress.evals.lines import task_lines, tasks_info, unheeded

    settings, gate = plan.evaluate, plan.gate
    options: dict[str, Any] = {"device": device, "trust_remote_code": plan.model.trust_remote_code}
    diverge = settings is None or settings.divergence
    found = before = info = result = None
    tokens: dict[str, TokenLine] = {}
    lines: tuple[TaskLine, ...] = ()
    if settings and settings.tasks:
        found = run_tasks(staged, settings, folder=plan.folder, say=say, **options)
        for warning in unheeded(found):
            say(f"  warning: {warning}")
        before = run_tasks(dense, settings, folder=plan.folder, **options)
        tokens = token_lines(staged, dense, settings, folder=plan.folder, **options) if diverge else {}
        lines, info = task_lines(found, before, tokens), tasks_info(found)
    if gate:
        shown = DENSE
        if gate.baseline:  # what was evaluated above comes from the cache, where tasks and conditions agree
            before, shown = _baseline(plan, gate.baseline), gate.baseline
            same, folder = settings_for(before), plan.resolve(gate.baseline).parent
            found = run_tasks(staged, same, folder=folder, say=None if lines else say, **options)
            tokens = token_lines(staged, dense, same, folder=folder, **options) if diverge else {}
        assert found is not None
        assert before is not None
        named = found.model_copy(update={"model": name})
        result = compare(named, before, gate, name=shown, tokens=tuple(tokens.values()))
    return Measured(lines, info, result)
