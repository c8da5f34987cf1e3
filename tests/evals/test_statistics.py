"""Each statistic against another way to the same number: enumeration, numerical likelihood, closed forms."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from scipy import optimize, stats

from compress.evals.statistics import (
    bootstrap,
    compare_flips,
    compare_losses,
    detectable,
    holm,
    interval,
    sample_size,
    tango_upper,
)

FLIPS = [(7, 3, 100), (0, 0, 50), (0, 6, 80), (9, 0, 80), (40, 35, 400), (3, 3, 10)]


@pytest.mark.parametrize(("worse", "better", "n"), FLIPS)
def test_mcnemar_is_the_tail_of_fair_coins(worse: int, better: int, n: int) -> None:
    coins = worse + better
    tail = sum(math.comb(coins, k) for k in range(worse, coins + 1)) / 2**coins
    assert compare_flips(worse, better, n, 0.05, 999).p == pytest.approx(tail, rel=1e-12)


def score_distance(delta: float, worse: int, better: int, n: int) -> float:
    """The score statistic at a loss of `delta`, with the nuisance share found by maximizing the likelihood."""

    def minus_likelihood(q: float) -> float:
        cells = ((worse, q + delta), (better, q), (n - worse - better, 1 - 2 * q - delta))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = optimize.minimize_scalar(minus_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (worse - better - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))


@pytest.mark.parametrize(("worse", "better", "n"), FLIPS)
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_tango_is_where_the_score_test_begins_to_reject(worse: int, better: int, n: int, alpha: float) -> None:
    bound = tango_upper(worse, better, n, alpha)
    assert score_distance(bound, worse, better, n) == pytest.approx(stats.norm.ppf(alpha), abs=1e-3)


def test_tango_without_flips_has_a_closed_form() -> None:
    """q̂ = 0 there, so that n²Δ² = z² n Δ (1 − Δ), which gives Δ = z² / (n + z²)."""
    z2 = stats.norm.ppf(0.95) ** 2
    assert tango_upper(0, 0, 200, 0.05) == pytest.approx(z2 / (200 + z2), rel=1e-9)


def test_tango_where_all_are_worse() -> None:
    assert tango_upper(20, 0, 20, 0.05) == 1.0


def test_bounds_cover_as_often_as_they_say() -> None:
    """Of 400 draws with a loss of 0.03, the upper bound lies below it at rate alpha at most, up to three deviations."""
    draw = np.random.default_rng(1)
    counts = draw.multinomial(600, [0.065, 0.035, 0.9], size=400)
    missed = sum(compare_flips(int(b), int(c), 600, 0.05, 999).high < 0.03 for b, c, _ in counts)
    assert missed <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


@pytest.mark.parametrize(("margin", "n"), [(0.01, 269), (0.02, 134), (0.05, 53), (0.05, 200)])
def test_how_often_a_model_that_is_worse_by_the_margin_passes(margin: float, n: int) -> None:
    """Summed over all outcomes: docs/evaluate.md says 0.07 where no answer turns right, and 0.06 else."""
    for better, most in ((0.0, 0.07), (margin / 4, 0.06), (margin, 0.06)):
        shares = np.array([margin + better, better, 1 - margin - 2 * better])
        flips = range(int(stats.binom.ppf(1 - 1e-6, n, 1 - shares[2])) + 1)
        passed = [
            stats.multinomial.pmf([worse, count - worse, n - count], n, shares)
            for count in flips
            for worse in range(count + 1)
            if (2 * worse - count) / n < margin and tango_upper(worse, count - worse, n, 0.05) < margin
        ]
        assert sum(passed) <= most


def test_the_bootstrap_against_all_resamples() -> None:
    values, weights = np.array([1.0, -2.0, 0.5, 4.0]), np.array([1.0, 3.0, 2.0, 1.0])
    every = [values[list(rows)].sum() / weights[list(rows)].sum() for rows in product(range(4), repeat=4)]
    drawn = bootstrap(values, weights, 20_000)
    for place in np.linspace(min(every), max(every), 9):
        share, expected = np.mean(drawn <= place), np.mean(np.array(every) <= place)
        assert abs(share - expected) < 4 * math.sqrt(0.25 / 20_000)


def test_flips_are_resampled_as_samples_are() -> None:
    """The multinomial draw of `compare_flips` has the law of resampling the samples themselves."""
    worse, better, n = 60, 40, 500
    losses = np.array([1.0] * worse + [-1.0] * better + [0.0] * (n - worse - better))
    low, high = np.quantile(bootstrap(losses, np.ones(n), 9999), [0.05, 0.95])
    found = compare_flips(worse, better, n, 0.05)
    error = math.sqrt((worse + better) / n - (1 / 25) ** 2) / math.sqrt(n)
    assert found.high == pytest.approx(max(high, tango_upper(worse, better, n, 0.05)), abs=0.1 * error)
    assert found.low == pytest.approx(min(low, -tango_upper(better, worse, n, 0.05)), abs=0.1 * error)


def test_losses_of_equal_weight_are_students() -> None:
    losses = np.random.default_rng(0).normal(0.1, 1, 40)
    found = compare_losses(losses, np.ones(40), 0.05, 999)
    test = stats.ttest_1samp(losses, 0, alternative="greater")
    reach = stats.t.ppf(0.95, 39) * losses.std(ddof=1) / math.sqrt(40)
    assert found.loss == pytest.approx(losses.mean())
    assert found.high >= found.loss + reach - 1e-12
    assert found.low <= found.loss - reach + 1e-12
    assert found.p >= test.pvalue - 1e-12
    assert found.variance == pytest.approx(losses.var(ddof=1))


def test_the_linearized_variance_is_that_of_the_ratio() -> None:
    """Against the spread of the ratio over fresh draws of documents."""
    draw = np.random.default_rng(2)
    weights = draw.integers(1, 50, (3000, 200)).astype(float)
    losses = 0.02 * weights + draw.normal(0, 0.3, weights.shape) * np.sqrt(weights)
    ratios = losses.sum(1) / weights.sum(1)
    one = compare_losses(losses[0], weights[0], 0.05, 999)
    assert math.sqrt(one.variance / 200) == pytest.approx(ratios.std(), rel=0.2)


def test_the_order_of_samples_does_not_matter() -> None:
    draw = np.random.default_rng(3)
    losses, weights = draw.normal(size=60), draw.integers(1, 9, 60).astype(float)
    order = draw.permutation(60)
    assert compare_losses(losses, weights, 0.05, 999) == compare_losses(losses[order], weights[order], 0.05, 999)
    assert interval(losses, weights) == interval(losses[order], weights[order])


def test_one_sample_and_equal_losses() -> None:
    alone = compare_losses(np.array([3.0]), np.ones(1), 0.05, 999)
    assert (alone.low, alone.high, alone.p) == (-math.inf, math.inf, 1.0)
    same = compare_losses(np.zeros(5), np.ones(5), 0.05, 999)
    assert (same.low, same.high, same.p) == (0, 0, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_the_closed_test_of_bonferroni(seed: int) -> None:
    p = list(np.random.default_rng(seed).uniform(0, 0.3, 5))
    expected = [
        max(
            min(1.0, size * min(p[k] for k in chosen))
            for size in range(1, 6)
            for chosen in combinations(range(5), size)
            if index in chosen
        )
        for index in range(5)
    ]
    assert holm(p) == pytest.approx(expected)


def test_sample_size_is_the_known_rule() -> None:
    """EVALS: about 6.2 · flip rate / margin²."""
    n = sample_size(0.05, 0.01, 0.05, 0.8)
    assert n is not None
    assert n == pytest.approx(6.18 * 0.05 / 0.01**2, rel=0.001)
    assert sample_size(0.05, 0.0, 0.05, 0.8) is None


def test_detectable_is_the_inverse_of_the_power() -> None:
    """At that loss the estimate passes both thresholds with the stated probability."""
    for margin in (0.02, 0.001):
        loss, error = detectable(0.1, 1500, margin, 0.05, 0.8), math.sqrt(0.1 / 1500)
        threshold = max(margin, stats.norm.ppf(0.95) * error)
        assert stats.norm.sf((threshold - loss) / error) == pytest.approx(0.8)


def test_intervals_of_shares_are_wilsons() -> None:
    k, n, z = 13, 50, stats.norm.ppf(0.975)
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    values = np.array([1.0] * k + [0.0] * (n - k))
    assert interval(values, np.ones(n)) == pytest.approx((centre - half, centre + half))


def test_intervals_of_means_are_the_bootstraps() -> None:
    values = np.random.default_rng(4).normal(5, 2, 400)
    low, high = interval(values, np.ones(400))
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
