"""Passes after passes on one linear: masks only shrink, zeros stay exact, patterns hold, counts are exact."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from compress.errors import RunError
from compress.invariants import check_invariants
from compress.passes import LinearState, Magnitude, PruningPass, SparseGPT, Wanda
from tests.passes import correlated, draw, floor_of, moments_of, state_of

if TYPE_CHECKING:
    from torch import Tensor

ROWS, COLUMNS = 12, 32
VARIANTS: dict[str, PruningPass] = {
    "magnitude 0.3": Magnitude(sparsity=0.3),
    "magnitude 0.55 by row": Magnitude(sparsity=0.55, scope="row"),
    "magnitude 2:4": Magnitude(pattern="2:4"),
    "wanda 0.5": Wanda(sparsity=0.5),
    "wanda 0.4 by layer": Wanda(sparsity=0.4, scope="layer"),
    "wanda 1:4": Wanda(pattern="1:4"),
    "sparsegpt 0.5": SparseGPT(sparsity=0.5),
    "sparsegpt 0.6 by 8": SparseGPT(sparsity=0.6, mask_block=8, least_squares=True),
    "sparsegpt 4:8": SparseGPT(pattern="4:8"),
    "sparsegpt 2:4 exact": SparseGPT(pattern="2:4", least_squares=True),
}


def linear_of(*passes: PruningPass) -> SimpleNamespace:
    """What `check_invariants` reads of a linear of the lock."""
    return SimpleNamespace(
        name="model.layers.0.mlp.up_proj", out_features=ROWS, in_features=COLUMNS, passes=tuple(enumerate(passes))
    )


def shares(one: PruningPass, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """How many weights are pruned in each set within which weights compete for this pass, and how many should be."""
    if one.pattern:
        zeros = pruned.unflatten(1, (-1, one.pattern.group)).sum(-1)
        return zeros, torch.full_like(zeros, one.pattern.group - one.pattern.kept)
    assert one.sparsity is not None
    if isinstance(one, SparseGPT):
        width = min(one.mask_block, COLUMNS)
        zeros = torch.stack([part.sum() for part in pruned.split(width, dim=1)])
        ends = [floor_of(one.sparsity, ROWS * width * i) for i in range(COLUMNS // width + 1)]
        return zeros, torch.tensor(ends).diff()
    if one.scope == "row":  # type: ignore[attr-defined]
        return pruned.sum(1), torch.full((ROWS,), floor_of(one.sparsity, COLUMNS))
    return pruned.sum(), torch.tensor(floor_of(one.sparsity, pruned.numel()))


@pytest.mark.parametrize(("first", "second"), list(product(VARIANTS, VARIANTS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_every_pass_after_every_pass(first, second, dtype, sweeps):
    passes = VARIANTS[first], VARIANTS[second]
    weight = draw(ROWS, COLUMNS, seed=1).to(dtype).float()
    inputs = correlated(100, COLUMNS, seed=1)
    inputs[:, 7] = 0.0
    moments, state = moments_of(inputs), state_of(weight, dtype)
    pruned = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    for index, one in enumerate(passes):
        before, mask, earlier = state.effective().clone(), state.mask, pruned
        one.apply(state, moments)
        check_invariants(linear_of(*passes), index, state, mask)  # type: ignore[arg-type]
        pruned = ~state.mask

        assert not (earlier & ~pruned).any()
        assert (state.weight[pruned].view(torch.int32) == 0).all()  # +0 exactly
        assert torch.isfinite(state.weight).all()
        assert torch.equal(state.dense, weight)
        for done in passes[: index + 1]:
            if done.pattern:
                assert (
                    pruned.unflatten(1, (-1, done.pattern.group)).sum(-1) >= done.pattern.group - done.pattern.kept
                ).all()
        (zeros, share), (already, _) = shares(one, pruned), shares(one, earlier)
        assert torch.equal(zeros, torch.maximum(already, share))  # what was pruned counts, and nothing goes in excess
        if not isinstance(one, SparseGPT):
            assert torch.equal(state.weight[state.mask], before[state.mask])

        if sweeps == 2:  # the second pass begins from what the journal keeps of the first
            state.settle()
            assert torch.equal(~state.mask, pruned)
            again = LinearState(state.name, weight.clone(), weight.clone(), dtype)
            again.restore(state.tensors())
            assert torch.equal(again.weight, state.weight)
            assert torch.equal(again.mask, state.mask)
            state = again


@pytest.mark.parametrize("name", VARIANTS)
def test_pruning_twice_the_same_way_changes_no_mask(name):
    state, moments = state_of(draw(ROWS, COLUMNS, seed=2)), moments_of(correlated(100, COLUMNS, seed=2))
    VARIANTS[name].apply(state, moments)
    mask, weight = state.mask, state.weight.clone()
    VARIANTS[name].apply(state, moments)
    assert torch.equal(state.mask, mask)
    torch.testing.assert_close(state.weight, weight, rtol=1e-4, atol=1e-5)


def test_passes_that_share_moments_do_not_change_them():
    inputs = correlated(100, COLUMNS, seed=3)
    moments = moments_of(inputs)
    gram, upper = moments.gram().clone(), moments.factor(0.01).upper.clone()
    for one in VARIANTS.values():
        one.apply(state_of(draw(ROWS, COLUMNS, seed=3)), moments)
    assert torch.equal(moments.gram(), gram)
    assert torch.equal(moments.factor(0.01).upper, upper)
    assert moments.tokens == 100


# ---------------------------------------------------------------- what the pipeline checks after every pass


def broken(state: LinearState, mask_before: Tensor | None = None, *passes: PruningPass) -> str:
    with pytest.raises(RunError) as failure:
        check_invariants(linear_of(*(passes or (Wanda(sparsity=0.5),))), 0, state, mask_before)  # type: ignore[arg-type]
    assert failure.value.where is not None
    assert "model.layers.0.mlp.up_proj" in failure.value.where
    return failure.value.problem


def pruned_state(one: PruningPass) -> LinearState:
    state = state_of(draw(ROWS, COLUMNS, seed=4))
    one.apply(state, moments_of(correlated(100, COLUMNS, seed=4)))
    return state


def test_a_pass_that_brings_weights_back_is_caught():
    before = pruned_state(Wanda(sparsity=0.5))
    after = pruned_state(Wanda(sparsity=0.4))
    assert "came back" in broken(after, before.mask)
    after.mask = None
    assert "came back" in broken(after, before.mask)


def test_a_pass_that_leaves_a_weight_under_the_mask_is_caught():
    state = pruned_state(Wanda(sparsity=0.5))
    assert state.mask is not None
    state.weight[(~state.mask).nonzero()[0].tolist()[0]] += 1e-30
    assert "not zero" in broken(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_pass_that_leaves_nan_or_infinity_is_caught(value):
    state = pruned_state(Wanda(sparsity=0.5))
    assert state.mask is not None
    row, column = state.mask.nonzero()[0].tolist()
    state.weight[row, column] = value
    assert "NaN or infinity" in broken(state)


def test_a_pass_that_breaks_its_pattern_or_its_shape_is_caught():
    assert "2:4" in broken(pruned_state(Wanda(sparsity=0.5)), None, Wanda(pattern="2:4"))
    assert "2:4" in broken(state_of(draw(ROWS, COLUMNS, seed=5)), None, Wanda(pattern="2:4"))
    assert "shape" in broken(state_of(draw(COLUMNS, ROWS, seed=5)))


def test_a_pattern_promised_by_a_later_pass_is_not_asked_for_yet():
    state = pruned_state(Wanda(sparsity=0.5))
    check_invariants(linear_of(Wanda(sparsity=0.5), Wanda(pattern="2:4")), 0, state, None)  # type: ignore[arg-type]
