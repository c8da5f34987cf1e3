"""What tasks and a gate found, as the report has it. docs/report.md explains every field.

Log-likelihoods are in nats, shares lie in 0..1, and a loss is how much worse the compressed model is.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator

from compress.settings import Settings

_FINITE = BeforeValidator(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
Measured = Annotated[float | None, _FINITE]
Kind = Literal["accuracy", "score", "perplexity", "loglikelihood"]
Verdict = Literal["pass", "fail", "inconclusive"]


class Divergence(Settings):
    """KL(dense ‖ compressed) per token in nats, agreement of the top token, RMS change of the target's probability."""

    kl_mean: Measured
    kl_median: Measured
    kl_p99: Measured
    kl_p999: Measured
    kl_max: Measured
    top1_agreement: Measured
    rms_delta_p: Measured


class PositionLine(Settings):
    """Divergence at the tokens of positions `first` to `last` (from 0) of their inputs."""

    first: int
    last: int
    tokens: int
    kl_mean: Measured
    top1_agreement: Measured


class Figure(Settings):
    """A figure of a task and its 95 % confidence interval over samples; no interval where it has no per-sample form."""

    value: Measured
    low: Measured = None
    high: Measured = None


class MetricLine(Settings):
    """One metric of a task, of the dense model too where that was evaluated."""

    metric: str
    higher_is_better: bool
    compressed: Figure
    dense: Figure | None = None


class Flips(Settings):
    """Samples on which two models differ. `answers`: another choice, right or wrong; None: there are no choices."""

    worse: int  # right before, wrong now
    better: int
    answers: int | None = None


class TaskLine(Settings):
    """One task: how it was asked, its metrics, and how far the answers are from the dense model's."""

    task: str
    samples: int
    num_fewshot: int
    metrics: tuple[MetricLine, ...]
    ties: int  # samples whose preferred answer has an equal: lm-eval counts the first of them as the answer
    not_finite: int  # samples with a log-likelihood that is NaN or infinite: the figures mean nothing
    flips: Flips | None = None
    divergence: Divergence | None = None
    positions: tuple[PositionLine, ...] = ()


class TasksInfo(Settings):
    """The conditions of all tasks of a report."""

    harness: str
    batch_size: int
    dtype: str
    limit: int | None = None


class Comparison(Settings):
    """One metric of one task against the baseline, on the same samples.

    `loss` is a share for accuracies, a relative increase for perplexities and bits per byte, nats per sample for
    log-likelihoods; `low` and `high` bound it, each at level alpha. `p` is that of a model which is no worse, `p_holm`
    after correction over all comparisons. `margin` None: shown, not judged.
    """

    task: str
    metric: str
    kind: Kind
    samples: int
    baseline: Measured
    value: Measured
    loss: Measured
    low: Measured
    high: Measured
    margin: float | None
    p: Measured
    p_holm: Measured = None
    flips: Flips | None = None
    answer_kl: Measured = None  # KL(baseline ‖ model) over the choices, mean, nats
    detects: Measured = None  # the loss at which an alarm has the stated power
    needed: int | None = None  # samples that would settle an inconclusive comparison with the stated power
    verdict: Verdict | None = None
    why: str = ""


class TokenLine(Settings):
    """Divergence of one task from a dense model, token by token."""

    task: str
    divergence: Divergence
    positions: tuple[PositionLine, ...]


class GateResult(Settings):
    """The verdict and all it rests on: gate.json."""

    schema_version: int = 1
    compress_version: str
    verdict: Verdict
    passed: bool
    inconclusive: Literal["fail", "pass"]  # what an inconclusive comparison counts as
    alpha: float
    power: float
    model: str
    baseline: str
    baseline_model: str
    comparisons: tuple[Comparison, ...]
    tokens: tuple[TokenLine, ...] = ()
    notes: tuple[str, ...] = ()
