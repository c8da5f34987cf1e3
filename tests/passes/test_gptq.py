"""GPTQ against a textbook loop, Babai's nearest plane and brute force, all in float64 (METHODS section 3)."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from compress.calibration.moments import Factor
from compress.invariants import check_invariants
from compress.passes import GPTQ, RTN, LinearState, Magnitude, Note, SparseGPT, Wanda
from tests.passes import (
    NOTHING,
    ExactMoments,
    correlated,
    damped,
    draw,
    lowest_by_group,
    moments_of,
    papers_factor,
    row_errors,
    state_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from compress.passes import Moments

SHRUNK = [1 - 0.02 * step for step in range(36)]  # the ranges that clip = "mse" tries


class Exact(ExactMoments):
    """In float64; with the largest diagonal entries of H first where a pass asks for it."""

    @property
    def squares(self) -> Tensor:
        return self.inputs.square().sum(0)

    def factor(self, damping: float, *, by_activation: bool = False) -> Factor:
        if not by_activation:
            return super().factor(damping)
        order = torch.argsort(self.squares, descending=True, stable=True)
        H = damped(self.inputs, 0.0 if self.undamped else damping)[order][:, order]
        return Factor(papers_factor(H), damping, torch.zeros(len(order), dtype=torch.bool), order)


def gptq(
    weight: Tensor, moments: Moments, *, mask: Tensor | None = None, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[LinearState, Note]:
    """Apply the pass, and check what holds of all its results."""
    state = state_of(weight, dtype)
    if mask is not None:
        state.prune(~mask)
    one, before = GPTQ(**settings), state.mask
    note = one.apply(state, moments)
    linear = SimpleNamespace(
        name=state.name, out_features=weight.shape[0], in_features=weight.shape[1], passes=((0, one),)
    )
    check_invariants(linear, 0, state, before)  # type: ignore[arg-type]
    assert torch.equal(state.dense, weight)
    assert state.mask is None if mask is None else torch.equal(state.mask, mask)
    if mask is not None:
        assert (state.weight[~mask].view(torch.int32) == 0).all()  # +0 exactly
    return state, note


def spread(state: LinearState) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of every weight, (out, in) float64."""
    assert state.grid is not None
    width = state.in_features // state.grid.scale.shape[1]
    return tuple(one.double().repeat_interleave(width, 1) for one in (state.grid.scale, state.grid.zero))  # type: ignore[return-value]


