"""What is compared of a task: which metrics under which filters, their values in both models, and what a loss is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.evals.outcomes import metric_name
from compress.evals.pairing import BASELINE, FOUND, tied_alone

if TYPE_CHECKING:
    from compress.evals.outcomes import Task
    from compress.evals.pairing import Pair
    from compress.evals.results import Kind
    from compress.plan import Gate

PERPLEXITIES = ("perplexity", "weighted_perplexity", "bits_per_byte")
LOGLIKELIHOOD = "loglikelihood"  # of the right answer of a multiple choice: ours, lm-eval has no such metric


@dataclass(frozen=True)
class Series:
    """The values (n,) of a metric in both models, and the weights (n,)."""

    baseline: Any
    found: Any
    weights: Any


@dataclass(frozen=True)
class Chosen:
    """A metric to compare, `name` with its filter, and what the pairs have of it."""

    task: Task
    metric: str
    name: str
    kind: Kind
    pairs: list[Pair]
    series: Series


def choose(task: Task, filters: list[str], pairs: list[Pair], settings: Gate) -> list[Chosen]:
    """What is compared of one task: the first accuracy, the first perplexity, the likelihood of right answers.

    Of several filters the first counts, unless `metrics` names another, as "exact_match,flexible-extract".
    """
    under = {chosen: [both for both in pairs if both[FOUND].filter == chosen] for chosen in filters}
    first = under[filters[0]]
    chosen: list[Chosen] = []
    for metric, aggregation in task.aggregation.items():
        for filtered, own in under.items():
            name = metric_name(metric, filtered)
            counted = _counted(own, metric) if aggregation == "nanmean" else own
            series = series_of(counted, metric)
            kind = series and kind_of(aggregation, series)
            if not series or not kind:
                continue
            named = name in settings.metrics or (own is first and metric in settings.metrics)
            default = own is first and kind not in {one.kind for one in chosen}
            if not (named if settings.metrics else default):
                continue
            if kind == "accuracy":
                wrong = 0.0 if task.higher_is_better.get(metric, True) else 1.0
                for side, values in ((BASELINE, series.baseline), (FOUND, series.found)):
                    values[[tied_alone(both, side) for both in counted]] = wrong
            chosen.append(Chosen(task, metric, name, kind, counted, series))
    if all(one.gold is not None for one, _ in first):
        before, after = (np.array([s.loglikelihoods[s.gold or 0] for s in side]) for side in zip(*first, strict=True))
        series = Series(before, after, np.ones(len(first)))
        chosen.append(Chosen(task, LOGLIKELIHOOD, LOGLIKELIHOOD, "loglikelihood", first, series))
    return chosen


def _counted(pairs: list[Pair], metric: str) -> list[Pair]:
    """The pairs in which the baseline has a number. One that the model alone lacks stays: it may have said nothing."""
    return [both for both in pairs if not any(map(math.isnan, both[BASELINE].metrics.get(metric, ())))]


def series_of(pairs: list[Pair], metric: str) -> Series | None:
    """What the pairs have of a metric; None unless each has a number, or one and a weight."""
    rows = [(one.metrics.get(metric, ()), other.metrics.get(metric, ())) for one, other in pairs]
    if not rows or not all(len(one) == len(other) and len(one) in (1, 2) for one, other in rows):
        return None
    weights = [one[1] if len(one) == 2 else 1.0 for one, _ in rows]
    before, after = (np.array([row[side][0] for row in rows]) for side in (0, 1))
    return Series(before, after, np.array(weights))


def kind_of(aggregation: str, series: Series) -> Kind | None:
    """How a metric is compared; None: it is no mean and no perplexity of its samples."""
    if aggregation in PERPLEXITIES:
        return "perplexity"
    if aggregation not in ("mean", "nanmean") or not (series.weights == 1).all():
        return None
    values = np.concatenate([series.baseline, series.found])
    return "accuracy" if np.isin(values[np.isfinite(values)], (0, 1)).all() else "score"


def losses_of(task: Task, metric: str, kind: Kind, series: Series) -> Any:
    """What the model is worse by on each sample: (n,). Likelihoods are never better when they fall."""
    down = kind in ("accuracy", "score") and not task.higher_is_better.get(metric, True)
    return series.found - series.baseline if down else series.baseline - series.found
