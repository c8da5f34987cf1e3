"""Moments against float64 sums, whatever the width, the batches and their dtype; the factor against linear algebra."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.calibration.moments import DAMPING_LADDER, Moments, Statistics, gram_entries, panels
from compress.distributed import World
from compress.errors import RunError
from tests.passes import correlated, damped, draw, moments_of, papers_factor

BOTH = [Statistics.NORMS, Statistics.GRAM]


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("width", [1, 5, 127, 128, 129, 172, 352, 768, 1100])
@pytest.mark.parametrize("tokens", [1, 64])
def test_the_gram_matrix_is_the_sum_of_products_whatever_the_width(width, tokens):
    inputs = correlated(tokens, width, seed=width)
    moments = Moments(width, Statistics.GRAM)
    for part in inputs.split(20):
        moments.add(part)
    gram = moments.gram()
    x = inputs.double()
    torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-4, atol=float(x.square().max()) * 1e-5)
    assert torch.equal(gram, gram.T)
    assert torch.equal(gram.diagonal(), moments.squares)
    assert moments.tokens == tokens


@pytest.mark.parametrize("width", [1, 5, 352])
def test_norms_need_no_gram_matrix(width):
    inputs = correlated(77, width, seed=width)
    norms, gram = (moments_of(inputs, statistics) for statistics in BOTH)
    assert relative(norms.squares, inputs.double().square().sum(0)) < 1e-6
    assert relative(norms.norms, inputs.double().norm(dim=0)) < 1e-6
    torch.testing.assert_close(norms.squares, gram.squares, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"Statistics\.GRAM"):
        norms.gram()


def test_without_a_token_everything_is_zero():
    for statistics in BOTH:
        moments = Moments(6, statistics)
        moments.add(torch.zeros(0, 6))
        assert moments.tokens == 0
        assert torch.equal(moments.norms, torch.zeros(6))
        assert moments.is_finite()


@pytest.mark.parametrize("statistics", BOTH)
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 90), max_size=8), seed=st.integers(0, 1000))
def test_batches_in_any_cut_and_order_give_the_sums_of_the_whole(statistics, cuts, seed):
    inputs = correlated(90, 9, seed=3)
    edges = [0, *sorted(cuts), 90]
    parts = [inputs[a:b] for a, b in pairwise(edges)]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    moments = Moments(9, statistics)
    for index in order:
        moments.add(parts[index])
    assert moments.tokens == 90
    torch.testing.assert_close(moments.squares.double(), inputs.double().square().sum(0), rtol=1e-6, atol=0)
    if statistics is Statistics.GRAM:
        assert relative(moments.gram(), inputs.double().T @ inputs.double()) < 1e-6


@pytest.mark.parametrize("statistics", BOTH)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=20), st.randoms(use_true_random=False))
def test_whatever_process_adds_a_batch_and_when_the_sums_are_the_same_bits(statistics, owners, random):
    """Batches of very different size, dealt out anyhow to four, each of which adds its own in any order."""
    batches = [correlated(9, 150, seed=seed) * 10.0 ** (seed % 3) for seed in range(20)]
    parts = [Moments(150, statistics) for _ in range(4)]
    for index in random.sample(range(20), 20):
        parts[owners[index]].add(batches[index])
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    alone = Moments(150, statistics)
    for batch in batches:
        alone.add(batch)
    alone.reduce(World(torch.device("cpu")))  # of one process: only rounds
    assert torch.equal(total.squares, alone.squares)
    if statistics is Statistics.GRAM:
        assert torch.equal(total.gram(), alone.gram())
        assert torch.equal(total.sums, alone.sums)
        assert torch.equal(total.factor(0.01).upper, alone.factor(0.01).upper)


@pytest.mark.parametrize("width", [1, 128, 150, 1100])
def test_the_panels_cover_the_lower_triangle_and_are_counted(width):
    covered = torch.zeros(width, width, dtype=torch.int64)
    for start, stop in panels(width):
        covered[start:, start:stop] += 1
    assert bool((covered.tril() == torch.ones_like(covered).tril()).all())
    assert int(covered.sum()) == gram_entries(width)


@pytest.mark.parametrize("statistics", BOTH)
def test_merged_moments_are_those_of_all_tokens(statistics):
    inputs = correlated(90, 140, seed=4)
    first, second = moments_of(inputs[:31], statistics), moments_of(inputs[31:], statistics)
    untouched = second.squares.clone()
    first.merge(second)
    joint = moments_of(inputs, statistics)
    assert first.tokens == joint.tokens == 90
    torch.testing.assert_close(first.squares, joint.squares, rtol=1e-6, atol=0)
    if statistics is Statistics.GRAM:
        assert relative(first.gram(), joint.gram()) < 1e-6
    assert torch.equal(second.squares, untouched)
    first.add(inputs[:1])
    assert torch.equal(second.squares, untouched)


def test_norms_merge_with_a_gram_matrix_of_other_tokens():
    inputs = correlated(90, 12, seed=5)
    norms = moments_of(inputs[:31], Statistics.NORMS)
    norms.merge(moments_of(inputs[31:], Statistics.GRAM))
    assert norms.tokens == 90
    torch.testing.assert_close(norms.squares.double(), inputs.double().square().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("statistics", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(statistics, dtype):
    inputs = (draw(500, 6, seed=6) * 1000).to(dtype)  # squares overflow float16, sums drown in bfloat16
    moments = moments_of(inputs, statistics)
    assert moments.is_finite()
    assert moments.squares.dtype == torch.float32
    torch.testing.assert_close(moments.squares.double(), inputs.double().square().sum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("statistics", BOTH)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("column", [0, 6])
def test_nan_infinity_and_overflow_are_found(statistics, value, column):
    inputs = draw(20, 7, seed=7)
    moments = moments_of(inputs, statistics)
    assert moments.is_finite()
    inputs[11, column] = value
    moments.add(inputs)
    assert not moments.is_finite()
    moments.add(draw(20, 7, seed=8))
    assert not moments.is_finite()  # and stay found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_with_nan_has_no_factor(value):
    inputs = draw(20, 7, seed=9)
    inputs[3, 2] = value
    with pytest.raises(RunError):
        moments_of(inputs).factor(0.01)


def test_the_error_of_a_difference_is_what_the_layer_computes_wrongly():
    inputs, difference = correlated(90, 140, seed=10), draw(11, 140, seed=11)
    direct = float((difference.double() @ inputs.double().T).square().sum())
    assert moments_of(inputs).error(difference) == pytest.approx(direct, rel=1e-5)
    diagonal = float((difference.double().square() * inputs.double().square().sum(0)).sum())
    assert moments_of(inputs, Statistics.NORMS).error(difference) == pytest.approx(diagonal, rel=1e-5)
    assert moments_of(inputs).error(torch.zeros(11, 140)) == 0


@pytest.mark.parametrize("seed", range(8))
def test_the_error_of_a_difference_that_inputs_do_not_see_is_not_negative(seed: int) -> None:
    """In float32 their panels give a little of either sign."""
    inputs = draw(3, 300, seed=seed)
    seen = torch.linalg.qr(inputs.double().T).Q
    difference = draw(5, 300, seed=seed + 100).double()
    moments = moments_of(inputs)
    moments.reduce(World(torch.device("cpu")))
    assert 0 <= moments.error((difference - difference @ seen @ seen.T).float()) < 1e-2


def test_with_uncorrelated_inputs_both_errors_agree():
    inputs, difference = torch.diag(draw(12, seed=12).exp()), draw(5, 12, seed=13)
    errors = [moments_of(inputs, statistics).error(difference) for statistics in BOTH]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


# ---------------------------------------------------------------- the factor


@pytest.mark.parametrize("width", [1, 2, 31, 130])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_the_factor_is_the_papers_and_squares_to_the_inverse(width, damping):
    inputs = correlated(4 * width, width, seed=width)
    factor = moments_of(inputs).factor(damping)
    U, H = factor.upper.double(), damped(inputs, damping)
    assert factor.damping == damping
    assert torch.equal(U, U.triu())
    assert (U.diagonal() > 0).all()
    assert relative(U, papers_factor(H)) < 1e-4
    assert relative(U.T @ U, torch.linalg.inv(H)) < 1e-4
    eye = torch.eye(width, dtype=torch.float64)
    assert relative(U @ H @ U.T, eye) < 1e-3
    # The last columns' part is the factor of their own inverse: what remains when those before are fixed.
    tail = width // 2
    part = U[tail:, tail:]
    assert relative(part.T @ part, torch.linalg.inv(H[tail:, tail:])) < 1e-4


def test_a_dead_column_stands_alone_in_the_factor():
    inputs = correlated(90, 12, seed=14)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[0, 5, 11]] = True
    inputs[:, dead] = 0.0
    factor = moments_of(inputs).factor(0.01)
    assert torch.equal(factor.dead, dead)
    alone = torch.eye(12, dtype=torch.bool)
    assert not factor.upper[dead].masked_fill(alone[dead], 0.0).any()
    assert not factor.upper[:, dead].masked_fill(alone[:, dead], 0.0).any()
    assert relative(factor.upper, papers_factor(damped(inputs, 0.01))) < 1e-4


def test_inputs_that_are_all_zero_have_the_identity_for_a_factor():
    factor = moments_of(torch.zeros(4, 5)).factor(0.01)
    assert torch.equal(factor.upper, torch.eye(5))
    assert factor.dead.all()


def test_a_factor_is_kept_by_damping_until_tokens_come_in():
    inputs = correlated(90, 12, seed=15)
    moments = moments_of(inputs[:40])
    first, other = moments.factor(0.01), moments.factor(0.02)
    assert moments.factor(0.01) is first
    assert moments.factor(0.02) is other
    assert not torch.equal(first.upper, other.upper)
    moments.add(inputs[40:])
    assert not torch.equal(moments.factor(0.01).upper, first.upper)
    assert relative(moments.factor(0.01).upper, papers_factor(damped(inputs, 0.01))) < 1e-4
    moments.merge(moments_of(inputs))
    assert relative(moments.factor(0.01).upper, papers_factor(damped(inputs.repeat(2, 1), 0.01))) < 1e-4


@pytest.mark.parametrize("step", DAMPING_LADDER)
def test_the_ladder_is_climbed_as_far_as_needed(step):
    moments = Moments(2, Statistics.GRAM)
    moments._panels = [torch.tensor([[1.0, 0.0], [1.05, 1.0]])]  # no inputs have it: one eigenvalue is -0.05
    factor = moments.factor(0.08 / step)
    assert factor.damping == pytest.approx(0.08)
    H = torch.tensor([[1.08, 1.05], [1.05, 1.08]], dtype=torch.float64)
    assert relative(factor.upper, papers_factor(H)) < 1e-4
    assert moments.factor(0.08 / step) is factor


def test_beyond_the_ladder_there_is_no_factor():
    moments = Moments(2, Statistics.GRAM)
    moments._panels = [torch.tensor([[1.0, 0.0], [1.05, 1.0]])]
    with pytest.raises(RunError, match="not positive definite"):
        moments.factor(0.00049)
    moments.factor(0.00051)


def test_a_scale_on_the_inputs_only_scales_the_factor():
    inputs = correlated(90, 12, seed=16)
    plain = moments_of(inputs).factor(0.01)
    for scale in (2.0**-10, 2.0**12):  # λ follows the mean of the diagonal
        scaled = moments_of(inputs * scale).factor(0.01)
        assert relative(scaled.upper * scale, plain.upper) < 1e-6
