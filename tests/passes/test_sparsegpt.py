"""SparseGPT against textbook optimal brain surgery, brute force and exact least squares (METHODS section 2)."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import pytest
import torch

from compress.errors import RunError
from compress.passes import LinearState, Magnitude, Moments, SparseGPT, Statistics, Wanda
from tests.passes import (
    NOTHING,
    ExactMoments,
    correlated,
    damped,
    draw,
    first_lowest,
    floor_of,
    group_zeros,
    least_squares,
    lowest_by_group,
    moments_of,
    papers_factor,
    row_errors,
    state_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from compress.passes import Note

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "2:8", "1:2"]


def sparsegpt(weight: Tensor, moments: Moments, **settings: object) -> tuple[LinearState, Note]:
    state = state_of(weight)
    note = SparseGPT(**settings).apply(state, moments)  # type: ignore[arg-type]
    assert state.mask is not None
    assert (state.weight[~state.mask] == 0).all()
    assert torch.equal(state.dense, weight)
    return state, note


def widths(pattern: str) -> tuple[int, int]:
    kept, group = map(int, pattern.split(":"))
    return kept, group


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def textbook(weight: Tensor, H: Tensor, *, pattern: str | None = None, sparsity: float = 0, block: int = 1) -> Tensor:
    """The algorithm of the paper without Cholesky: the inverse of the free columns' H, updated as each is fixed.

    A weight's saliency is ``w² / [H_F⁻¹]_jj`` with F the columns from j on; removing it changes the columns of F by
    ``−w / [H_F⁻¹]_jj · [H_F⁻¹]_j,:`` (equations 3 of arXiv 2301.00774 and of arXiv 2208.11580).
    """

    def without_first(inverse: Tensor) -> Tensor:
        return (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]

    W, inverse = weight.double().clone(), torch.linalg.inv(H.double())
    rows, columns = W.shape
    pruned = torch.zeros(rows, columns, dtype=torch.bool)
    group = widths(pattern)[1] if pattern else block
    for column in range(columns):
        if column % group == 0:
            stop = min(column + group, columns)
            denominators, ahead = [], inverse
            for _ in range(column, stop):
                denominators.append(ahead[0, 0])
                ahead = without_first(ahead)
            saliency = W[:, column:stop].square() / torch.stack(denominators)
            if pattern:
                pruned[:, column:stop] = lowest_by_group(saliency, *widths(pattern))
            else:
                count = floor_of(sparsity, rows * stop) - floor_of(sparsity, rows * column)
                pruned[:, column:stop] = first_lowest(saliency.flatten(), count).view_as(saliency)
        removed = pruned[:, column]
        W[removed, column:] -= torch.outer(W[removed, column] / inverse[0, 0], inverse[0])
        W[removed, column] = 0.0
        inverse = without_first(inverse)
    return W


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("sparsity", [0, 0.07, 0.29, 0.5, 0.58, 0.77, 0.999])
@pytest.mark.parametrize("shape", [(10, 10), (7, 13), (1, 40), (5, 1)])
def test_a_layer_loses_exactly_the_floor_of_its_sparsity(shape, sparsity):
    weight, moments = draw(*shape, seed=1), moments_of(correlated(90, shape[1], seed=1))
    for mask_block in (1, 4, 5, 128):
        state, _ = sparsegpt(weight, moments, sparsity=sparsity, mask_block=mask_block)
        assert int((~state.mask).sum()) == floor_of(sparsity, weight.numel())
        so_far = 0
        for part in state.mask.split(mask_block, dim=1):  # and so does the layer up to the end of each block
            so_far += part.shape[1]
            assert int((~state.mask[:, :so_far]).sum()) == floor_of(sparsity, shape[0] * so_far)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_group_loses_exactly_m_minus_n(pattern):
    kept, group = widths(pattern)
    weight, inputs = draw(6, 5 * group, seed=2), correlated(90, 5 * group, seed=2)
    for block_size in (1, 6, 128):
        state, _ = sparsegpt(weight, moments_of(inputs), pattern=pattern, block_size=block_size)
        assert (group_zeros(state, group) == group - kept).all()


def test_sparsity_zero_changes_no_bit():
    weight = draw(6, 20, seed=3)
    for exact in (False, True):
        state, note = sparsegpt(weight, moments_of(correlated(50, 20, seed=3)), sparsity=0, least_squares=exact)
        assert torch.equal(state.weight, weight)
        assert note["damped_loss"] == 0


def test_in_a_constant_layer_with_white_inputs_the_first_weights_go():
    weight, moments = torch.full((4, 16), -3.0), moments_of(torch.eye(16))
    for pattern in ("2:4", "1:4", "3:4", "4:8", "2:8"):
        kept, group = widths(pattern)
        state, _ = sparsegpt(weight, moments, pattern=pattern)
        assert torch.equal(~state.mask, (torch.arange(16) % group < group - kept).expand(4, 16))
    state, _ = sparsegpt(weight, moments, sparsity=0.29)
    assert torch.equal(~state.mask.T.flatten(), torch.arange(64) < 18)  # by index of (column, row)


# ---------------------------------------------------------------- the textbook


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_a_pattern_is_textbook_surgery(pattern, seed):
    width = 3 * widths(pattern)[1] if pattern != "1:2" else 20
    weight, inputs = draw(7, width, seed=seed), correlated(4 * width, width, seed=seed)
    slow = textbook(weight, damped(inputs, 0.01), pattern=pattern)
    state, _ = sparsegpt(weight, moments_of(inputs), pattern=pattern)
    assert torch.equal(state.mask, slow != 0)
    assert relative(state.weight, slow) < 1e-4
    exact, _ = sparsegpt(weight.double(), ExactMoments(inputs), pattern=pattern)
    torch.testing.assert_close(exact.weight, slow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask_block", [1, 4, 7, 24, 128])
@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.8])
def test_a_sparsity_is_textbook_surgery_block_by_block(mask_block, sparsity):
    weight, inputs = draw(7, 24, seed=mask_block), correlated(99, 24, seed=mask_block)
    slow = textbook(weight, damped(inputs, 0.05), sparsity=sparsity, block=mask_block)
    settings = {"sparsity": sparsity, "mask_block": mask_block, "damping": 0.05}
    state, _ = sparsegpt(weight, moments_of(inputs), **settings)
    assert torch.equal(state.mask, slow != 0)
    assert relative(state.weight, slow) < 1e-4
    exact, _ = sparsegpt(weight.double(), ExactMoments(inputs), **settings)
    torch.testing.assert_close(exact.weight, slow, rtol=1e-9, atol=1e-9)


VARIANTS = [
    {"pattern": "2:4"},
    {"pattern": "1:4"},
    {"pattern": "4:8"},
    {"sparsity": 0.5},
    {"sparsity": 0.5, "mask_block": 16},
    {"sparsity": 0.29, "mask_block": 7},
    {"sparsity": 0.8, "mask_block": 48},
]


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_the_reported_loss_is_the_damped_error(settings, damping):
    weight, inputs = draw(24, 48, seed=4), correlated(200, 48, seed=4)
    H = damped(inputs, damping)
    state, note = sparsegpt(weight, moments_of(inputs), damping=damping, **settings)
    assert note["damping"] == damping
    assert note["damped_loss"] == pytest.approx(float(row_errors(weight - state.weight, H).sum()), rel=1e-4)
    # Without damping the error is smaller: the loss is an upper bound.
    assert moments_of(inputs).error(weight - state.weight) <= note["damped_loss"]
    exact, note = sparsegpt(weight.double(), ExactMoments(inputs), damping=damping, **settings)
    assert note["damped_loss"] == pytest.approx(float(row_errors(weight - exact.weight, H).sum()), rel=1e-10)


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_block_size_has_no_influence(settings):
    weight, inputs = draw(24, 48, seed=5), correlated(200, 48, seed=5)
    first, note = sparsegpt(weight, moments_of(inputs), block_size=48, **settings)
    for block_size in (1, 3, 5, 8, 16, 31, 128):  # smaller, larger, coprime to the mask's blocks
        other, other_note = sparsegpt(weight, moments_of(inputs), block_size=block_size, **settings)
        assert torch.equal(other.mask, first.mask)
        assert relative(other.weight, first.weight.double()) < 1e-5
        assert other_note["damped_loss"] == pytest.approx(note["damped_loss"], rel=1e-5)


def test_permuted_rows_give_the_permuted_result():
    weight, moments = draw(11, 24, seed=6), moments_of(correlated(99, 24, seed=6))
    rows = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    for settings in VARIANTS:
        plain, _ = sparsegpt(weight, moments, **settings)
        permuted, _ = sparsegpt(weight[rows], moments, **settings)
        assert torch.equal(permuted.mask, plain.mask[rows])
        assert relative(permuted.weight, plain.weight[rows].double()) < 1e-6


def test_inputs_in_batches_give_the_result_of_all_inputs_at_once():
    weight, inputs = draw(11, 24, seed=7), correlated(200, 24, seed=7)
    streamed = moments_of(inputs[:0])
    for part in inputs.split(13):
        streamed.add(part)
    for settings in VARIANTS:
        whole, _ = sparsegpt(weight, moments_of(inputs), **settings)
        parts, _ = sparsegpt(weight, streamed, **settings)
        assert torch.equal(parts.mask, whole.mask)
        assert relative(parts.weight, whole.weight.double()) < 1e-4


# ---------------------------------------------------------------- what is and is not a theorem


@pytest.mark.parametrize("seed", range(4))
def test_no_mask_of_a_row_is_better_than_the_best_of_all_masks(seed):
    width, count = 10, 5
    weight, inputs = draw(3, width, seed=seed), correlated(60, width, seed=seed)
    H = damped(inputs, 0.01)
    best = torch.full((3,), torch.inf, dtype=torch.float64)
    for kept in combinations(range(width), width - count):
        mask = torch.zeros(3, width, dtype=torch.bool)
        mask[:, list(kept)] = True
        best = torch.minimum(best, row_errors(weight - least_squares(weight, mask, H), H))
    for exact in (False, True):
        state, _ = sparsegpt(weight, moments_of(inputs), pattern="5:10", least_squares=exact)
        errors = row_errors(weight - state.weight, H)
        assert (errors >= best * (1 - 1e-5)).all()
        assert errors.sum() <= 6 * best.sum()  # and not far off: METHODS finds a median ratio of 2.4


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_least_squares_on_the_mask_is_exact_and_no_row_gets_worse(settings, seed):
    weight, inputs = draw(24, 48, seed=seed), correlated(200, 48, seed=seed)
    H = damped(inputs, 0.01)
    plain, _ = sparsegpt(weight, moments_of(inputs), **settings)
    solved, _ = sparsegpt(weight, moments_of(inputs), least_squares=True, **settings)
    assert torch.equal(plain.mask, solved.mask)
    optimum = least_squares(weight, plain.mask, H)
    best, ours = row_errors(weight - optimum, H), row_errors(weight - solved.weight, H)
    assert (best <= row_errors(weight - plain.weight, H) * (1 + 1e-9)).all()
    assert (ours <= row_errors(weight - plain.weight, H) * (1 + 1e-6)).all()
    assert (ours <= best * (1 + 1e-5)).all()
    assert relative(solved.weight, optimum) < 1e-3
    exact, _ = sparsegpt(weight.double(), ExactMoments(inputs), least_squares=True, **settings)
    assert relative(exact.weight, least_squares(weight, exact.mask, H)) < 1e-5


@pytest.mark.parametrize(("tokens", "damping"), [(10, 0.01), (10, 1e-4), (60, 1e-5), (400, 1e-3)])
def test_least_squares_never_makes_a_layer_worse_however_few_the_tokens(tokens, damping):
    weight, inputs = draw(16, 64, seed=8), correlated(tokens, 64, seed=8)
    H = damped(inputs, damping)
    for settings in ({"sparsity": 0.6}, {"pattern": "2:4"}):
        plain, note = sparsegpt(weight, moments_of(inputs), damping=damping, **settings)
        solved, _ = sparsegpt(weight, moments_of(inputs), damping=damping, least_squares=True, **settings)
        assert note["damping"] == damping
        before, after = row_errors(weight - plain.weight, H), row_errors(weight - solved.weight, H)
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < 0.9 * before.sum()


def test_least_squares_aims_at_the_dense_weight_also_when_an_earlier_pass_pruned():
    weight, inputs = draw(16, 32, seed=9), correlated(150, 32, seed=9)
    H, states = damped(inputs, 0.01), []
    for exact in (False, True):
        state = state_of(weight)
        Magnitude(sparsity=0.4).apply(state, NOTHING)
        SparseGPT(pattern="2:4", least_squares=exact).apply(state, moments_of(inputs))
        states.append(state)
    plain, solved = states
    assert torch.equal(plain.mask, solved.mask)
    optimum = row_errors(weight - least_squares(weight, plain.mask, H), H)
    assert (row_errors(weight - solved.weight, H) <= optimum * (1 + 1e-5)).all()
    assert (optimum <= row_errors(weight - plain.weight, H)).all()


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"}])
def test_on_correlated_inputs_sparsegpt_beats_wanda_and_wanda_magnitude(settings):
    for seed in range(12):  # layer totals on seeded data: no theorem, but so in every one of many problems
        weight, inputs = draw(48, 64, seed=seed), correlated(256, 64, seed=seed)
        moments, errors = moments_of(inputs), []
        for method in (SparseGPT, Wanda, Magnitude):
            state = state_of(weight)
            method(**settings).apply(state, moments)
            errors.append(float(((weight - state.weight).double() @ inputs.double().T).square().sum()))
        assert errors[0] < errors[1] < errors[2], (seed, errors)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_white_inputs_a_pattern_is_that_of_magnitude_and_nothing_is_updated(pattern):
    weight = draw(10, 5 * widths(pattern)[1], seed=10)
    magnitude = state_of(weight)
    Magnitude(pattern=pattern).apply(magnitude, NOTHING)
    for exact in (False, True):
        state, _ = sparsegpt(weight, moments_of(torch.eye(weight.shape[1]) * 3), pattern=pattern, least_squares=exact)
        assert torch.equal(state.weight, magnitude.weight)


def test_with_white_inputs_a_sparsity_is_met_by_magnitude_within_each_block():
    weight, moments = draw(10, 24, seed=11), moments_of(torch.eye(24) * 3)
    magnitude = state_of(weight)
    Magnitude(sparsity=0.4).apply(magnitude, NOTHING)
    whole, _ = sparsegpt(weight, moments, sparsity=0.4)
    assert torch.equal(whole.weight, magnitude.weight)
    blocks, _ = sparsegpt(weight, moments, sparsity=0.4, mask_block=8)
    for part, kept in zip(weight.split(8, dim=1), blocks.weight.split(8, dim=1), strict=True):
        magnitude = state_of(part)
        Magnitude(sparsity=0.4).apply(magnitude, NOTHING)
        assert torch.equal(kept, magnitude.weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_uncorrelated_inputs_and_no_damping_a_pattern_is_that_of_wanda(pattern):
    weight = draw(10, 5 * widths(pattern)[1], seed=12).double()
    inputs = torch.diag(draw(weight.shape[1], seed=13).exp())
    wanda = state_of(weight)
    Wanda(pattern=pattern).apply(wanda, moments_of(inputs, Statistics.NORMS))
    state, _ = sparsegpt(weight, ExactMoments(inputs, undamped=True), pattern=pattern)
    assert torch.equal(state.weight, wanda.weight)


@pytest.mark.parametrize("settings", VARIANTS)
def test_without_damping_scaling_weights_up_and_inputs_down_changes_nothing(settings):
    weight, inputs = draw(12, 48, seed=14).double(), correlated(200, 48, seed=14).double()
    factors = draw(48, seed=15, dtype=torch.float64).exp()
    for exact in (False, True):
        options = {**settings, "least_squares": exact}
        plain, note = sparsegpt(weight, ExactMoments(inputs, undamped=True), **options)
        scaled, other = sparsegpt(weight * factors, ExactMoments(inputs / factors, undamped=True), **options)
        assert torch.equal(scaled.mask, plain.mask)
        assert relative(scaled.weight / factors, plain.weight) < (1e-5 if exact else 1e-9)
        assert other["damped_loss"] == pytest.approx(note["damped_loss"], rel=1e-9)


def test_with_damping_it_does():
    weight, inputs = draw(12, 48, seed=14).double(), correlated(200, 48, seed=14).double()
    factors = draw(48, seed=15, dtype=torch.float64).exp()
    plain, _ = sparsegpt(weight, ExactMoments(inputs), pattern="2:4")
    scaled, _ = sparsegpt(weight * factors, ExactMoments(inputs / factors), pattern="2:4")
    assert relative(scaled.weight / factors, plain.weight) > 1e-3


# ---------------------------------------------------------------- dead columns


def dead_problem(dead: list[int], seed: int = 20) -> tuple[Tensor, Tensor]:
    weight, inputs = draw(8, 32, seed=seed), correlated(120, 32, seed=seed)
    weight[:, dead] *= 100
    inputs[:, dead] = 0.0
    return weight, inputs


def test_dead_columns_go_first():
    dead = [1, 2, 9, 17, 18, 30]
    weight, inputs = dead_problem(dead)
    for settings in ({"sparsity": 0.5}, {"sparsity": 0.375, "mask_block": 8}, {"pattern": "2:4"}):
        for exact in (False, True):
            state, note = sparsegpt(weight, moments_of(inputs), least_squares=exact, **settings)
            assert note["dead_columns"] == 6
            assert not state.mask[:, dead].any()
            assert torch.isfinite(state.weight).all()


def test_dead_columns_that_the_count_spares_keep_their_weight_and_so_does_all_else():
    dead = [0, 5, 6, 7, 20, 21, 22, 31]
    weight, inputs = dead_problem(dead)
    for exact in (False, True):
        state, _ = sparsegpt(weight, moments_of(inputs), sparsity=0.125, least_squares=exact)
        assert state.mask[:, [c for c in range(32) if c not in dead]].all()
        assert int((~state.mask).sum()) == 32  # half of the dead
        assert torch.equal(state.weight, torch.where(state.mask, weight, 0.0))


def test_a_dead_column_neither_sends_nor_receives_updates():
    dead = [4, 5, 6, 13]  # three in one group of four: one of them is spared by 2:4
    weight, inputs = dead_problem(dead)
    for exact in (False, True):
        state, _ = sparsegpt(weight, moments_of(inputs), pattern="2:4", least_squares=exact)
        assert torch.equal(state.mask[:, 4:8].sum(1), torch.full((8,), 2))
        spared = state.mask[:, dead]
        assert spared.any()
        assert torch.equal(state.weight[:, dead][spared], weight[:, dead][spared])
        other = weight.clone()
        other[:, dead] = draw(8, 4, seed=99)
        same, _ = sparsegpt(other, moments_of(inputs), pattern="2:4", least_squares=exact)
        alive = [c for c in range(32) if c not in dead]
        assert torch.equal(same.weight[:, alive], state.weight[:, alive])


def test_alive_columns_are_pruned_as_if_the_dead_were_not_there():
    dead = list(range(8, 16))
    weight, inputs = dead_problem(dead)
    alive = [c for c in range(32) if c not in dead]
    state, _ = sparsegpt(weight, moments_of(inputs), pattern="2:4", damping=0.01)
    # λ is relative to the mean over all columns, and a quarter of them adds nothing to it
    alone, _ = sparsegpt(weight[:, alive], moments_of(inputs[:, alive]), pattern="2:4", damping=0.01 * 24 / 32)
    assert torch.equal(alone.mask, state.mask[:, alive])
    assert relative(state.weight[:, alive], alone.weight.double()) < 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_without_any_input_loses_its_share_and_keeps_the_other_weights(exact):
    weight = draw(6, 16, seed=21)
    for settings in ({"sparsity": 0.29}, {"sparsity": 0.5, "mask_block": 5}, {"pattern": "1:4"}):
        state, note = sparsegpt(weight, moments_of(torch.zeros(9, 16)), least_squares=exact, **settings)
        assert note["dead_columns"] == 16
        assert int((~state.mask).sum()) == floor_of(settings.get("sparsity", 0.75), 96)
        assert torch.equal(state.weight, torch.where(state.mask, weight, 0.0))


# ---------------------------------------------------------------- an earlier mask, and layers of odd shapes


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("exact", [False, True])
def test_an_earlier_mask_is_kept_and_its_zeros_stay(settings, exact):
    weight, inputs = draw(12, 48, seed=22), correlated(200, 48, seed=22)
    before = draw(12, 48, seed=23) < -0.8
    before[3] = True  # a whole row, and whole groups
    state = state_of(weight)
    state.prune(before)
    note = SparseGPT(**settings, least_squares=exact).apply(state, moments_of(inputs))
    assert not (state.mask & before).any()
    assert (state.weight[before] == 0).all()
    assert (state.weight[~state.mask] == 0).all()
    assert (state.mask & ~before).any()
    if not exact:
        start = torch.where(before, 0.0, weight)
        exact_loss = float(row_errors(start - state.weight, damped(inputs, 0.01)).sum())
        assert note["damped_loss"] == pytest.approx(exact_loss, rel=1e-4)


@pytest.mark.parametrize("mask_block", [5, 16, 128])
def test_with_an_earlier_mask_each_block_is_filled_up_to_its_share(mask_block):
    weight, moments = draw(12, 48, seed=24), moments_of(correlated(200, 48, seed=24))
    state = state_of(weight)
    for sparsity in (0.2, 0.35, 0.5, 0.9):
        SparseGPT(sparsity=sparsity, mask_block=mask_block).apply(state, moments)
        assert int((~state.mask).sum()) == floor_of(sparsity, weight.numel())


@pytest.mark.parametrize("shape", [(1, 16), (1, 1), (9, 1), (3, 16)])
def test_the_dense_weight_is_never_changed(shape):
    dense = draw(*shape, seed=25)
    state = LinearState("score", dense, dense, torch.float32)  # one tensor, as the pipeline begins
    SparseGPT(sparsity=0.5).apply(state, moments_of(correlated(40, shape[1], seed=25)))
    assert torch.equal(state.dense, draw(*shape, seed=25))


# ---------------------------------------------------------------- damping


def by_hand(gram: list[list[float]]) -> Moments:
    """Moments of a Gram matrix that no inputs have: what rounding can leave of a nearly singular one."""
    moments = Moments(len(gram), Statistics.GRAM)
    moments._panels = [torch.tensor(gram)]
    return moments


@pytest.mark.parametrize(("damping", "used"), [(0.1, 0.1), (0.01, 0.1), (0.001, 0.1), (0.006, 0.06)])
def test_damping_climbs_until_the_matrix_is_positive_definite(damping, used):
    gram = [[1.0, 1.05], [1.05, 1.0]]  # the smaller eigenvalue is -0.05
    weight = torch.tensor([[1.0, 3.0], [4.0, -2.0]])
    state, note = sparsegpt(weight, by_hand(gram), pattern="1:2", damping=damping)
    assert note["damping"] == pytest.approx(used)
    H = torch.tensor(gram, dtype=torch.float64) + used * torch.eye(2, dtype=torch.float64)
    assert relative(state.weight, textbook(weight, H, pattern="1:2")) < 1e-4
    assert note["damped_loss"] == pytest.approx(float(row_errors(weight - state.weight, H).sum()), rel=1e-4)
    solved, _ = sparsegpt(weight, by_hand(gram), pattern="1:2", damping=damping, least_squares=True)
    assert relative(solved.weight, least_squares(weight, solved.mask, H)) < 1e-4  # with the damping that worked


def test_at_the_top_of_the_ladder_the_run_fails_and_says_what_to_do():
    state = state_of(torch.ones(2, 2))
    with pytest.raises(RunError, match=r"not positive definite, even with damping 0\.04") as failure:
        SparseGPT(pattern="1:2", damping=0.0004).apply(state, by_hand([[1.0, 1.05], [1.05, 1.0]]))
    assert "damping" in str(failure.value.fix)
    assert state.mask is None
    assert torch.equal(state.weight, torch.ones(2, 2))


def test_a_singular_matrix_needs_no_more_than_its_damping():
    inputs = correlated(5, 32, seed=26)  # rank 5 of 32
    for damping in (0.01, 1e-3):
        factor = moments_of(inputs).factor(damping)
        assert factor.damping == damping
        H = damped(inputs, damping)
        assert relative(factor.upper, papers_factor(H)) < 1e-2
        assert relative(factor.upper.double().T @ factor.upper.double(), torch.linalg.inv(H)) < 1e-2
