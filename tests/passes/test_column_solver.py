"""The column loop against explicit optimal brain surgery, and the identity W − Q = E U."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.passes import column_solver
from compress.passes.column_solver import solve_columns
from tests.passes import correlated, damped, draw, papers_factor, row_errors


class Masked:
    """Zeroes a mask that is given; remembers what it was shown."""

    def __init__(self, pruned: Tensor, group: int = 1) -> None:
        self.pruned, self.group = pruned, group
        self.shown: list[tuple[int, Tensor, Tensor]] = []

    def begin(self, start: int, current: Tensor, diagonal: Tensor) -> None:
        self.shown.append((start, current.clone(), diagonal.clone()))

    def project(self, column: int, current: Tensor) -> Tensor:
        return torch.where(self.pruned[:, column], torch.zeros_like(current), current)


class Rounded(Masked):
    """Rounds to a grid whose step each group draws from the weights it is shown: what GPTQ does."""

    def begin(self, start: int, current: Tensor, diagonal: Tensor) -> None:
        super().begin(start, current, diagonal)
        self.step = current.abs().amax(0) / 3

    def project(self, column: int, current: Tensor) -> Tensor:
        return (current / self.step).round() * self.step


def surgery(weight: Tensor, H: Tensor, rule: Masked) -> Tensor:
    """Columns from left to right, each by the formulas of optimal brain surgery and an explicit inverse."""
    W, inverse = weight.clone(), torch.linalg.inv(H)  # of the columns that are still free
    for column in range(W.shape[1]):
        if column % rule.group == 0:
            ahead = slice(column, column + rule.group)
            rule.begin(column, W[:, ahead].T.clone(), torch.zeros(0))
        final = rule.project(column, W[:, column].clone())
        W[:, column:] -= torch.outer((W[:, column] - final) / inverse[0, 0], inverse[0])
        W[:, column] = final
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return W


def problem(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """W, H_λ and U in float64, and half of W to prune."""
    H = damped(correlated(3 * columns, columns, seed=seed, dtype=torch.float64), 0.01)
    return draw(rows, columns, seed=seed, dtype=torch.float64), H, draw(rows, columns, seed=seed + 7) < 0


def rules(pruned: Tensor, group: int) -> list[Masked]:
    return [Masked(pruned, group), Rounded(pruned, group)]


@pytest.mark.parametrize("group", [1, 4, 5, 13, 26])
@pytest.mark.parametrize("block_size", [1, 3, 4, 8, 26, 128])
def test_it_is_optimal_brain_surgery_column_by_column(group, block_size):
    weight, H, pruned = problem(5, 26, seed=group)
    for ours, slow in zip(rules(pruned, group), rules(pruned, group), strict=True):
        Q, _ = solve_columns(weight, papers_factor(H), (ours,), block_size=block_size)
        torch.testing.assert_close(Q, surgery(weight, H, slow), rtol=1e-9, atol=1e-9)
        for (start, current, _), (other, expected, _) in zip(ours.shown, slow.shown, strict=True):
            assert start == other
            torch.testing.assert_close(current, expected, rtol=1e-9, atol=1e-9)  # every update had arrived


@pytest.mark.parametrize("columns", [1, 2, 17, 40])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_a_group_begins_at_every_multiple_with_its_part_of_the_diagonal(columns, group):
    weight, H, pruned = problem(3, columns, seed=columns)
    U = papers_factor(H)
    for block_size in (1, 6, 16, 64):
        rule = Masked(pruned, group)
        solve_columns(weight, U, (rule,), block_size=block_size)
        assert [start for start, _, _ in rule.shown] == list(range(0, columns, group))
        for start, current, diagonal in rule.shown:
            assert torch.equal(diagonal, U.diagonal()[start : start + group])
            assert current.shape == (min(group, columns - start), 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_difference_is_the_errors_times_the_factor_and_the_loss_their_square(seed):
    weight, H, pruned = problem(7, 31, seed=seed)
    U = papers_factor(H)
    for rule in rules(pruned, 4):
        Q, loss = solve_columns(weight, U, (rule,), block_size=8)
        E = (weight - Q) @ torch.linalg.inv(U)
        assert loss == pytest.approx(float(E.square().sum()), rel=1e-11)
        assert loss == pytest.approx(float(row_errors(weight - Q, H).sum()), rel=1e-11)
    # The errors of the masked rule are those of surgery: zero exactly where a weight was left as it was.
    Q, _ = solve_columns(weight, U, (Masked(pruned),), block_size=8)
    E = (weight - Q) @ torch.linalg.inv(U)
    assert E[~pruned].abs().max() < 1e-10
    assert (Q[pruned] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", [1, 7, 12, 48])
def test_the_block_size_changes_nothing_but_rounding(dtype, group):
    weight, H, pruned = problem(6, 48, seed=3)
    weight, U = weight.to(dtype), papers_factor(H).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    first, loss = solve_columns(weight, U, (Masked(pruned, group),), block_size=48)
    for block_size in (1, 2, 5, 7, 12, 16, 47, 100):
        Q, other = solve_columns(weight, U, (Masked(pruned, group),), block_size=block_size)
        assert (Q - first).norm() <= tolerance * first.norm()
        assert other == pytest.approx(loss, rel=tolerance)


def test_a_rule_that_changes_nothing_costs_nothing():
    weight, H, pruned = problem(4, 20, seed=4)
    Q, loss = solve_columns(weight, papers_factor(H), (Masked(torch.zeros_like(pruned)),), block_size=8)
    assert loss == 0.0
    assert torch.equal(Q, weight)


def test_without_correlation_nothing_is_updated():
    weight, _, pruned = problem(4, 20, seed=5)
    scales = draw(20, seed=6, dtype=torch.float64).exp()
    Q, loss = solve_columns(weight, torch.diag(1 / scales), (Masked(pruned),), block_size=8)
    assert torch.equal(Q, torch.where(pruned, 0.0, weight))
    assert loss == pytest.approx(float((weight[pruned] * scales.expand(4, 20)[pruned]).square().sum()), rel=1e-12)


def test_rows_do_not_see_each_other():
    weight, H, pruned = problem(6, 20, seed=7)
    U = papers_factor(H)
    together, _ = solve_columns(weight, U, (Masked(pruned),), block_size=8)
    for row in range(6):
        alone, _ = solve_columns(weight[row : row + 1], U, (Masked(pruned[row : row + 1]),), block_size=8)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)


def test_what_goes_in_is_not_changed():
    weight, H, pruned = problem(4, 20, seed=8)
    U = papers_factor(H)
    before = weight.clone(), U.clone()
    solve_columns(weight, U, (Masked(pruned),), block_size=8)
    assert torch.equal(weight, before[0])
    assert torch.equal(U, before[1])
    column_major = weight.T.contiguous().T  # .T inside the solver makes no copy of this one
    solve_columns(column_major, U, (Masked(pruned),), block_size=8)
    assert torch.equal(column_major, before[0])


# ---------------------------------------------------------------- several rules


def in_turn(weight: Tensor, H: Tensor, together: list[Masked]) -> Tensor:
    """`surgery` with several rules: each begins its groups, and projects what the one before it gave."""
    W, inverse = weight.clone(), torch.linalg.inv(H)
    for column in range(W.shape[1]):
        final = W[:, column].clone()
        for rule in together:
            if column % rule.group == 0:
                rule.begin(column, W[:, column : column + rule.group].T.clone(), torch.zeros(0))
            final = rule.project(column, final)
        W[:, column:] -= torch.outer((W[:, column] - final) / inverse[0, 0], inverse[0])
        W[:, column] = final
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return W


@pytest.mark.parametrize("groups", [(1, 8), (4, 8), (8, 4), (3, 7), (24, 6), (16, 48), (100, 5)], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 7, 16, 24, 48, 128])
def test_rules_work_in_turn_each_with_groups_of_its_own(groups: tuple[int, int], block_size: int) -> None:
    weight, H, pruned = problem(5, 48, seed=sum(groups))
    ours = [Masked(pruned, groups[0]), Rounded(pruned, groups[1])]
    slow = [Masked(pruned, groups[0]), Rounded(pruned, groups[1])]
    U = papers_factor(H)
    Q, loss = solve_columns(weight, U, ours, block_size=block_size)
    torch.testing.assert_close(Q, in_turn(weight, H, slow), rtol=1e-9, atol=1e-9)
    assert (Q[pruned] == 0).all()  # 0 is on the grid of the second
    assert loss == pytest.approx(float(row_errors(weight - Q, H).sum()), rel=1e-10)
    for one, other, group in zip(ours, slow, groups, strict=True):
        assert [start for start, _, _ in one.shown] == list(range(0, 48, group))
        for (_, current, diagonal), (start, expected, _) in zip(one.shown, other.shown, strict=True):
            torch.testing.assert_close(current, expected, rtol=1e-9, atol=1e-9)  # every update had arrived
            assert torch.equal(diagonal, U.diagonal()[start : start + group])


def test_the_order_of_rules_counts() -> None:
    """The last one has the last word: rounding to a grid without 0 after the mask brings weights back."""

    class Odd(Masked):
        def project(self, column: int, current: Tensor) -> Tensor:
            return current.floor() + 0.5

    weight, H, pruned = problem(5, 20, seed=9)
    U, none = papers_factor(H), torch.zeros_like(pruned)
    first, _ = solve_columns(weight, U, (Odd(none), Masked(pruned)), block_size=8)
    last, _ = solve_columns(weight, U, (Masked(pruned), Odd(none)), block_size=8)
    assert (first[pruned] == 0).all()
    assert (last[pruned] != 0).all()


@pytest.mark.parametrize("wanted", [1, 2, 5, 7, 8, 16, 48, 64, 100, 128, 1000])
def test_blocks_are_cut_so_that_no_group_begins_within_one_and_ends_in_another(wanted: int) -> None:
    for groups in ([1], [4], [128], [4, 128], [3, 7], [1, 48], [96, 64], [16, 24, 32], [5, 640], [129], [1, 1]):
        size = column_solver._block_size(wanted, groups)
        assert 0 < size <= max(wanted, 1)
        for group in groups:
            assert size % group == 0 or group % size == 0
        best = next(
            (n for n in range(wanted, 0, -1) if all(n % g == 0 or g % n == 0 for g in groups)), 1
        )  # and no smaller than it must be
        assert size == best, (wanted, groups)
