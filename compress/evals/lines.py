"""From outcomes to the lines of a report: figures with confidence intervals, flips against the dense model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from compress.evals import statistics
from compress.evals.compared import PERPLEXITIES, kind_of, losses_of, series_of
from compress.evals.harness import not_finite
from compress.evals.pairing import pair
from compress.evals.results import Figure, Flips, MetricLine, TaskLine, TasksInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.evals.outcomes import Outcomes, Sample, Task
    from compress.evals.results import TokenLine


def task_lines(
    found: Outcomes, dense: Outcomes | None = None, tokens: Mapping[str, TokenLine] | None = None
) -> tuple[TaskLine, ...]:
    """A line per task, with what is known of the dense model and of the divergence from it.

    Raises:
        PlanError: the samples of the two models do not match one to one.
    """
    return tuple(_line(task, found, dense, (tokens or {}).get(task.name)) for task in found.tasks)


def tasks_info(found: Outcomes) -> TasksInfo:
    """The conditions that all lines share."""
    return TasksInfo(harness=found.harness, batch_size=found.batch_size, dtype=found.dtype, limit=found.limit)


def unheeded(found: Outcomes) -> list[str]:
    """The tasks whose files say how many examples a prompt has, whatever was asked for."""
    asked = found.num_fewshot
    return [
        f"{task.name}: prompts have {task.num_fewshot} examples, as its file says, not {asked}"
        for task in found.tasks
        if asked is not None and task.num_fewshot != asked
    ]


def _line(task: Task, found: Outcomes, dense: Outcomes | None, tokens: TokenLine | None) -> TaskLine:
    samples = found.samples[task.name]
    first = _once(samples)
    before = {one.name: one for one in dense.tasks}.get(task.name) if dense else None
    return TaskLine(
        task=task.name,
        samples=task.samples,
        num_fewshot=task.num_fewshot,
        metrics=tuple(
            MetricLine(
                metric=name,
                higher_is_better=task.higher_is_better.get(name.partition(",")[0], True),
                compressed=figure_of(task, name, samples),
                dense=figure_of(before, name, dense.samples[task.name]) if dense and before else None,
            )
            for name in task.metrics
        ),
        ties=sum(one.tied for one in first),
        not_finite=not_finite(first),
        flips=_flips(task, _once(dense.samples[task.name]), first) if dense and before else None,
        divergence=tokens.divergence if tokens else None,
        positions=tokens.positions if tokens else (),
    )


def figure_of(task: Task, name: str, samples: list[Sample]) -> Figure:
    """A metric of the harness, with its 95 % interval where it is a mean over samples."""
    metric, _, chosen = name.partition(",")
    rows = [one.metrics.get(metric, ()) for one in samples if one.filter == (chosen or "none")]
    value, aggregation = task.metrics[name], task.aggregation.get(metric, "")
    sized = bool(rows) and len({len(row) for row in rows}) == 1 and len(rows[0]) in (1, 2)
    if not sized or aggregation not in ("mean", *PERPLEXITIES) or not np.isfinite(rows).all():
        return Figure(value=value)
    values = np.array([row[0] for row in rows])
    weights = np.array([row[1] if len(row) == 2 else 1.0 for row in rows])
    low, high = statistics.interval(values, weights)
    if aggregation in PERPLEXITIES:  # of −θ: the ends change places
        low, high = (_perplexity(aggregation, end) for end in (high, low))
    return Figure(value=value, low=low, high=high)


def _perplexity(aggregation: str, mean: float) -> float:
    return -mean / math.log(2) if aggregation == "bits_per_byte" else math.exp(min(-mean, 700.0))


def _once(samples: list[Sample]) -> list[Sample]:
    """Each document once: under the task's first filter."""
    return [one for one in samples if one.filter == samples[0].filter]


def _flips(task: Task, dense: list[Sample], found: list[Sample]) -> Flips | None:
    """Of the first accuracy that the task has; None where a log-likelihood is not finite: argmax takes the first."""
    if not_finite([*dense, *found]):
        return None
    pairs = pair(task.name, found, dense, "the dense model")
    answers = [one.answer != other.answer for one, other in pairs if one.answer is not None]
    for metric, aggregation in task.aggregation.items():
        series = series_of(pairs, metric)
        if series and kind_of(aggregation, series) == "accuracy":
            losses = losses_of(task, metric, "accuracy", series)
            worse, better = int((losses > 0).sum()), int((losses < 0).sum())
            return Flips(worse=worse, better=better, answers=sum(answers) if answers else None)
    return None
