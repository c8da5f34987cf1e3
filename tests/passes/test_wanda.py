"""Wanda against brute force and a full sort; the identities (a) to (h) of METHODS section 1."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import pytest
import torch

from compress.passes import LinearState, Magnitude, Statistics, Wanda
from tests.passes import (
    NOTHING,
    correlated,
    draw,
    first_lowest,
    floor_of,
    group_zeros,
    lowest_by_group,
    lowest_by_row,
    moments_of,
    state_of,
)

if TYPE_CHECKING:
    from torch import Tensor

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "2:8", "1:2", "5:7"]


def wanda(weight: Tensor, inputs: Tensor, statistics: Statistics = Statistics.NORMS, **settings: object) -> LinearState:
    state = state_of(weight)
    Wanda(**settings).apply(state, moments_of(inputs, statistics))  # type: ignore[arg-type]
    assert state.mask is not None
    return state


def scores_of(weight: Tensor, inputs: Tensor) -> Tensor:
    """``|W_ij| ‖X_j‖`` in float64."""
    return weight.double().abs() * inputs.double().norm(dim=0)


def widths(pattern: str) -> tuple[int, int]:
    kept, group = map(int, pattern.split(":"))
    return kept, group


@pytest.mark.parametrize("sparsity", [0, 0.07, 0.29, 0.5, 0.58, 0.999])
@pytest.mark.parametrize("shape", [(6, 100), (7, 13), (3, 1), (1, 24)])
def test_every_row_loses_exactly_the_floor_of_the_sparsity_and_its_lowest_scores(shape, sparsity):
    weight, inputs = draw(*shape, seed=1), correlated(50, shape[1], seed=1)
    state = wanda(weight, inputs, sparsity=sparsity)
    count = floor_of(sparsity, shape[1])
    assert (~state.mask).sum(1).tolist() == [count] * shape[0]
    assert torch.equal(~state.mask, lowest_by_row(scores_of(weight, inputs), count))


@pytest.mark.parametrize("sparsity", [0.07, 0.29, 0.5])
def test_with_scope_layer_the_layer_loses_the_floor(sparsity):
    weight, inputs = draw(7, 13, seed=2), correlated(50, 13, seed=2)
    state = wanda(weight, inputs, sparsity=sparsity, scope="layer")
    expected = first_lowest(scores_of(weight, inputs).flatten(), floor_of(sparsity, 91))
    assert torch.equal(~state.mask.flatten(), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_prunes_the_lowest_scores_of_every_group(pattern):
    kept, group = widths(pattern)
    weight, inputs = draw(6, 5 * group, seed=3), correlated(90, 5 * group, seed=3)
    state = wanda(weight, inputs, pattern=pattern)
    assert (group_zeros(state, group) == group - kept).all()
    assert torch.equal(~state.mask, lowest_by_group(scores_of(weight, inputs), kept, group))


def test_equal_scores_go_by_index():
    weight, inputs = torch.full((4, 16), -3.0), torch.ones(5, 16)
    assert torch.equal(~wanda(weight, inputs, sparsity=0.29).mask, (torch.arange(16) < 4).expand(4, 16))
    layer = wanda(weight, inputs, sparsity=0.29, scope="layer")
    assert torch.equal(~layer.mask.flatten(), torch.arange(64) < 18)
    for pattern in ("2:4", "1:4", "3:4", "4:8", "2:8"):
        kept, group = widths(pattern)
        expected = (torch.arange(16) % group < group - kept).expand(4, 16)
        assert torch.equal(~wanda(weight, inputs, pattern=pattern).mask, expected)


@pytest.mark.parametrize(("width", "count"), [(5, 2), (8, 4), (10, 7), (12, 6)])
def test_with_uncorrelated_inputs_no_mask_of_a_row_costs_less(width, count):
    weight = draw(4, width, seed=width)
    scales = draw(width, seed=width + 50).exp()
    inputs = torch.diag(scales)  # one token per column: H is diagonal
    state = wanda(weight, inputs, sparsity=count / width)
    costs = weight.double().square() * scales.double().square()
    masks = torch.zeros(0, width, dtype=torch.float64)
    for chosen in combinations(range(width), count):
        mask = torch.zeros(1, width, dtype=torch.float64)
        mask[0, list(chosen)] = 1.0
        masks = torch.cat([masks, mask])
    best = (costs @ masks.T).min(dim=1)
    ours = (weight - state.weight).double().matmul(inputs.double().T).square().sum(1)
    torch.testing.assert_close(ours, best.values, rtol=1e-6, atol=0)
    assert torch.equal(~state.mask, masks[best.indices].bool())


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.3, "scope": "layer"}, {"pattern": "2:4"}])
def test_scaling_weights_up_and_inputs_down_changes_no_mask(settings):
    weight, inputs = draw(12, 32, seed=4), correlated(80, 32, seed=4)
    plain = wanda(weight, inputs, **settings)
    powers = 2.0 ** draw(32, seed=5).mul(3).round()  # exact in floating point
    assert torch.equal(wanda(weight * powers, inputs / powers, **settings).mask, plain.mask)
    factors = draw(32, seed=6).exp()  # rounded, but no score of this seed is that near another
    assert torch.equal(wanda(weight * factors, inputs / factors, **settings).mask, plain.mask)


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"pattern": "2:4"}])
def test_scaling_columns_changes_the_mask_of_magnitude(settings):
    weight, powers = draw(12, 32, seed=4), 2.0 ** draw(32, seed=5).mul(3).round()
    plain, scaled = state_of(weight), state_of(weight * powers)
    Magnitude(**settings).apply(plain, NOTHING)
    Magnitude(**settings).apply(scaled, NOTHING)
    assert not torch.equal(plain.mask, scaled.mask)


@pytest.mark.parametrize("settings", [{"sparsity": 0.4}, {"sparsity": 0.4, "scope": "layer"}])
def test_permuted_rows_and_columns_give_the_permuted_result(settings):
    weight, inputs = draw(9, 14, seed=7), correlated(40, 14, seed=7)
    plain = wanda(weight, inputs, **settings)
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    columns = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    assert torch.equal(wanda(weight[rows], inputs, **settings).weight, plain.weight[rows])
    assert torch.equal(wanda(weight[:, columns], inputs[:, columns], **settings).weight, plain.weight[:, columns])


def test_a_pattern_follows_permuted_rows_and_permuted_whole_groups():
    weight, inputs = draw(9, 16, seed=8), correlated(40, 16, seed=8)
    plain = wanda(weight, inputs, pattern="1:4")
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([2, 0, 3, 1]).mul(4).unsqueeze(1).add(torch.tensor([3, 1, 0, 2])).flatten()
    assert torch.equal(wanda(weight[rows], inputs, pattern="1:4").weight, plain.weight[rows])
    permuted = wanda(weight[:, columns], inputs[:, columns], pattern="1:4")
    assert torch.equal(permuted.weight, plain.weight[:, columns])


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "4:8"}])
@pytest.mark.parametrize("batch", [1, 7, 64, 200])
def test_inputs_in_batches_give_the_mask_of_all_inputs_at_once(settings, batch):
    weight, inputs = draw(10, 24, seed=9), correlated(200, 24, seed=9)
    streamed = moments_of(inputs[:0], Statistics.NORMS)
    for part in inputs.split(batch):
        streamed.add(part)
    torch.testing.assert_close(streamed.norms.double(), inputs.double().norm(dim=0), rtol=1e-6, atol=0)
    state = state_of(weight)
    Wanda(**settings).apply(state, streamed)
    assert torch.equal(state.weight, wanda(weight, inputs, **settings).weight)


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_norms_out_of_a_gram_matrix_give_the_same_mask(settings):
    weight, inputs = draw(10, 24, seed=10), correlated(200, 24, seed=10)
    gram = wanda(weight, inputs, Statistics.GRAM, **settings)
    assert torch.equal(gram.mask, wanda(weight, inputs, **settings).mask)


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.3, "scope": "layer"}, {"pattern": "2:4"}])
def test_survivors_keep_every_bit(settings):
    weight, inputs = draw(10, 24, seed=11), correlated(60, 24, seed=11)
    state = wanda(weight, inputs, **settings)
    assert torch.equal(state.weight[state.mask].view(torch.int32), weight[state.mask].view(torch.int32))
    assert (state.weight[~state.mask].view(torch.int32) == 0).all()  # +0, not −0
    assert torch.equal(state.dense, weight)


@pytest.mark.parametrize("seed", range(5))
def test_rows_retain_more_score_than_4_of_8_and_that_more_than_2_of_4(seed):
    weight, inputs = draw(16, 64, seed=seed), correlated(90, 64, seed=seed)
    scores = scores_of(weight, inputs)
    choices = ({"sparsity": 0.5}, {"pattern": "4:8"}, {"pattern": "2:4"})
    rows, wide, narrow = ((scores * wanda(weight, inputs, **one).mask).sum(1) for one in choices)
    assert (rows >= wide).all()
    assert (wide >= narrow).all()


def test_a_column_without_input_goes_first():
    weight, inputs = draw(6, 16, seed=12), correlated(40, 16, seed=12)
    weight[:, [3, 9]] = 1e6
    inputs[:, [3, 9]] = 0.0
    for settings in ({"sparsity": 0.125}, {"sparsity": 0.125, "scope": "layer"}, {"pattern": "3:4"}):
        state = state_of(weight)
        note = Wanda(**settings).apply(state, moments_of(inputs, Statistics.NORMS))
        assert not state.mask[:, [3, 9]].any()
        assert note["dead_columns"] == 2


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "2:8"])
def test_a_group_without_any_input_still_loses_exactly_its_share(pattern):
    kept, group = widths(pattern)
    weight, inputs = draw(6, 3 * group, seed=13), correlated(40, 3 * group, seed=13)
    inputs[:, group : 2 * group] = 0.0
    state = wanda(weight, inputs, pattern=pattern)
    assert (group_zeros(state, group) == group - kept).all()
    assert torch.equal(state.mask[0, group : 2 * group], torch.arange(group) >= group - kept)


def test_a_layer_without_any_input_still_loses_exactly_its_share():
    state = wanda(draw(6, 16, seed=14), torch.zeros(9, 16), sparsity=0.3)
    assert (~state.mask).sum(1).tolist() == [4] * 6


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.4, "scope": "row"}, {"sparsity": 0.4, "scope": "layer"}, {"pattern": "2:4"}]
)
def test_with_white_inputs_it_is_magnitude(settings):
    weight = draw(10, 24, seed=15)
    magnitude = state_of(weight)
    Magnitude(**settings).apply(magnitude, NOTHING)
    assert torch.equal(wanda(weight, torch.eye(24).repeat(3, 1) * 0.5, **settings).weight, magnitude.weight)


def test_what_was_pruned_before_counts_first():
    weight, inputs = draw(6, 16, seed=16), correlated(40, 16, seed=16)
    before = torch.zeros(6, 16, dtype=torch.bool)
    before[:, weight.abs().mean(0).argmax()] = before[2, :12] = True
    state = state_of(weight)
    state.prune(before)
    Wanda(sparsity=0.5).apply(state, moments_of(inputs, Statistics.NORMS))
    assert not (state.mask & before).any()
    zeros = (~state.mask).sum(1).tolist()
    assert zeros == [8, 8, int(before[2].sum()), 8, 8, 8]
