"""Magnitude pruning against a full sort: by row, by layer, by group and over the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.passes import LinearState, Magnitude
from compress.passes.base import SettingError
from tests.passes import (
    NOTHING,
    draw,
    first_lowest,
    floor_of,
    group_zeros,
    lowest_by_group,
    lowest_by_row,
    state_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "2:8", "1:2", "5:7"]
SPARSITIES = [0, 0.07, 0.29, 0.5, 0.57, 0.58, 0.999]


def pruned(weight: Tensor, one: Magnitude) -> Tensor:
    """Where the pass cleared the mask of a fresh layer."""
    state = state_of(weight)
    one.apply(state, NOTHING)
    assert state.mask is not None
    assert torch.equal(state.weight, torch.where(state.mask, weight, 0.0))
    return ~state.mask


def widths(pattern: str) -> tuple[int, int]:
    kept, group = map(int, pattern.split(":"))
    return kept, group


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", [(10, 10), (7, 13), (1, 100), (5, 1)])
def test_a_layer_loses_exactly_the_floor_of_its_sparsity_and_the_smallest_weights(shape, sparsity):
    weight = draw(*shape, seed=1)
    chosen = pruned(weight, Magnitude(sparsity=sparsity))
    assert int(chosen.sum()) == floor_of(sparsity, weight.numel())
    assert torch.equal(chosen.flatten(), first_lowest(weight.abs().flatten(), floor_of(sparsity, weight.numel())))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", [(10, 10), (7, 13), (1, 100)])
def test_with_scope_row_every_row_loses_the_same_number(shape, sparsity):
    weight = draw(*shape, seed=2) * torch.arange(1, shape[0] + 1).unsqueeze(1)  # rows of different size
    chosen = pruned(weight, Magnitude(sparsity=sparsity, scope="row"))
    assert chosen.sum(1).tolist() == [floor_of(sparsity, shape[1])] * shape[0]
    assert torch.equal(chosen, lowest_by_row(weight.abs(), floor_of(sparsity, shape[1])))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_prunes_the_smallest_of_every_group(pattern):
    kept, group = widths(pattern)
    weight = draw(6, 5 * group, seed=3)
    assert torch.equal(pruned(weight, Magnitude(pattern=pattern)), lowest_by_group(weight.abs(), kept, group))


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-42])
def test_in_a_constant_layer_the_first_weights_go(value):
    weight = torch.full((4, 16), value)
    weight[:, ::3] *= -1  # the sign does not break a tie
    layer = pruned(weight, Magnitude(sparsity=0.29))
    assert layer.flatten().nonzero().flatten().tolist() == list(range(18))
    row = pruned(weight, Magnitude(sparsity=0.29, scope="row"))
    assert torch.equal(row, (torch.arange(16) < 4).expand(4, 16))
    for pattern in ("2:4", "1:4", "3:4", "4:8", "2:8"):
        kept, group = widths(pattern)
        expected = torch.arange(16) % group < group - kept
        assert torch.equal(pruned(weight, Magnitude(pattern=pattern)), expected.expand(4, 16))


@pytest.mark.parametrize(
    "one", [Magnitude(sparsity=0.5), Magnitude(sparsity=0.5, scope="row"), Magnitude(pattern="2:4")]
)
def test_the_sign_of_a_weight_does_not_matter(one):
    weight = draw(8, 16, seed=4)
    assert torch.equal(pruned(weight, one), pruned(-weight, one))
    assert torch.equal(pruned(weight, one), pruned(weight.abs(), one))


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_permuted_rows_and_columns_give_the_permuted_mask(scope):
    weight, one = draw(9, 14, seed=5), Magnitude(sparsity=0.4, scope=scope)
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    columns = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pruned(weight[rows], one), pruned(weight, one)[rows])
    assert torch.equal(pruned(weight[:, columns], one), pruned(weight, one)[:, columns])


def test_a_pattern_follows_permuted_rows_and_permuted_whole_groups():
    weight, one = draw(9, 16, seed=6), Magnitude(pattern="1:4")
    rows = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([2, 0, 3, 1]).mul(4).unsqueeze(1).add(torch.tensor([3, 1, 0, 2])).flatten()
    assert torch.equal(pruned(weight[rows], one), pruned(weight, one)[rows])
    assert torch.equal(pruned(weight[:, columns], one), pruned(weight, one)[:, columns])


def test_a_positive_factor_on_the_whole_layer_changes_nothing():
    weight = draw(8, 12, seed=7)
    assert torch.equal(pruned(weight * 2**-9, Magnitude(sparsity=0.3)), pruned(weight, Magnitude(sparsity=0.3)))


def test_what_was_pruned_before_counts_first():
    weight = draw(6, 16, seed=8).abs() + 1
    before = torch.zeros(6, 16, dtype=torch.bool)
    before[:, 10] = before[2] = True  # 21 weights
    for one, expected in (
        (Magnitude(sparsity=0.5), 48),
        (Magnitude(sparsity=0.1), 21),
        (Magnitude(sparsity=0.5, scope="row"), 8 * 5 + 16),
        (Magnitude(pattern="2:4"), 8 * 5 + 16),
    ):
        state = state_of(weight)
        state.prune(before)
        one.apply(state, NOTHING)
        assert state.mask is not None
        assert not (state.mask & before).any()
        assert int((~state.mask).sum()) == expected


@pytest.mark.parametrize("count", [0, 1, 17, 60])
def test_count_prunes_exactly_so_many(count):
    weight = draw(6, 10, seed=9)
    chosen = pruned(weight, Magnitude(count=count))
    assert torch.equal(chosen.flatten(), first_lowest(weight.abs().flatten(), count))


def test_a_count_stands_for_itself():
    with pytest.raises(ValueError, match="sparsity and count exclude each other"):
        Magnitude(sparsity=0.5, count=3)
    with pytest.raises(ValueError, match="counts the weights of a layer"):
        Magnitude(count=3, scope="row")
    with pytest.raises(SettingError, match="6 × 10 has fewer than 61 weights"):
        Magnitude(count=61).check_shape(6, 10)
    assert Magnitude(sparsity=0.5).with_settings({"count": 3}) == Magnitude(count=3)


# ---------------------------------------------------------------- the whole model


def prune_globally(layers: list[LinearState], sparsity: float) -> None:
    """What the pipeline does: survey, then each layer with the settings that came out."""
    one = Magnitude(sparsity=sparsity, scope="global")
    assert one.surveys()

    def survey() -> Iterator[LinearState]:  # new objects each time, as when they are read from disk
        for layer in layers:
            yield LinearState(layer.name, layer.weight.clone(), layer.dense, layer.dtype, layer.mask)

    found = one.survey(survey)
    assert list(found) == [layer.name for layer in layers]
    for layer in layers:
        one.with_settings(found[layer.name]).apply(layer, NOTHING)


def model_of(*weights: Tensor) -> list[LinearState]:
    return [LinearState(f"layers.{i}", w.clone(), w.clone(), torch.float32) for i, w in enumerate(weights)]


def assert_like_a_full_sort(layers: list[LinearState], sparsity: float, before: list[Tensor] | None = None) -> None:
    """One sort of all |w| in model order; what was pruned before comes first of all."""
    scores = torch.cat([layer.dense.abs().double().flatten() for layer in layers])
    if before is not None:
        scores[torch.cat([mask.flatten() for mask in before])] = -1.0
    count = floor_of(sparsity, scores.numel())
    if before is not None:
        count = max(count, sum(int(mask.sum()) for mask in before))
    expected = first_lowest(scores, count)
    masks = [~layer.mask.flatten() for layer in layers if layer.mask is not None]
    assert int(torch.cat(masks).sum()) == count
    assert torch.equal(torch.cat(masks), expected)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_global_threshold_is_that_of_one_sort_of_the_model(sparsity):
    layers = model_of(draw(7, 9, seed=10), draw(4, 33, seed=11) * 3, draw(5, 5, seed=12) * 1e-3, draw(1, 1, seed=13))
    prune_globally(layers, sparsity)
    assert_like_a_full_sort(layers, sparsity)


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.83])
def test_global_ties_go_by_model_order_and_then_by_index(sparsity):
    layers = model_of(*(draw(6, 11, seed=20 + i).mul(2).round() for i in range(4)))  # a handful of values
    prune_globally(layers, sparsity)
    assert_like_a_full_sort(layers, sparsity)


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_in_a_constant_model_the_first_layers_go(sparsity):
    layers = model_of(*(torch.full((4, 5), -0.7) for _ in range(4)))
    prune_globally(layers, sparsity)
    assert [layer.sparsity for layer in layers] == [float(i < 4 * sparsity) for i in range(4)]


def test_a_global_threshold_separates_neighbouring_floats():
    one = torch.tensor(1.0).view(torch.int32)
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = (one + shuffled).view(torch.float32)  # consecutive float32, across no boundary a human would choose
    for sparsity in (0.1, 0.3333, 0.7775):
        layers = model_of(values[:100].view(10, 10), -values[100:].view(20, 15))
        prune_globally(layers, sparsity)
        assert_like_a_full_sort(layers, sparsity)


def test_a_global_threshold_holds_from_the_smallest_to_the_largest_float():
    extremes = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38, 1.0, -1.0, 65504.0, 3.4028235e38])
    weights = [extremes.repeat(6)[torch.randperm(60, generator=torch.Generator().manual_seed(s))] for s in range(3)]
    for sparsity in (0.05, 0.2, 0.31, 0.5, 0.9, 0.999):
        layers = model_of(*(w.view(6, 10) for w in weights))
        prune_globally(layers, sparsity)
        assert_like_a_full_sort(layers, sparsity)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=12), min_size=1, max_size=5),
    percent=st.integers(0, 99),
)
def test_any_global_sparsity_of_any_small_model_is_exact(layers, percent):
    states = model_of(*(torch.tensor([values], dtype=torch.float32) / 4 for values in layers))
    prune_globally(states, percent / 100)
    assert_like_a_full_sort(states, percent / 100)


def test_global_is_layer_when_there_is_one_layer():
    weight = draw(8, 9, seed=30).mul(3).round()
    (layer,) = model_of(weight)
    prune_globally([layer], 0.45)
    assert layer.mask is not None
    assert torch.equal(~layer.mask, pruned(weight, Magnitude(sparsity=0.45)))


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.6, 0.9])
def test_a_global_count_includes_what_was_pruned_before(sparsity):
    layers = model_of(draw(6, 8, seed=31), draw(5, 12, seed=32))
    for layer in layers:
        Magnitude(pattern="2:4").apply(layer, NOTHING)
    before = [~layer.mask for layer in layers if layer.mask is not None]
    prune_globally(layers, sparsity)
    assert_like_a_full_sort(layers, sparsity, before)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.6])
def test_weights_pruned_before_come_before_zeros_that_the_model_came_with(sparsity):
    weights = draw(6, 8, seed=33), draw(5, 12, seed=34)
    weights[0][:, :3] = 0.0
    layers = model_of(*weights)
    Magnitude(pattern="2:4").apply(layers[1], NOTHING)
    layers[0].prune(torch.zeros(6, 8, dtype=torch.bool))
    before = [~layer.mask for layer in layers if layer.mask is not None]
    prune_globally(layers, sparsity)
    assert_like_a_full_sort(layers, sparsity, before)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_group_loses_exactly_m_minus_n(pattern):
    kept, group = widths(pattern)
    state = state_of(draw(3, 4 * group, seed=40).mul(2).round())
    Magnitude(pattern=pattern).apply(state, NOTHING)
    assert (group_zeros(state, group) == group - kept).all()
