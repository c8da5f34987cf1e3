"""The statistics of a gate: paired comparisons on the same samples, all one-sided, "worse" being the positive side.

A pair of models has, on sample i, a loss d_i (what the compressed model is worse by) and a weight w_i; the loss of a
task is θ = Σ d_i / Σ w_i. Two bounds are taken, and the wider one counts: the bootstrap over samples (Efron 1979),
and a closed form that holds where the bootstrap is too narrow, which it is for few samples and for few flips:

- accuracies: the score bound for the difference of paired proportions (Tango 1998, Statistics in Medicine 17:891);
- means and ratios: Student's t on the linearized losses d_i − θ w_i (Cochran 1977, Sampling Techniques, 6.13).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 9999
VALUES_AT_ONCE = 4 << 20  # of a bootstrap, 32 MiB


@dataclass(frozen=True)
class Bounds:
    """A loss, its bounds at level alpha on either side, the p-value of "no worse", and the variance of one sample."""

    loss: float
    low: float
    high: float
    p: float
    variance: float


def compare_flips(worse: int, better: int, n: int, alpha: float, resamples: int = RESAMPLES) -> Bounds:
    """Two models that are right or wrong on the same `n` samples, of which `worse` and `better` changed.

    The p-value is that of the exact one-sided McNemar test: given the flips, each direction is equally likely.
    """
    loss = (worse - better) / n
    p = float(stats.binomtest(worse, worse + better, 0.5, alternative="greater").pvalue) if worse + better else 1.0
    # Resampling samples is drawing how many of each kind there are: the multinomial law itself.
    shares = np.array([worse, better, n - worse - better]) / n
    counts = np.random.default_rng(0).multinomial(n, shares, size=resamples)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / n, [alpha, 1 - alpha])
    variance = (worse + better) / n - loss**2
    return Bounds(
        loss,
        min(float(low), -tango_upper(better, worse, n, alpha)),
        max(float(high), tango_upper(worse, better, n, alpha)),
        p,
        variance,
    )


def tango_upper(worse: int, better: int, n: int, alpha: float) -> float:
    """The largest Δ that the score test does not reject at level alpha in favour of a smaller loss (Tango 1998, eq. 5).

    The test statistic is (worse − better − nΔ) / √(n (2 q̂ + Δ (1 − Δ))) with q̂ the share of `better` that is most
    likely where the loss is Δ.
    """
    reach = z(alpha)

    def distance(delta: float) -> float:
        b = (2 * n - worse + better) * delta - worse - better
        c = -better * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        spread = n * (2 * q + delta * (1 - delta))
        return (worse - better - n * delta) + reach * math.sqrt(max(0.0, spread))

    estimate = (worse - better) / n
    if estimate >= 1:
        return 1.0
    start = estimate + 1e-12  # without a flip the estimate itself is a root
    return float(optimize.brentq(distance, start, 1.0)) if distance(1.0) < 0 else 1.0


def compare_losses(losses: Array, weights: Array, alpha: float, resamples: int = RESAMPLES) -> Bounds:
    """Two models by their losses (n,) on the same samples, of the given weights (n,).

    The p-value is the larger one of the bootstrap's and Student's. One sample bounds nothing.
    """
    order = np.lexsort((weights, losses))  # the result must not depend on the order of samples
    losses, weights = losses[order], weights[order]
    n = len(losses)
    loss = float(losses.sum() / weights.sum())
    residuals = losses - loss * weights
    scale = float(weights.mean())
    if n < 2:
        return Bounds(loss, -math.inf, math.inf, 1.0, math.inf)
    variance = float(residuals @ residuals) / (n - 1) / scale**2
    error = math.sqrt(variance / n)
    if error == 0:
        return Bounds(loss, loss, loss, 0.0 if loss > 0 else 1.0, 0.0)
    drawn = bootstrap(losses, weights, resamples)
    low, high = (float(q) for q in np.quantile(drawn, [alpha, 1 - alpha]))
    reach = float(stats.t.ppf(1 - alpha, n - 1)) * error
    p = max((1 + int((drawn <= 0).sum())) / (1 + resamples), float(stats.t.sf(loss / error, n - 1)))
    return Bounds(loss, min(low, loss - reach), max(high, loss + reach), p, variance)


def bootstrap(values: Array, weights: Array, resamples: int = RESAMPLES) -> Array:
    """Σ values / Σ weights over samples (n,) drawn anew with replacement: (resamples,). The seed is fixed."""

    def ratio(v: Array, w: Array, axis: int) -> Array:
        total: Array = v.sum(axis) / w.sum(axis)
        return total

    found = stats.bootstrap(
        (values, weights),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, VALUES_AT_ONCE // len(values)),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    drawn: Array = found.bootstrap_distribution
    return drawn


def interval(values: Array, weights: Array, confidence: float = 0.95) -> tuple[float, float]:
    """Of Σ values / Σ weights: Wilson's (1927) interval where all values are 0 or 1, else the bootstrap's."""
    n = len(values)
    if np.isin(values, (0, 1)).all() and (weights == 1).all():
        found = stats.binomtest(int(values.sum()), n).proportion_ci(confidence, method="wilson")
        return float(found.low), float(found.high)
    if n < 2:
        return -math.inf, math.inf
    order = np.lexsort((weights, values))
    tail = (1 - confidence) / 2
    low, high = np.quantile(bootstrap(values[order], weights[order]), [tail, 1 - tail])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that any of them below alpha is an error at rate alpha (Holm 1979)."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def z(alpha: float) -> float:
    """The quantile of the standard normal law that is exceeded at rate alpha."""
    return float(stats.norm.ppf(1 - alpha))


def sample_size(variance: float, distance: float, alpha: float, power: float) -> int | None:
    """Samples for which a bound at level alpha clears `distance` with the given power; None where there is none.

    n = (z_{1−alpha} + z_power)² · variance / distance².
    """
    if distance <= 0 or not math.isfinite(variance):
        return None
    return math.ceil((z(alpha) + z(1 - power)) ** 2 * variance / distance**2)


def detectable(variance: float, n: int, margin: float, alpha: float, power: float) -> float:
    """The loss at which the gate alarms with the given power.

    It alarms where the estimate is beyond the margin and beyond z_{1−alpha} standard errors; the true loss must exceed
    the larger of both by z_power standard errors.
    """
    error = math.sqrt(variance / n)
    return max(margin, z(alpha) * error) + z(1 - power) * error
