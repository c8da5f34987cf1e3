"""Scales and zero-points against formulas worked by hand, fractions, and a search by brute force in float64."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from compress.grid import GridSpec
from compress.passes.grid_search import SHRINK, fit, fit_groups, grid_of
from tests.passes import draw

BITS = [2, 3, 4, 8]
SPECS = [GridSpec(bits, -1, symmetric) for bits, symmetric in product(BITS, (True, False))]
CLIPS = ["minmax", "mse"]


def named(spec: GridSpec) -> str:
    return f"{spec.bits}-{'sym' if spec.symmetric else 'asym'}"


each_spec = pytest.mark.parametrize("spec", SPECS, ids=named)
each_clip = pytest.mark.parametrize("clip", CLIPS)


def error(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """``Σ d (w − ŵ)²`` of each row in float64, ŵ the nearest of all values of its grid."""
    codes = torch.arange(2**bits, dtype=torch.float64)
    values = scale.double().unsqueeze(-1) * (codes - zero.double().unsqueeze(-1))  # (rows, codes)
    distances = (weight.double().unsqueeze(-1) - values.unsqueeze(1)).abs().amin(2)  # (rows, columns)
    return (distances.square() * (1.0 if importance is None else importance.double())).sum(1)


def by_hand(weights: list[float], bits: int, symmetric: bool) -> tuple[Fraction, int]:
    """The formulas of min/max in exact arithmetic; halves of a zero-point to even."""
    low, high = min(0, *map(Fraction, weights)), max(0, *map(Fraction, weights))
    if low == high:
        return Fraction(1), 2 ** (bits - 1) if symmetric else 0
    if symmetric:
        return 2 * max(-low, high) / (2**bits - 1), 2 ** (bits - 1)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


# ---------------------------------------------------------------- min/max


@pytest.mark.parametrize(
    ("weights", "bits", "symmetric", "scale", "zero"),
    [
        ([-1.0, 0.5, 2.0], 2, False, 1.0, 1),
        ([-1.0, 0.5, 2.0], 2, True, 4 / 3, 2),
        ([1.0, 2.0, 3.0], 2, False, 1.0, 0),  # 0 is in the range although no weight is below it
        ([-3.0, -1.0, -2.0], 2, False, 1.0, 3),
        ([-3.0, -1.0, -2.0], 2, True, 2.0, 2),
        ([-2.0, 5.0, 0.0], 3, False, 1.0, 2),
        ([-8.0, 7.0, 1.0], 4, False, 1.0, 8),
        ([-7.5, 7.5, 1.0], 4, True, 1.0, 8),
        ([-128.0, 127.0, 1.0], 8, False, 1.0, 128),
        ([0.0, 0.0, 0.0], 4, False, 1.0, 0),
        ([0.0, 0.0, 0.0], 4, True, 1.0, 8),
    ],
)
def test_min_max_by_hand(weights: list[float], bits: int, symmetric: bool, scale: float, zero: int) -> None:
    assert by_hand(weights, bits, symmetric) == (pytest.approx(scale), zero)
    found = fit(torch.tensor([weights]), GridSpec(bits, -1, symmetric), torch.float32)
    assert float(found[0]) == pytest.approx(scale, rel=1e-7)
    assert float(found[1]) == zero


@each_spec
def test_min_max_is_the_formula_in_fractions(spec: GridSpec) -> None:
    weight = draw(40, 9, seed=1).mul(512).round().div(512)  # differences are exact
    weight[0], weight[1], weight[2] = weight[0].abs(), -weight[1].abs(), 0.0
    scale, zero = fit(weight, spec, torch.float32)
    for row, s, z in zip(weight.tolist(), scale.tolist(), zero.tolist(), strict=True):
        expected, expected_zero = by_hand(row, spec.bits, spec.symmetric)
        assert abs(Fraction(s) - expected) <= expected / 2**23
        low = min(0, *map(Fraction, row))
        if spec.symmetric or abs(abs(-low / expected % 1) - Fraction(1, 2)) > 1e-4:  # where float32 cannot tip it
            assert z == expected_zero


@each_spec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_hold_values_of_the_dtype_in_which_they_are_stored(spec: GridSpec, dtype: torch.dtype) -> None:
    weight = draw(30, 16, seed=2)
    for clip in CLIPS:
        exact, _ = fit(weight, spec, torch.float32, clip=clip)
        for spec_dtype, checkpoint in ((None, dtype), (dtype, torch.float32)):
            scale, zero = fit(weight, spec._replace(scale_dtype=spec_dtype), checkpoint, clip=clip)
            assert torch.equal(scale, scale.to(dtype).float())
            grid = grid_of(torch.zeros(30, 16), scale.unsqueeze(1), zero.unsqueeze(1), spec, dtype)
            assert grid.scale.dtype == dtype
            assert torch.equal(grid.scale.float().squeeze(1), scale)
            assert torch.equal(grid.zero.float().squeeze(1), zero)
        if clip == "minmax":
            assert torch.equal(scale, exact.to(dtype).float())


@each_spec
@each_clip
def test_zero_is_always_in_the_range(spec: GridSpec, clip: str) -> None:
    weight = draw(60, 12, seed=3)
    weight[:20] = weight[:20].abs() + 5  # far from 0 on one side
    weight[20:40] = -weight[20:40].abs() - 5
    scale, zero = fit(weight, spec, torch.float16, clip=clip)  # type: ignore[arg-type]
    assert (scale > 0).all()
    assert torch.equal(zero, zero.round())
    assert ((zero >= 0) & (zero <= 2**spec.bits - 1)).all()
    assert (zero == spec.middle).all() or not spec.symmetric
    if not spec.symmetric:
        assert (zero[:20] == 0).all()
        assert (zero[20:40] == 2**spec.bits - 1).all()


@each_spec
@each_clip
@pytest.mark.parametrize("importance", [None, torch.zeros(8), torch.ones(8)], ids=["none", "zeros", "ones"])
def test_a_group_without_weights_has_the_scale_one(spec: GridSpec, clip: str, importance: Tensor | None) -> None:
    weight = torch.zeros(3, 8)
    weight[1, 2] = -0.0
    scale, zero = fit(weight, spec, torch.bfloat16, clip=clip, importance=importance)  # type: ignore[arg-type]
    assert torch.equal(scale, torch.ones(3))
    codes = spec.code(weight, scale.unsqueeze(1), zero.unsqueeze(1))
    assert torch.equal(codes, zero.unsqueeze(1).expand(3, 8))


@each_spec
@each_clip
@pytest.mark.parametrize("size", [1e-6, 1e-7, 1e-9, 1e-30])
def test_weights_whose_scale_float16_cannot_hold_take_the_smallest_scale(
    spec: GridSpec, clip: str, size: float
) -> None:
    weight = draw(4, 16, seed=4).clamp(-2, 2) * size
    weight[0] = -weight[0].abs()  # its zero-point is the largest code, whatever the scale was rounded to
    scale, zero = fit(weight, spec, torch.float16, clip=clip)  # type: ignore[arg-type]
    smallest = 2.0**-24
    assert (scale >= smallest).all()
    assert torch.equal(scale, scale.half().float())
    if 4 * size / (2**spec.bits - 1) < smallest / 2:
        assert (scale == smallest).all()
    grid = grid_of(
        spec.code(weight, scale.unsqueeze(1), zero.unsqueeze(1)),
        scale.unsqueeze(1),
        zero.unsqueeze(1),
        spec,
        torch.float16,
    )
    assert int(grid.codes.max()) <= spec.largest
    assert int(grid.zero.max()) <= spec.largest
    assert torch.isfinite(grid.dequantize(torch.float16)).all()
    # No worse than to drop them all.
    assert float((grid.dequantize(torch.float16) - weight).norm()) <= float(weight.norm()) * (1 + 1e-6)


# ---------------------------------------------------------------- the clipped range


def weights_of(kind: str) -> Tensor:
    weight = draw(24, 32, seed=5)
    if kind == "outliers":
        weight[:, 3] *= 8
    if kind == "positive":
        weight = weight.abs()
    if kind == "sparse":
        weight[draw(24, 32, seed=6) > 0] = 0.0
    return weight


each_kind = pytest.mark.parametrize("kind", ["normal", "outliers", "positive", "sparse"])


def importances() -> list[Tensor | None]:
    return [None, draw(32, seed=7).exp(), draw(24, 32, seed=8).exp()]


@each_spec
@each_kind
def test_the_clipped_range_is_never_worse_than_min_max(spec: GridSpec, kind: str) -> None:
    weight = weights_of(kind)
    for dtype, importance in product((torch.float32, torch.float16, torch.bfloat16), importances()):
        plain = error(weight, *fit(weight, spec, dtype), spec.bits, importance)
        found = error(weight, *fit(weight, spec, dtype, clip="mse", importance=importance), spec.bits, importance)
        assert (found <= plain * (1 + 1e-5) + 1e-9).all()
        if spec.bits < 8 and kind == "outliers":
            assert found.sum() < 0.95 * plain.sum()  # what the search is for


@each_spec
@each_kind
def test_the_clipped_range_is_the_best_of_all_candidates(spec: GridSpec, kind: str) -> None:
    weight = weights_of(kind)
    for importance in importances():
        scale, zero = fit(weight, spec, torch.float32, clip="mse", importance=importance)
        best = torch.full((24,), torch.inf, dtype=torch.float64)
        tried = []
        low, high = weight.double().amin(1).clamp_max(0), weight.double().amax(1).clamp_min(0)
        for factor in SHRINK:
            s = (2 * torch.maximum(-low, high) if spec.symmetric else high - low) * factor / (2**spec.bits - 1)
            z = torch.full_like(s, 2 ** (spec.bits - 1)) if spec.symmetric else (-low * factor / s).round()
            best = torch.minimum(best, error(weight, s, z, spec.bits, importance))
            tried.append(s)
        assert (error(weight, scale, zero, spec.bits, importance) <= best * (1 + 1e-4) + 1e-9).all()
        nearest = (torch.stack(tried) - scale.double()).abs().amin(0)  # and no range that is no candidate
        assert (nearest <= 1e-6 * scale).all()


def test_the_candidates_begin_with_min_max_and_shrink_to_the_best_ranges_of_normal_weights() -> None:
    assert SHRINK[0] == 1.0
    assert all(0 < later < earlier for earlier, later in pairwise(SHRINK))
    weight = draw(16, 4096, seed=9)
    for bits in (2, 3, 4):
        scale, _ = fit(weight, GridSpec(bits), torch.float32, clip="mse")
        share = scale * (2**bits - 1) / (2 * weight.abs().amax(1))
        assert (share > SHRINK[-1] + 0.01).all()  # the best one is inside, not at the end of the candidates
        assert (share < 1).all()


@each_spec
def test_where_nothing_matters_the_range_is_min_max(spec: GridSpec) -> None:
    """Inputs that calibration never saw: all ranges are as good, and the first is the widest."""
    weight = draw(10, 16, seed=18)
    found = fit(weight, spec, torch.float32, clip="mse", importance=torch.zeros(16))
    assert all(torch.equal(one, other) for one, other in zip(found, fit(weight, spec, torch.float32), strict=True))


# ---------------------------------------------------------------- rows and groups


@pytest.mark.parametrize("spec", SPECS[2:4], ids=named)
@each_clip
def test_rows_do_not_see_each_other_nor_where_slices_end(
    spec: GridSpec, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(7, 20, seed=10)
    for importance in (None, draw(20, seed=11).exp(), draw(7, 20, seed=12).exp()):
        together = fit(weight, spec, torch.float32, clip=clip, importance=importance)  # type: ignore[arg-type]
        for row in range(7):
            own = importance[row : row + 1] if importance is not None and importance.ndim == 2 else importance
            alone = fit(weight[row : row + 1], spec, torch.float32, clip=clip, importance=own)  # type: ignore[arg-type]
            assert [float(one) for one in alone] == [float(one[row]) for one in together]
        with monkeypatch.context() as patch:
            patch.setattr("compress.passes.grid_search.SLICE", 61)  # three rows at a time
            sliced = fit(weight, spec, torch.float32, clip=clip, importance=importance)  # type: ignore[arg-type]
        assert all(torch.equal(one, other) for one, other in zip(sliced, together, strict=True))


@each_clip
@pytest.mark.parametrize("group", [-1, 1, 5, 20])
def test_groups_are_fitted_one_by_one(clip: str, group: int) -> None:
    weight, importance = draw(6, 20, seed=13), draw(20, seed=14).exp()
    spec = GridSpec(3, group, False)
    for d in (None, importance):
        scale, zero = fit_groups(weight, spec, torch.float32, clip=clip, importance=d)  # type: ignore[arg-type]
        width = 20 if group == -1 else group
        assert scale.shape == zero.shape == (6, 20 // width)
        for number, start in enumerate(range(0, 20, width)):
            span = slice(start, start + width)
            part = None if d is None else d[span]
            s, z = fit(weight[:, span], spec, torch.float32, clip=clip, importance=part)  # type: ignore[arg-type]
            assert torch.equal(scale[:, number], s)
            assert torch.equal(zero[:, number], z)


@each_spec
@each_clip
def test_a_group_twice_as_large_has_twice_the_scale(spec: GridSpec, clip: str) -> None:
    weight = draw(20, 16, seed=15)
    scale, zero = fit(weight, spec, torch.float32, clip=clip)  # type: ignore[arg-type]
    for factor in (0.25, 2.0, 1024.0):
        larger = fit(factor * weight, spec, torch.float32, clip=clip)  # type: ignore[arg-type]
        assert torch.equal(larger[0], factor * scale)
        assert torch.equal(larger[1], zero)


@each_spec
def test_what_goes_in_is_not_changed(spec: GridSpec) -> None:
    weight, importance = draw(6, 20, seed=16), draw(20, seed=17).exp()
    before = weight.clone(), importance.clone()
    for clip in CLIPS:
        fit(weight, spec, torch.float16, clip=clip, importance=importance)  # type: ignore[arg-type]
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])
