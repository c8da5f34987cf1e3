"""The state of a linear, and the selection and packing it rests on, against Python's sort, fractions and numpy."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from compress.checkpoint import lay_out, slots_of, write_shard
from compress.errors import RunError
from compress.passes import Moments, SparseGPT, Statistics
from compress.state import (
    LinearState,
    Pattern,
    all_finite,
    lowest,
    lowest_in_groups,
    lowest_of_all,
    masked,
    pack_bits,
    pruned_count,
    unpack_bits,
)
from tests.conftest import same_bits

if TYPE_CHECKING:
    from pathlib import Path

quick = settings(max_examples=150, deadline=None)
few_values = st.sampled_from([-1.0, 0.0, -0.0, 0.5, 0.5, 1.0, 2.0, float("inf")])  # many ties
patterns = st.one_of(st.integers(2, 9), st.integers(15, 19)).flatmap(
    lambda group: st.tuples(st.integers(1, group - 1), st.just(group))
)


def tables(values: st.SearchStrategy, rows: int = 5, columns: int = 17) -> st.SearchStrategy[list[list]]:
    return st.integers(1, columns).flatmap(
        lambda width: st.lists(st.lists(values, min_size=width, max_size=width), min_size=1, max_size=rows)
    )


def sorted_first(scores: list[float], count: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda index: (scores[index], index))
    return [index in order[:count] for index in range(len(scores))]


# ---------------------------------------------------------------- selection


@quick
@given(data=st.data(), table=tables(few_values), slice_size=st.integers(1, 60))
def test_lowest_takes_the_first_of_a_stable_sort(data, table, slice_size):
    scores = torch.tensor(table)
    count = data.draw(st.integers(0, scores.shape[1]))
    expected = [sorted_first(row, count) for row in table]
    assert lowest(scores, count).tolist() == expected
    assert lowest(scores.T.contiguous().T, count).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.state.SLICE", slice_size)  # rows are sorted in slices; where they end must not show
        assert lowest(scores, count).tolist() == expected


@quick
@given(data=st.data(), table=tables(few_values))
def test_lowest_of_all_takes_the_first_of_a_stable_sort(data, table):
    scores = torch.tensor(table)
    count = data.draw(st.integers(0, scores.numel()))
    expected = sorted_first(scores.flatten().tolist(), count)
    assert lowest_of_all(scores, count).shape == scores.shape
    assert lowest_of_all(scores, count).flatten().tolist() == expected
    assert lowest_of_all(scores.T.contiguous().T, count).flatten().tolist() == expected


@quick
@given(table=tables(st.floats(0, 1, width=32)), data=st.data())
def test_the_scores_stay_as_they_are_and_none_that_is_left_is_lower(table, data):
    scores = torch.tensor(table)
    count = data.draw(st.integers(1, scores.shape[1]))
    for chosen in (lowest(scores, count), lowest_of_all(scores, count * len(table))):
        assert torch.equal(scores, torch.tensor(table))
        assert int(chosen.sum()) == count * len(table)
    chosen = lowest(scores, count)
    assert (torch.where(chosen, 2, scores).amin(1) >= torch.where(chosen, scores, -1).amax(1)).all()


@quick
@given(data=st.data(), pattern=patterns, groups=st.integers(1, 4), rows=st.integers(1, 4))
def test_lowest_in_groups_takes_m_minus_n_of_every_group(data, pattern, groups, rows):
    kept, group = pattern
    width = group * groups
    table = data.draw(st.lists(st.lists(few_values, min_size=width, max_size=width), min_size=rows, max_size=rows))
    expected = [
        [bit for start in range(0, width, group) for bit in sorted_first(row[start : start + group], group - kept)]
        for row in table
    ]
    assert lowest_in_groups(torch.tensor(table), Pattern(kept, group)).tolist() == expected
    column_major = torch.tensor(table).T.contiguous().T
    assert lowest_in_groups(column_major, Pattern(kept, group)).tolist() == expected


@quick
@given(digits=st.integers(1, 12), data=st.data(), total=st.integers(0, 10**10))
def test_the_pruned_count_is_the_floor_for_the_decimal_that_was_written(digits, data, total):
    written = f"0.{data.draw(st.integers(0, 10**digits - 1)):0{digits}d}"
    assert pruned_count(float(written), total) == Fraction(written) * total // 1


@quick
@given(sparsity=st.floats(0, 1, exclude_max=True), total=st.integers(0, 10**8))
def test_the_pruned_count_lies_within_the_total_and_grows_with_it(sparsity, total):
    count = pruned_count(sparsity, total)
    assert 0 <= count <= total
    assert count < total or total == 0
    assert count <= pruned_count(sparsity, total + 1) <= count + 1


def test_the_pruned_count_is_not_that_of_binary_fractions():
    assert int(0.29 * 100) == 28
    assert pruned_count(0.29, 100) == 29
    assert pruned_count(0.57, 100) == 57
    assert pruned_count(1e-05, 10**6) == 10
    assert pruned_count(0, 50) == 0


# ---------------------------------------------------------------- patterns


@given(pattern=patterns)
def test_a_pattern_reads_as_it_is_written(pattern):
    assert Pattern.parse(str(Pattern(*pattern))) == pattern
    assert Pattern.parse(f" {pattern[0]} : {pattern[1]} ") == pattern


@pytest.mark.parametrize("text", ["", "2", "2:4:8", "4:2", "4:4", "0:4", "-1:4", "2/4", "a:b", "2.0:4", "1:0"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match=f'"{text}"'):
        Pattern.parse(text)


# ---------------------------------------------------------------- packing


@quick
@given(table=tables(st.booleans(), columns=40))
def test_packed_bits_are_numpys_little_endian_and_come_back(table):
    mask = torch.tensor(table)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), axis=1, bitorder="little"))
    assert torch.equal(unpack_bits(packed, mask.shape[1]), mask)
    column_major = mask.T.contiguous().T
    assert torch.equal(pack_bits(column_major), packed)


# ---------------------------------------------------------------- the state


def state_of(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> LinearState:
    return LinearState("h.0.proj", weight.clone(), weight.clone(), dtype)


def through_disk(tensors: dict[str, torch.Tensor], directory: Path) -> dict[str, torch.Tensor]:
    """Written as the journal writes, read by safetensors."""
    (shard,) = lay_out(slots_of(tensors), 1 << 62)
    write_shard(shard, directory, tensors)
    return load_file(directory / shard.file)


@quick
@given(first=tables(st.booleans(), 4, 6), data=st.data())
def test_pruned_weights_never_come_back_and_are_exactly_zero(first, data):
    pruned = torch.tensor(first)
    second = torch.tensor(data.draw(st.lists(st.booleans(), min_size=pruned.numel(), max_size=pruned.numel())))
    second = second.view_as(pruned)
    weight = -torch.arange(1.0, 1 + pruned.numel()).view_as(pruned)
    state = state_of(weight)
    assert state.mask is None
    assert state.sparsity == 0
    state.prune(pruned)
    assert torch.equal(state.mask, ~pruned)
    state.prune(second)
    assert torch.equal(state.mask, ~(pruned | second))
    assert (state.weight[~state.mask].view(torch.int32) == 0).all()  # −w · 0 would be −0
    assert torch.equal(state.weight[state.mask], weight[state.mask])
    assert torch.equal(state.dense, weight)
    assert state.sparsity == pytest.approx(float((pruned | second).double().mean()), abs=1e-12)


def test_the_effective_weight_is_zero_under_the_mask_even_over_nan_and_infinity():
    state = state_of(torch.tensor([[float("nan"), float("inf"), -0.0, 1.0]]))
    state.mask = torch.tensor([[False, False, False, True]])
    assert state.effective().view(torch.int32).tolist() == [[0, 0, 0, torch.tensor(1.0).view(torch.int32).item()]]


def test_a_weight_that_happens_to_be_zero_is_not_pruned():
    state = state_of(torch.zeros(2, 4))
    state.prune(torch.tensor([[True, False, False, False]] * 2))
    assert state.sparsity == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_settling_rounds_to_the_checkpoints_dtype_once(dtype):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 1e-3
    state = state_of(weight, dtype)
    state.prune(weight < -1e-3)
    state.settle()
    assert state.weight.dtype == torch.float32
    assert torch.equal(state.weight, torch.where(weight < -1e-3, 0.0, weight.to(dtype).float()))
    settled = state.weight.clone()
    state.settle()
    assert torch.equal(state.weight, settled)
    assert torch.equal(state.dense, weight)


def test_a_kept_weight_that_float16_rounds_to_zero_stays_kept():
    state = state_of(torch.tensor([[1e-9, -1e-9, 1.0, 2.0]]), torch.float16)
    state.prune(torch.tensor([[False, False, False, True]]))
    state.settle()
    assert state.weight.tolist() == [[0.0, 0.0, 1.0, 0.0]]
    assert state.mask.tolist() == [[True, True, True, False]]
    assert state.sparsity == 0.25
    again = state_of(torch.zeros(1, 4), torch.float16)
    again.restore(state.tensors())
    assert torch.equal(again.mask, state.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 11), (8, 16), (1, 1), (3, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_what_the_journal_keeps_comes_back_from_disk(tmp_path: Path, dtype, shape, masked):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    state = state_of(weight, dtype)
    if masked:
        state.prune(weight < 0.2)
    state.settle()
    kept = state.tensors()
    assert set(kept) == {"h.0.proj:weight"} | ({"h.0.proj:mask"} if masked else set())
    assert kept["h.0.proj:weight"].dtype == dtype
    again = LinearState("h.0.proj", torch.full(shape, 7.0), weight, dtype, torch.zeros(shape, dtype=torch.bool))
    again.restore(through_disk(kept, tmp_path))
    assert again.weight.dtype == torch.float32
    assert torch.equal(again.weight, state.weight)
    assert torch.equal(again.mask, state.mask) if masked else again.mask is None


def test_what_the_journal_keeps_does_not_depend_on_how_a_pass_lays_out_its_tensors(tmp_path: Path):
    moments = Moments(24, Statistics.GRAM)
    moments.add(torch.randn(60, 24, generator=torch.Generator().manual_seed(2)))
    state = state_of(torch.randn(17, 24, generator=torch.Generator().manual_seed(3)))
    SparseGPT(pattern="2:4").apply(state, moments)  # works on columns, so its tensors may lie column by column
    state.settle()
    again = state_of(torch.zeros(17, 24))
    again.restore(through_disk(state.tensors(), tmp_path))
    assert torch.equal(again.weight, state.weight)
    assert torch.equal(again.mask, state.mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masked_is_where_to_the_bit_whatever_is_pruned(dtype: torch.dtype) -> None:
    values = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:, 0], values[:, 1], values[:, 2], values[:, 3] = float("nan"), float("inf"), -float("inf"), -0.0
    mask = torch.rand(12, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    for some, kept in ((values, mask), (values.T, mask.T)):
        assert same_bits(masked(some, kept), torch.where(kept, some, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wrong", [[float("nan")], [float("inf")], [float("inf"), -float("inf")], []])
def test_finite_is_what_holds_neither_nan_nor_infinity(dtype: torch.dtype, wrong: list[float]) -> None:
    values = torch.full((300,), torch.finfo(dtype).max, dtype=dtype)  # their sum overflows
    values[7 : 7 + len(wrong)] = torch.tensor(wrong, dtype=dtype)
    assert all_finite(values) == (not wrong)
    assert all_finite(values.sign() if not wrong else values) == (not wrong)


def test_what_float16_does_not_hold_is_refused():
    weight = torch.tensor([[1.0, -65519.0], [2.0, 65520.0]])  # halfway to 2¹⁶ is the first that is rounded up
    for dtype in (torch.bfloat16, torch.float32):
        LinearState("q_proj", weight, weight, dtype).settle()
    state = LinearState("q_proj", weight[:1], weight[:1], torch.float16)
    state.settle()
    assert state.tensors()["q_proj:weight"].abs().max() == 65504
    for refused in (LinearState.settle, LinearState.tensors):
        with pytest.raises(RunError, match="a value of 65,520 is more than float16 holds") as raised:
            refused(LinearState("q_proj", weight, weight, torch.float16))
        assert raised.value.where == "q_proj"
