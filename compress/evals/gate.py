"""The gate: is a model still as good as its baseline, judged sample by sample.

For each judged metric of each task, with the margin m that the plan states:

- **pass**: the upper bound of the loss, at level alpha, is below m (non-inferiority; Piaggio et al. 2012). That all
  must pass needs no correction: a model that is worse by m on any task passes at about rate alpha at most
  (docs/evaluate.md says how near).
- **fail**: the loss is beyond m, and the model is worse at all, at level alpha after Holm's correction over all
  comparisons: a model that is no worse fails at most at rate alpha.
- **inconclusive**: neither; there are too few samples for this margin.

A model whose answers are those of the baseline, bit for bit, passes whatever their number. One with log-likelihoods
that are not finite fails, and an answer that is a tie in one model alone counts as wrong there: argmax takes the first
choice, and would call a model that says NaN or the same to everything perfect on minimal pairs. Both models are held
to it, since 16 bits make ties of their own: else of two equally good models the second would be the worse.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from compress import __version__
from compress.errors import PlanError, nearest
from compress.evals import statistics
from compress.evals.compared import choose, losses_of
from compress.evals.harness import not_finite
from compress.evals.outcomes import filters_of
from compress.evals.pairing import BASELINE, FOUND, check_conditions, differences, pair, tied_alone
from compress.evals.results import Comparison, Flips, GateResult, Kind, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.evals.compared import Chosen, Series
    from compress.evals.outcomes import Outcomes, Sample, Task
    from compress.evals.pairing import Pair
    from compress.evals.results import TokenLine
    from compress.evals.statistics import Bounds
    from compress.plan import Gate

SAME = "the same as the baseline, bit for bit"


def compare(
    found: Outcomes, baseline: Outcomes, settings: Gate, *, name: str, tokens: tuple[TokenLine, ...] = ()
) -> GateResult:
    """Judge outcomes against a baseline.

    Args:
        found: of the model in question.
        baseline: of the model to be as good as.
        settings: margins and levels.
        name: names the baseline.
        tokens: divergence token by token, to go with the result.

    Raises:
        PlanError: they do not compare: another harness, batch size, tokenizer, prompt or set of samples; or a metric
            that is named cannot be judged.
    """
    check_conditions(found, baseline, name)
    _check_metrics(found, settings)
    chosen: list[Chosen] = []
    notes = differences(found, baseline)
    for task in found.tasks:
        pairs = pair(task.name, found.samples[task.name], baseline.samples[task.name], name)
        filters = filters_of(found.samples[task.name])
        first = [both for both in pairs if both[FOUND].filter == filters[0]]  # each document once
        own = choose(task, filters, pairs, settings)
        chosen += own
        if all(_margin(one.kind, settings) is None for one in own):
            notes.append(f"{task.name}: none of its metrics is judged")
        broken = not_finite([after for _, after in first])
        now, then = (sum(tied_alone(both, side) for both in first) for side in (FOUND, BASELINE))
        if now:
            notes.append(f"{task.name}: {now:,} answers are ties that were none in the baseline; they count as wrong")
        if then:
            notes.append(f"{task.name}: {then:,} answers are ties in the baseline alone; they count as wrong there")
        if broken:
            notes.append(
                f"{task.name}: {broken:,} of {task.samples:,} samples have log-likelihoods that are not finite"
            )
    for metric in settings.metrics:
        if metric not in {shown for one in chosen for shown in (one.name, one.metric)}:
            problem = f'"{metric}" cannot be judged: it is no mean and no perplexity of its samples'
            raise PlanError(problem, where="gate.metrics", fix="leave it away, or name another metric")
    judged = [index for index, one in enumerate(chosen) if _margin(one.kind, settings) is not None]
    if not judged:
        raise PlanError("no metric of these tasks can be judged", where=name, fix="give a task with an accuracy")
    comparisons = [_compare(one, settings, len(judged)) for one in chosen]
    corrected = statistics.holm([_p(comparisons[index]) for index in judged])
    for index, p in zip(judged, corrected, strict=True):
        comparisons[index] = _judge(comparisons[index].model_copy(update={"p_holm": p}), settings)
    verdicts = {comparisons[index].verdict for index in judged}
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    return GateResult(
        compress_version=__version__,
        verdict=verdict,
        passed=verdict == "pass" or (verdict == "inconclusive" and settings.inconclusive == "pass"),
        inconclusive=settings.inconclusive,
        alpha=settings.alpha,
        power=settings.power,
        model=found.model,
        baseline=name,
        baseline_model=baseline.model,
        comparisons=tuple(comparisons),
        tokens=tokens,
        notes=tuple(notes),
    )


def _check_metrics(found: Outcomes, settings: Gate) -> None:
    """Refuse the name of a metric that no task has."""
    known = {metric for task in found.tasks for metric in (*task.aggregation, *task.metrics)}
    for metric in settings.metrics:
        if metric not in known:
            fix = f"the metrics of these tasks are {', '.join(sorted(known))}"
            raise PlanError(f'no task has a metric "{metric}"{nearest(metric, known)}', where="gate.metrics", fix=fix)


def _margin(kind: Kind, settings: Gate) -> float | None:
    """The margin of a kind of metric; None: it is shown, not judged."""
    if kind == "perplexity":
        return settings.perplexity_margin
    return settings.loglikelihood_margin if kind == "loglikelihood" else settings.margin


def _compare(one: Chosen, settings: Gate, judged: int) -> Comparison:
    """A metric: its loss and bounds; not judged yet. Of `judged` comparisons Holm corrects the least p by as much."""
    task, metric, kind, pairs, series = one.task, one.metric, one.kind, one.pairs, one.series
    n = len(pairs)
    losses = losses_of(task, metric, kind, series)
    worse, better = int((losses > 0).sum()), int((losses < 0).sum())
    margin = _margin(kind, settings)
    levels = settings.alpha, settings.resamples
    bits = task.aggregation.get(metric) == "bits_per_byte"
    finite = bool(np.isfinite(losses).all()) and not not_finite([found for _, found in pairs])
    bounds: Bounds | None = None
    if finite:
        bounds = (
            statistics.compare_flips(worse, better, n, *levels)
            if kind == "accuracy"
            else statistics.compare_losses(losses, -series.baseline if bits else series.weights, *levels)
        )
    inner = None if margin is None else _inner(kind, margin, bits)
    same = finite and all(one.loglikelihoods and _outcome(one) == _outcome(other) for one, other in pairs)
    detects = (
        statistics.detectable(bounds.variance, n, inner, settings.alpha / judged, settings.power)
        if bounds and inner is not None and math.isfinite(bounds.variance)
        else None
    )
    answers = [one.answer != other.answer for one, other in pairs if one.answer is not None]
    return Comparison(
        task=task.name,
        metric=one.name,
        kind=kind,
        samples=n,
        baseline=_shown(kind, metric, series.baseline, series.weights, task),
        value=_shown(kind, metric, series.found, series.weights, task) if finite else None,
        loss=_outer(kind, bounds.loss, bits) if bounds else None,
        low=_outer(kind, bounds.low, bits) if bounds else None,
        high=_outer(kind, bounds.high, bits) if bounds else None,
        margin=margin,
        p=bounds.p if bounds else None,
        flips=Flips(worse=worse, better=better, answers=sum(answers) if answers else None)
        if kind == "accuracy" and finite
        else None,
        answer_kl=_answer_kl(pairs) if kind == "accuracy" and finite else None,
        detects=None if detects is None else _outer(kind, detects, bits),
        needed=_needed(kind, bounds, inner, settings, judged) if bounds and inner is not None else None,
        why=SAME if same else "" if finite else _not_finite(pairs, series),
    )


def _not_finite(pairs: list[Pair], series: Series) -> str:
    """Why a loss is not finite."""
    if not_finite([found for _, found in pairs]):
        return "log-likelihoods are not finite"
    lacking, where = (~np.isfinite(series.baseline)).sum(), "in the baseline"
    if not lacking:
        lacking, where = (~np.isfinite(series.found)).sum(), "that are in the baseline"
    return f"{lacking:,} of {len(pairs):,} values are not finite {where}"


def _outcome(sample: Sample) -> str:
    """What tells two models apart on a sample: log-likelihoods do, generated texts that are both right do not.

    As text, in which NaN equals itself: some metrics leave a sample out so.
    """
    return repr((sample.loglikelihoods, sample.greedy, sample.metrics))


def _inner(kind: Kind, loss: float, bits: bool) -> float:
    """A loss as it is summed: of a perplexity nats; of bits per byte the relative increase itself."""
    return math.log1p(loss) if kind == "perplexity" and not bits else loss


def _outer(kind: Kind, loss: float, bits: bool) -> float:
    """A loss as it is shown: of a perplexity and of bits per byte the relative increase."""
    return math.expm1(min(loss, 700.0)) if kind == "perplexity" and not bits else loss


def _shown(kind: Kind, metric: str, values: Any, weights: Any, task: Task) -> float:
    mean = float(values.sum() / weights.sum())
    if kind != "perplexity":
        return mean
    return -mean / math.log(2) if task.aggregation.get(metric) == "bits_per_byte" else math.exp(min(-mean, 700.0))


def _needed(kind: Kind, bounds: Bounds, margin: float, settings: Gate, judged: int) -> int | None:
    """Samples that would settle it, if the loss were what it seems: to pass, or beyond the margin to be significant."""
    variance = max(bounds.variance, 0.0)
    if bounds.loss > margin:
        return statistics.sample_size(variance, bounds.loss, settings.alpha / judged, settings.power)
    found = statistics.sample_size(variance, margin - max(bounds.loss, 0.0), settings.alpha, settings.power)
    if found is None or kind != "accuracy":
        return found
    # Without a flip there is no variance to go by, but the score bound z² / (n + z²) still has to clear the margin.
    z = statistics.z(settings.alpha)
    return max(found, math.ceil(z * z * (1 - margin) / margin) + 1)


def _answer_kl(pairs: list[Pair]) -> float | None:
    """Mean KL(baseline ‖ model) of the distribution over a multiple choice's answers, in nats."""
    found = []
    for one, other in pairs:
        if one.answer is None:
            return None
        p, q = _log_softmax(one.loglikelihoods), _log_softmax(other.loglikelihoods)
        found.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return math.fsum(found) / len(found)


def _log_softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def _p(one: Comparison) -> float:
    return 0.0 if one.p is None else one.p


def _judge(one: Comparison, settings: Gate) -> Comparison:
    """A comparison with its verdict and the reason."""
    assert one.margin is not None
    assert one.p_holm is not None
    if one.loss is None:
        return one.model_copy(update={"verdict": "fail"})
    if one.why == SAME:
        return one.model_copy(update={"verdict": "pass"})
    if one.high is not None and one.high < one.margin:
        return one.model_copy(update={"verdict": "pass", "why": "", "needed": None})
    if one.loss > one.margin and one.p_holm <= settings.alpha:
        why = f"worse by more than the margin, p = {one.p_holm:.2g}"
        return one.model_copy(update={"verdict": "fail", "why": why, "needed": None})
    would = f"{one.needed:,} samples would do" if one.needed else "no number of samples is known to do"
    return one.model_copy(update={"verdict": "inconclusive", "why": f"too few samples for this margin; {would}"})