def ranges(weight: Tensor, bits: int, symmetric: bool, clip: str, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each row (rows, columns), float64 holding values of float32."""
    largest = 2**bits - 1
    low, high = weight.amin(1).clamp_max(0), weight.amax(1).clamp_min(0)
    best: list[Tensor] = []
    for factor in SHRUNK if clip == "mse" else [1.0]:
        width = 2 * torch.maximum(-low, high) if symmetric else high - low
        scale = (factor * width / largest).float().double()
        scale[width == 0] = 1.0
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-factor * low / scale).round()
        codes = (weight / scale.unsqueeze(1)).round().add(zero.unsqueeze(1)).clamp(0, largest)
        loss = ((codes - zero.unsqueeze(1)) * scale.unsqueeze(1) - weight).square().mul(importance).sum(1)
        if not best:
            best = [loss, scale, zero]
        better = loss < best[0]
        best = [torch.where(better, new, old) for new, old in zip((loss, scale, zero), best, strict=True)]
    return best[1], best[2]


def without_first(inverse: Tensor) -> Tensor:
    """The inverse of H without its first row and column, from the inverse of H."""
    return (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]


def textbook(
    weight: Tensor,
    H: Tensor,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    clip: str = "minmax",
    mask: Tensor | None = None,
    pattern: tuple[int, int] | None = None,
    order: list[int] | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and weights of optimal brain quantization with columns in a fixed order, by explicit inverses.

    The error of a column changes those that are free by ``−(w − q) / [H_F⁻¹]_jj · [H_F⁻¹]_j,:`` with F the columns from
    it on. A column's importance to its group's range is ``1 / [H_F⁻¹]_jj``. With `order`, ranges are found beforehand,
    with the `importance` given. With `pattern` the mask is chosen as SparseGPT does, on the way.
    """
    rows, columns = weight.shape
    width = columns if group_size == -1 else group_size
    W, places = weight.double().clone(), order or list(range(columns))
    pruned = torch.zeros(rows, columns, dtype=torch.bool) if mask is None else ~mask
    W[pruned] = 0.0
    scale, zero = torch.zeros(2, rows, columns, dtype=torch.float64)
    if order is not None:
        assert importance is not None
        for start in range(0, columns, width):
            span = slice(start, start + width)
            s, z = ranges(W[:, span], bits, symmetric, clip, importance.double()[span])
            scale[:, span], zero[:, span] = s.unsqueeze(1), z.unsqueeze(1)
    free = torch.ones(columns, dtype=torch.float64)  # [H_F⁻¹]_jj of the columns to come

    def choose(start: int, span: int) -> Tensor:
        """What SparseGPT would prune of a group now, at its place in the layer."""
        assert pattern is not None
        chosen = torch.zeros_like(pruned)
        saliency = W[:, start : start + span].square() / free[start : start + span]
        saliency[pruned[:, start : start + span]] = -1
        chosen[:, start : start + span] = lowest_by_group(saliency, *pattern)
        return chosen

    inverse, codes = torch.linalg.inv(H.double()[places][:, places]), torch.zeros(rows, columns, dtype=torch.long)
    for place, column in enumerate(places):
        diagonals, ahead = [], inverse
        for _ in range(place, columns):
            diagonals.append(ahead[0, 0])
            ahead = without_first(ahead)
        free[places[place:]] = torch.stack(diagonals)
        if pattern and column % pattern[1] == 0:
            pruned |= choose(column, pattern[1])
        if order is None and column % width == 0:
            ahead_pruned = pruned.clone()
            for start in range(column, column + width, pattern[1] if pattern else width):
                ahead_pruned |= choose(start, pattern[1]) if pattern else False
            live = W[:, column : column + width].masked_fill(ahead_pruned[:, column : column + width], 0.0)
            s, z = ranges(live, bits, symmetric, clip, 1 / free[column : column + width])
            scale[:, column : column + width], zero[:, column : column + width] = s.unsqueeze(1), z.unsqueeze(1)
        s, z = scale[:, column], zero[:, column]
        code = ((W[:, column] / s).round() + z).clamp(0, 2**bits - 1)
        code = torch.where(pruned[:, column], z, code)
        final = s * (code - z)
        codes[:, column] = code.long()
        W[:, places[place:]] -= torch.outer((W[:, column] - final) / inverse[0, 0], inverse[0])
        W[:, column] = final
        inverse = without_first(inverse)
    return codes, W


SETTINGS: list[dict[str, Any]] = [
    {"bits": 4, "group_size": -1, "symmetric": True, "clip": "minmax"},
    {"bits": 4, "group_size": 12, "symmetric": True, "clip": "mse"},
    {"bits": 3, "group_size": 12, "symmetric": False, "clip": "minmax"},
    {"bits": 3, "group_size": -1, "symmetric": False, "clip": "mse"},
    {"bits": 2, "group_size": 6, "symmetric": True, "clip": "mse"},
    {"bits": 8, "group_size": 12, "symmetric": False, "clip": "mse"},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: "-".join(map(str, one.values())))
masked = pytest.mark.parametrize("masked", [False, True])
both_orders = pytest.mark.parametrize("order", ["natural", "activation"])


def problem(seed: int, rows: int = 7, columns: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs, and a mask of about 60 %."""
    return (
        draw(rows, columns, seed=seed),
        correlated(5 * columns, columns, seed=seed),
        draw(rows, columns, seed=seed + 50) > -0.25,
    )


# ---------------------------------------------------------------- the textbook


@each_setting
@masked
@both_orders
def test_it_is_the_textbook_loop(settings: dict[str, Any], masked: bool, order: str) -> None:
    for seed in range(3):
        weight, inputs, mask = problem(seed)
        state, _ = gptq(weight.double(), Exact(inputs), mask=mask if masked else None, order=order, **settings)
        squares = inputs.double().square().sum(0)
        codes, slow = textbook(
            weight,
            damped(inputs, 0.01),
            mask=mask if masked else None,
            order=squares.argsort(descending=True).tolist() if order == "activation" else None,
            importance=damped(inputs, 0.01).diagonal(),
            **settings,
        )
        assert state.grid is not None
        assert torch.equal(state.grid.codes.long(), codes)
        torch.testing.assert_close(state.weight.double(), slow, rtol=1e-6, atol=1e-6)


@masked
@both_orders
def test_in_float32_it_is_as_good_as_in_float64(masked: bool, order: str) -> None:
    """A code on the edge may fall to the other side, and change those after it; the error is the same."""
    for settings in SETTINGS:
        weight, inputs, mask = problem(4, 16, 48)
        kept, H = mask if masked else None, damped(inputs, 0.01)
        exact, _ = gptq(weight.double(), Exact(inputs), mask=kept, order=order, **settings)
        state, _ = gptq(weight, moments_of(inputs), mask=kept, order=order, **settings)
        ours, wanted = (float(row_errors(weight - one.weight, H).sum()) for one in (state, exact))
        assert ours == pytest.approx(wanted, rel=0.03)


# ---------------------------------------------------------------- (a) the identity of the loss


@each_setting
@masked
@both_orders
def test_the_difference_is_the_errors_times_the_factor_and_the_loss_their_square(
    settings: dict[str, Any], masked: bool, order: str
) -> None:
    weight, inputs, mask = problem(5)
    state, note = gptq(weight.double(), Exact(inputs), mask=mask if masked else None, order=order, **settings)
    start = torch.where(mask, weight, 0.0).double() if masked else weight.double()
    H = damped(inputs, 0.01)
    places = inputs.square().sum(0).argsort(descending=True) if order == "activation" else torch.arange(24)
    U = papers_factor(H[places][:, places])
    E = (start - state.weight.double())[:, places] @ torch.linalg.inv(U)
    assert note["damped_loss"] == pytest.approx(float(E.square().sum()), rel=1e-9)
    assert note["damped_loss"] == pytest.approx(float(row_errors(start - state.weight, H).sum()), rel=1e-9)
    # What a column was when its turn came follows from E; its code is the nearest to that, and pruned ones are 0.
    current = state.weight.double()[:, places] + E * U.diagonal()
    scale, zero = (one[:, places] for one in spread(state))
    nearest = scale * ((current / scale).round() + zero).clamp(0, 2 ** settings["bits"] - 1).sub(zero)
    if masked:
        nearest[~mask[:, places]] = 0.0
    torch.testing.assert_close(state.weight.double()[:, places], nearest, rtol=1e-6, atol=1e-6)


@masked
@both_orders
def test_in_float32_the_reported_loss_is_the_damped_error(masked: bool, order: str) -> None:
    weight, inputs, mask = problem(6, 24, 48)
    for settings, damping in product(SETTINGS, (0.01, 0.1)):
        kept = mask if masked else None
        state, note = gptq(weight, moments_of(inputs), mask=kept, damping=damping, order=order, **settings)
        start = torch.where(mask, weight, 0.0) if masked else weight
        assert note["damping"] == damping
        assert note["damped_loss"] == pytest.approx(
            float(row_errors(start - state.weight, damped(inputs, damping)).sum()), rel=1e-3
        )


# ---------------------------------------------------------------- (b) the block size


@pytest.mark.parametrize("group_size", [16, 32, -1])
@masked
@both_orders
def test_the_block_size_has_no_influence(group_size: int, masked: bool, order: str) -> None:
    """Not even on the ranges of groups, which see every error of the columns before them."""
    weight, inputs, mask = problem(7, 6, 96)
    kept = mask if masked else None
    settings: dict[str, Any] = {"bits": 3, "group_size": group_size, "order": order, "mask": kept}
    first, note = gptq(weight.double(), Exact(inputs), block_size=96, **settings)
    assert first.grid is not None
    for block_size in (1, 7, 16, 48, 128):
        other, other_note = gptq(weight.double(), Exact(inputs), block_size=block_size, **settings)
        assert other.grid is not None
        assert torch.equal(other.grid.codes, first.grid.codes)
        torch.testing.assert_close(other.grid.scale, first.grid.scale, rtol=1e-6, atol=0)
        assert other_note["damped_loss"] == pytest.approx(note["damped_loss"], rel=1e-6)
        single, single_note = gptq(weight, moments_of(inputs), block_size=block_size, **settings)
        assert single.grid is not None
        assert (single.grid.codes == first.grid.codes).double().mean() > 0.97
        assert single_note["damped_loss"] == pytest.approx(note["damped_loss"], rel=0.02)


# ---------------------------------------------------------------- (c) without correlation


@both_orders
@masked
def test_with_a_diagonal_gram_matrix_it_is_round_to_nearest(order: str, masked: bool) -> None:
    weight, _, mask = problem(8)
    inputs = torch.diag(draw(24, seed=8).exp())
    for bits, group_size, symmetric in product((2, 3, 4, 8), (-1, 12), (True, False)):
        settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "clip": "minmax"}
        state, note = gptq(weight, moments_of(inputs), mask=mask if masked else None, order=order, **settings)
        plain = state_of(weight)
        if masked:
            plain.prune(~mask)
        start = plain.weight.clone()
        RTN(**settings).apply(plain, NOTHING)
        assert state.grid is not None
        assert plain.grid is not None
        for kind in ("codes", "scale", "zero"):
            assert torch.equal(getattr(state.grid, kind), getattr(plain.grid, kind))
        assert torch.equal(state.weight, plain.weight)
        H = damped(inputs, 0.01).diagonal()
        assert note["damped_loss"] == pytest.approx(float(((start - plain.weight).double() ** 2 @ H).sum()), rel=1e-4)


@both_orders
def test_with_white_inputs_it_is_round_to_nearest_with_clipped_ranges_too(order: str) -> None:
    weight, _, _ = problem(9)
    for bits, group_size in product((2, 3, 4), (-1, 12)):
        settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": False, "clip": "mse"}
        plain = state_of(weight)
        RTN(**settings).apply(plain, NOTHING)
        state, _ = gptq(weight, moments_of(2 * torch.eye(24)), order=order, **settings)
        assert torch.equal(state.weight, plain.weight)


@both_orders
def test_dead_columns_are_rounded_and_change_nothing(order: str) -> None:
    weight, inputs, _ = problem(10)
    inputs[:, [0, 7, 23]] = 0.0
    state, note = gptq(weight, moments_of(inputs), bits=4, group_size=12, order=order)
    assert note["dead_columns"] == 3
    scale, zero = spread(state)
    rounded = scale * ((weight / scale).round() + zero).clamp(0, 15).sub(zero)
    torch.testing.assert_close(state.weight[:, [0, 7, 23]].double(), rounded[:, [0, 7, 23]], rtol=1e-6, atol=1e-6)


@both_orders
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_unit_of_the_inputs_changes_nothing_beside_dead_columns(order: str, symmetric: bool) -> None:
    weight, inputs, _ = problem(11)
    inputs[:, [0, 7, 23]] = 0.0
    settings: dict[str, Any] = {"bits": 2, "group_size": 12, "symmetric": symmetric, "order": order}
    found = [gptq(weight, moments_of(scale * inputs), **settings)[0].weight for scale in (1.0, 2.0**-12, 2.0**12)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@both_orders
def test_dead_columns_take_part_in_the_range_of_their_group(order: str) -> None:
    """What calibration did not see may be seen later: its weights are not clipped for nothing."""
    weight, inputs, _ = problem(12)
    inputs[:, 0] = 0.0
    weight[:, 0] = 4 * weight.abs().max()
    state, _ = gptq(weight, moments_of(inputs * 1e-3), bits=8, group_size=-1, symmetric=True, order=order, clip="mse")
    torch.testing.assert_close(state.weight[:, 0], weight[:, 0], rtol=0.1, atol=0)


# ---------------------------------------------------------------- (d) Babai's nearest plane


def babai(target: Tensor, H: Tensor, scale: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest-plane point of one row: whole multiples (in,) of `scale`, and the diagonal of R.

    Where two planes are equally near, it takes that of `found`: the largest weight of a symmetric range is half way.

    The lattice has a basis vector ``scale_j · A e_j`` per column, ``AᵀA = H``. Babai settles the last vector of a basis
    first, GPTQ the first column: so the basis is the columns backwards.
    """
    A = torch.linalg.cholesky(H).T
    basis = (A * scale).flip(1)
    Q, R = torch.linalg.qr(basis)
    y, count = Q.T @ (A @ target), len(target)
    steps = torch.zeros(count, dtype=torch.float64)
    for i in reversed(range(count)):
        exact, ours = (y[i] - R[i, i + 1 :] @ steps[i + 1 :]) / R[i, i], found[count - 1 - i]
        steps[i] = ours if abs(abs(exact - exact.floor()) - 0.5) < 1e-5 and abs(ours - exact) < 1 else exact.round()
    return steps.flip(0), (R.diagonal().abs().flip(0) / scale)


@pytest.mark.parametrize("group_size", [-1, 12])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_clips_it_is_babais_nearest_plane_with_its_bound(
    group_size: int, symmetric: bool, seed: int
) -> None:
    weight, inputs, _ = problem(seed + 20, 12)
    weight[:, ::12] *= 4  # so that the ranges have room for what the errors add
    H = damped(inputs, 0.01)
    state, _ = gptq(weight.double(), Exact(inputs), bits=8, group_size=group_size, symmetric=symmetric, clip="minmax")
    assert state.grid is not None
    scale, zero = spread(state)
    errors, equal = row_errors(weight - state.weight, H), 0
    for row in range(12):
        found = state.grid.codes[row].double()
        steps, R = babai(weight[row].double(), H, scale[row], found - zero[row])
        codes = steps + zero[row]
        if bool(((codes >= 0) & (codes <= 255)).all()):
            assert torch.equal(found, codes)
            assert errors[row] <= (scale[row].square() / 4 * R.square()).sum() * (1 + 1e-6)
            equal += 1
    assert equal >= 5


# ---------------------------------------------------------------- (f) weights that are on a grid already


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 12])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
@both_orders
def test_weights_on_a_grid_that_they_fill_stay_as_they_are(bits: int, group_size: int, clip: str, order: str) -> None:
    largest, width = 2**bits - 1, 24 if group_size == -1 else group_size
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, largest + 1, (7, 24 // width, width), generator=generator)
    codes[..., 0], codes[..., 1] = 0, largest
    zero = torch.randint(0, largest + 1, (7, 24 // width, 1), generator=generator)
    scale = torch.randint(-6, 3, (7, 24 // width, 1), generator=generator).double().exp2()
    weight = (scale * (codes - zero)).flatten(1).float()
    for moments in (moments_of(problem(11)[1]), Exact(problem(11)[1])):
        settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "clip": clip, "symmetric": False}
        state, note = gptq(weight, moments, order=order, **settings)
        assert note["damped_loss"] == 0.0
        assert state.grid is not None
        assert torch.equal(state.weight, weight)
        assert torch.equal(state.grid.codes.long(), codes.flatten(1))
        again, _ = gptq(state.weight, moments, order=order, **settings)
        assert torch.equal(again.weight, weight)


# ---------------------------------------------------------------- (g) against round to nearest


@pytest.mark.parametrize("seed", range(6))
@both_orders
def test_a_correlated_layer_has_less_error_than_rounded_to_nearest(seed: int, order: str) -> None:
    """Of layers, on seeded data: no theorem, and single rows may do worse."""
    weight, inputs, mask = problem(seed + 30, 32, 64)
    H = damped(inputs, 0.0)
    for bits, clip, kept in product((2, 3, 4), ("minmax", "mse"), (None, mask)):
        settings: dict[str, Any] = {"bits": bits, "group_size": 32, "clip": clip}
        plain = state_of(weight)
        if kept is not None:
            plain.prune(~kept)
        start = plain.weight.clone()
        RTN(**settings).apply(plain, NOTHING)
        state, _ = gptq(weight, moments_of(inputs), mask=kept, order=order, **settings)
        ours, theirs = (float(row_errors(start - one.weight, H).sum()) for one in (state, plain))
        assert ours < 0.95 * theirs, settings


# ---------------------------------------------------------------- (h) the order of activations


@masked
@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_order_is_natural_order_of_permuted_inputs(masked: bool, symmetric: bool) -> None:
    weight, inputs, mask = problem(12)
    order = inputs.square().sum(0).argsort(descending=True)
    assert not torch.equal(order, torch.arange(24))
    settings: dict[str, Any] = {"bits": 3, "group_size": -1, "symmetric": symmetric, "clip": "minmax"}
    for one, other in (
        (moments_of(inputs), moments_of(inputs[:, order])),
        (Exact(inputs), Exact(inputs[:, order])),
    ):
        ours, note = gptq(weight, one, mask=mask if masked else None, order="activation", **settings)
        permuted, other_note = gptq(weight[:, order], other, mask=mask[:, order] if masked else None, **settings)
        assert ours.grid is not None
        assert permuted.grid is not None
        assert torch.equal(ours.grid.codes[:, order], permuted.grid.codes)
        assert torch.equal(ours.weight[:, order], permuted.weight)
        assert note["damped_loss"] == pytest.approx(other_note["damped_loss"], rel=1e-6)


def test_activation_order_keeps_groups_of_neighbours_with_the_ranges_of_the_weights_as_they_come() -> None:
    weight, inputs, mask = problem(13)
    for bits, symmetric in product((3, 4), (True, False)):
        settings: dict[str, Any] = {"bits": bits, "group_size": 6, "symmetric": symmetric, "clip": "minmax"}
        state, _ = gptq(weight, moments_of(inputs), mask=mask, order="activation", **settings)
        plain = state_of(weight)
        plain.prune(~mask)
        RTN(**settings).apply(plain, NOTHING)
        assert state.grid is not None
        assert plain.grid is not None
        assert torch.equal(state.grid.scale, plain.grid.scale)
        assert torch.equal(state.grid.zero, plain.grid.zero)


# ---------------------------------------------------------------- (i) brute force


@pytest.mark.parametrize("columns", [2, 3, 5])
@both_orders
def test_no_grid_point_is_better_than_the_best_of_all(columns: int, order: str) -> None:
    total, bound = 0.0, 0.0
    for seed in range(6):
        weight, inputs, _ = problem(seed + 60, 4, columns)
        H = damped(inputs, 0.01)
        state, note = gptq(weight.double(), Exact(inputs), bits=2, group_size=-1, symmetric=False, order=order)
        scale, zero = spread(state)
        every = torch.tensor(list(product(range(4), repeat=columns)), dtype=torch.float64)  # (4^d, d)
        points = [(scale[row] * (every - zero[row])).float() for row in range(4)]
        best = torch.stack([row_errors(weight[row] - points[row], H).min() for row in range(4)])
        ours = row_errors(weight - state.weight, H)
        assert (ours >= best * (1 - 1e-9)).all()
        assert note["damped_loss"] >= float(best.sum()) * (1 - 1e-6)
        total, bound = total + float(ours.sum()), bound + float(best.sum())
    assert total < 5 * bound  # and not far from it


# ---------------------------------------------------------------- (j) bits


@pytest.mark.parametrize("group_size", [-1, 16])
@both_orders
def test_the_error_falls_by_four_with_every_bit(group_size: int, order: str) -> None:
    """As the square of the step, range / (2^bits − 1), once there are enough of them."""
    weight, inputs, _ = problem(14, 32, 64)
    moments, H = moments_of(inputs), damped(inputs, 0.01)
    scaled = {}
    for bits in (2, 3, 4, 8):
        state, _ = gptq(weight, moments, bits=bits, group_size=group_size, clip="minmax", order=order)
        scaled[bits] = float(row_errors(weight - state.weight, H).sum()) * (2**bits - 1) ** 2
    assert scaled[4] == pytest.approx(scaled[8], rel=0.3)
    assert scaled[3] == pytest.approx(scaled[4], rel=0.4)
    assert scaled[2] > 0.5 * scaled[3]


# ---------------------------------------------------------------- under a mask


@pytest.mark.parametrize("pruning", [Magnitude(pattern="2:4"), Wanda(sparsity=0.5), SparseGPT(pattern="2:4")])
@pytest.mark.parametrize("seed", range(3))
def test_a_pruned_layer_has_less_error_than_rounded_to_nearest(pruning: Any, seed: int) -> None:
    """The error against the dense layer, after a pass that prunes: what the drift of pruned weights is for."""
    weight, inputs, _ = problem(seed + 40, 32, 64)
    moments, H = moments_of(inputs), damped(inputs, 0.0)
    pruned = state_of(weight)
    pruning.apply(pruned, moments)
    start = pruned.weight.clone()
    for bits in (3, 4):
        errors = []
        for one in (GPTQ(bits=bits, group_size=32), RTN(bits=bits, group_size=32)):
            state = LinearState(pruned.name, start.clone(), weight, torch.float32, pruned.mask.clone())  # type: ignore[union-attr]
            one.apply(state, moments)
            assert torch.equal(state.mask, pruned.mask)
            assert (state.weight[~pruned.mask] == 0).all()  # type: ignore[operator]
            errors.append(float(row_errors(start - state.weight, H).sum()))
        assert errors[0] < 0.95 * errors[1]


def test_without_the_mask_pruned_weights_would_come_back() -> None:
    """What the rule for pruned entries prevents: the columns before them move them off 0."""
    weight, inputs, mask = problem(15, 32, 64)
    zeroed = torch.where(mask, weight, 0.0)
    free, _ = gptq(zeroed, moments_of(inputs), bits=4, group_size=32)
    assert (free.weight[~mask] != 0).double().mean() > 0.1
    gptq(weight, moments_of(inputs), mask=mask, bits=4, group_size=32)  # checks that they stay


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@both_orders
def test_weights_are_values_of_the_checkpoints_dtype(dtype: torch.dtype, order: str) -> None:
    """And their rounding is part of the error that is passed on."""
    weight, inputs, mask = problem(16)
    weight = weight.to(dtype).float()
    for kept in (None, mask):
        state, note = gptq(weight, moments_of(inputs), mask=kept, dtype=dtype, bits=4, group_size=12, order=order)
        assert state.grid is not None
        assert state.grid.scale.dtype == dtype
        assert torch.equal(state.weight, state.weight.to(dtype).float())
        start = weight if kept is None else torch.where(kept, weight, 0.0)
        wanted = float(row_errors(start - state.weight, damped(inputs, 0.01)).sum())
        assert note["damped_loss"] == pytest.approx(wanted, rel=1e-3)


def test_what_goes_in_is_not_changed() -> None:
    weight, inputs, mask = problem(17)
    moments = moments_of(inputs)
    gram, upper = moments.gram().clone(), moments.factor(0.01).upper.clone()
    for order in ("natural", "activation"):
        state = LinearState("h", weight.clone(), weight.clone(), torch.float32, mask.clone())
        before = state.weight
        GPTQ(group_size=12, order=order).apply(state, moments)  # type: ignore[arg-type]
        assert torch.equal(before, weight)
        assert torch.equal(state.dense, weight)
        assert torch.equal(state.mask, mask)
    assert torch.equal(moments.gram(), gram)
    assert torch.equal(moments.factor(0.01).upper, upper)
