"""EoRA against singular value decompositions in float64 (METHODS section 7), and as a pass of a run."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.calibration.moments import Moments, Statistics
from compress.compiling import compile_plan
from compress.passes import GPTQ, EoRA, LinearState, SparseGPT, Wanda, Where
from compress.passes.eora import SMALL, balanced, left_singular, spend
from compress.plan import load_plan
from compress.rules import RULES
from compress.walk import Walk
from tests.conftest import tiny_directory
from tests.passes import correlated, draw, moments_of, state_of
from tests.test_cli import PLAN, refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    Matrix = NDArray[np.float64]

SHAPES = [(12, 20), (16, 16), (24, 10)]  # out < in, out = in, out > in
shaped = pytest.mark.parametrize(("out", "width"), SHAPES, ids=["wide", "square", "tall"])


def lossy(out: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> LinearState:
    """A layer that has lost half of its weights, and the rest to 3 bits."""
    state = state_of(draw(out, width, seed=seed), dtype)
    state.prune(draw(out, width, seed=seed + 1) < 0)
    state.weight = (state.weight * 2).round() / 2
    return state


def exact(tensor: Tensor) -> Matrix:
    return tensor.detach().double().numpy()


def lost(state: LinearState) -> Matrix:
    """ΔW (out, in)."""
    return exact(state.dense) - exact(state.base())


def by_eigenvectors(H: Matrix) -> Matrix:
    values, Q = np.linalg.eigh(H)
    return np.asarray(Q * np.sqrt(np.clip(values, 0, None)))


def truncated(delta: Matrix, T: Matrix, rank: int) -> Matrix:
    """``[ΔW T]_r T⁻¹`` (out, in): the paper's product, by way of the inverse."""
    U, s, Vt = np.linalg.svd(delta @ T, full_matrices=False)
    return np.asarray((U[:, :rank] * s[:rank]) @ Vt[:rank] @ np.linalg.inv(T))


def tails(delta: Matrix, T: Matrix) -> Matrix:
    """``Σ_{i>r} σ_i²`` of ΔW T for r = 0, 1, …, all."""
    squares = np.linalg.svd(delta @ T, compute_uv=False) ** 2
    return np.append(squares[::-1].cumsum()[::-1], 0.0)


def error(state: LinearState, delta: Matrix, H: Matrix) -> float:
    """``tr (ΔW − B A) H (ΔW − B A)ᵀ``."""
    assert state.low_rank is not None
    rest = delta - exact(state.low_rank.up) @ exact(state.low_rank.down)
    return float(np.trace(rest @ H @ rest.T))


def compensated(state: LinearState, moments: Moments, **settings: Any) -> LinearState:
    """The pass applied to a copy; what holds of every result is checked: base, mask and dense stay, shapes, finite."""
    one = LinearState(state.name, state.weight.clone(), state.dense.clone(), state.dtype, state.mask)
    base = one.base().clone()
    EoRA(**settings).apply(one, moments)
    assert torch.equal(one.base(), base)
    assert torch.equal(one.dense, state.dense)
    assert one.mask is state.mask
    assert one.low_rank is not None
    up, down = one.low_rank.up, one.low_rank.down
    assert up.shape == (one.out_features, settings["rank"])
    assert down.shape == (settings["rank"], one.in_features)
    assert torch.isfinite(up).all()
    assert torch.isfinite(down).all()
    assert torch.equal(up, up.to(state.dtype).float())
    assert torch.equal(down, down.to(state.dtype).float())
    return one


# ---------------------------------------------------------------- what is optimal


@shaped
@pytest.mark.parametrize("root", [np.linalg.cholesky, by_eigenvectors], ids=["cholesky", "eigenvectors"])
def test_the_error_is_the_tail_of_the_singular_values(out: int, width: int, root: Callable[[Matrix], Matrix]) -> None:
    state, inputs = lossy(out, width, seed=1), correlated(80, width, seed=2)
    delta, H = lost(state), exact(inputs).T @ exact(inputs)
    wanted = tails(delta, root(H))
    for rank in range(1, min(out, width) + 1):
        one = compensated(state, moments_of(inputs), rank=rank)
        assert error(one, delta, H) == pytest.approx(wanted[rank], rel=1e-5, abs=1e-9 * wanted[0]), rank


@pytest.mark.parametrize(("out", "width"), [(96, 160), (160, 96)], ids=["wide", "tall"])
@pytest.mark.parametrize("case", ["full", "fewer tokens than columns", "nothing lost", "lost on three ranks"])
def test_products_alone_find_the_same_branch(out: int, width: int, case: str) -> None:
    """Of a rank that is small beside the matrix, by the block Krylov method: within 1e-4 of the least error."""
    rank = min(out, width) // SMALL
    state = lossy(out, width, seed=41)
    inputs = correlated(30 if case == "fewer tokens than columns" else 400, width, seed=42)
    if case == "nothing lost":
        state = state_of(draw(out, width, seed=41), torch.float32)
    if case == "lost on three ranks":
        state.mask = None
        state.weight = state.dense - draw(out, 3, seed=43) @ draw(3, width, seed=44)
    delta, H = lost(state), exact(inputs).T @ exact(inputs)
    wanted = tails(delta, by_eigenvectors(H))
    vectors, squares = left_singular(state.dense - state.base(), moments_of(inputs).gram(), rank)
    assert torch.allclose(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), atol=1e-10)
    singular = -np.diff(wanted)[:rank]  # σ², largest first
    assert exact(squares) == pytest.approx(singular, rel=2e-2, abs=1e-6 * max(wanted[0], 1e-12))
    one = compensated(state, moments_of(inputs), rank=rank)
    assert error(one, delta, H) == pytest.approx(wanted[rank], rel=1e-4, abs=1e-6 * max(wanted[0], 1e-12))


@shaped
def test_no_other_branch_of_its_rank_is_better_in_the_norm_of_the_inputs(out: int, width: int) -> None:
    """Nor is the best of ΔW itself, nor that of its columns by the size of their inputs; and more rank never hurts."""
    state, inputs = lossy(out, width, seed=3), correlated(80, width, seed=4)
    moments, full = moments_of(inputs), min(out, width)
    delta, H = lost(state), exact(inputs).T @ exact(inputs)
    whole = float(np.trace(delta @ H @ delta.T))
    by_diagonal = np.diag(np.sqrt(np.diag(H)))
    before = whole
    for rank in range(1, full + 1):
        best = error(compensated(state, moments, rank=rank), delta, H)
        plain = error(compensated(state, moments, rank=rank, norm="weight"), delta, H)
        rest = delta - truncated(delta, by_diagonal, rank)
        scaled = float(np.trace(rest @ H @ rest.T))
        slack = 1e-9 * whole
        assert best <= plain + slack
        assert best <= scaled + slack
        assert best <= before + slack
        if rank == 1:
            assert best < 0.99 * plain  # the inputs are far from white: the difference is no rounding
        if rank == full:
            assert max(best, plain, scaled) < slack
        before = best


@shaped
def test_any_factor_of_the_second_moment_gives_the_same_product(out: int, width: int) -> None:
    state, inputs = lossy(out, width, seed=5), correlated(80, width, seed=6)
    delta, H = lost(state), exact(inputs).T @ exact(inputs)
    rotation = np.linalg.qr(exact(draw(width, width, seed=7)))[0]
    factors = [np.linalg.cholesky(H), by_eigenvectors(H), np.linalg.cholesky(H) @ rotation]
    assert all(np.allclose(T @ T.T, H) for T in factors)
    for rank in (1, 3, 7):
        one = compensated(state, moments_of(inputs), rank=rank).low_rank
        assert one is not None
        for T in factors:
            wanted = truncated(delta, T, rank)
            assert np.allclose(exact(one.product()), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@shaped
def test_white_inputs_give_the_plain_decomposition(out: int, width: int) -> None:
    """H = I; and norm = "weight" whatever the inputs are."""
    state = lossy(out, width, seed=8)
    wanted = truncated(lost(state), np.eye(width), 4)
    for moments, settings in (
        (moments_of(torch.eye(width)), {}),
        (moments_of(correlated(80, width, seed=9)), {"norm": "weight"}),
    ):
        one = compensated(state, moments, rank=4, **settings).low_rank
        assert one is not None
        assert np.allclose(exact(one.product()), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@shaped
def test_independent_inputs_scale_the_columns(out: int, width: int) -> None:
    """H diagonal: the decomposition of ΔW with its columns scaled by the norms of their inputs."""
    state, norms = lossy(out, width, seed=10), draw(width, seed=11).exp()
    wanted = truncated(lost(state), np.diag(exact(norms)), 4)
    one = compensated(state, moments_of(torch.diag(norms)), rank=4).low_rank
    assert one is not None
    assert np.allclose(exact(one.product()), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


# ---------------------------------------------------------------- what is singular


@shaped
@pytest.mark.parametrize("case", ["few tokens", "dead columns", "nothing"])
def test_singular_second_moments(out: int, width: int, case: str) -> None:
    """Fewer tokens than columns, columns that never had an input, no input at all: the tail sum holds."""
    inputs = correlated(5 if case == "few tokens" else 60, width, seed=12)
    if case == "dead columns":
        inputs[:, ::3] = 0.0
    if case == "nothing":
        inputs = torch.zeros_like(inputs)
    state = lossy(out, width, seed=13)
    delta, H = lost(state), exact(inputs).T @ exact(inputs)
    wanted = tails(delta, exact(inputs).T)  # X Xᵀ = H, X (in, tokens)
    wanted = np.append(wanted, np.zeros(max(0, min(out, width) + 1 - len(wanted))))  # all that is left is 0
    for rank in range(1, min(out, width) + 1):
        one = compensated(state, moments_of(inputs), rank=rank)
        assert error(one, delta, H) == pytest.approx(wanted[rank], rel=1e-4, abs=1e-9 * wanted[0] + 1e-30), rank


@shaped
@pytest.mark.parametrize("norm", ["activation", "weight"])
def test_where_nothing_was_lost_the_branch_is_zero(out: int, width: int, norm: str) -> None:
    state = state_of(draw(out, width, seed=14))
    one = compensated(state, moments_of(correlated(60, width, seed=15)), rank=3, norm=norm).low_rank
    assert one is not None
    assert not one.product().any()


# ---------------------------------------------------------------- the factors


def test_balancing_keeps_the_product() -> None:
    up, down = draw(9, 4, seed=16).double() * torch.logspace(-6, 6, 4), draw(4, 7, seed=17).double()
    down[2] = 0.0  # a rank that is worth nothing
    left, right = balanced(up, down)
    assert torch.allclose(left @ right, up @ down, rtol=1e-12, atol=1e-12)
    used = [0, 1, 3]
    assert torch.allclose(left.norm(dim=0)[used], right.norm(dim=1)[used], rtol=1e-12)
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()


@shaped
@pytest.mark.parametrize("size", [2e4, 1.0, 1e-6])
def test_factors_of_badly_scaled_layers_fit_float16(out: int, width: int, size: float) -> None:
    """All weights alike and all lost: ΔW has the one singular value size · √(out · in), too large for float16 at 2·10⁴.

    Unbalanced, `A = UᵀΔW` would overflow, or its small values would lose their digits.
    """
    state = state_of(torch.full((out, width), size).half().float(), torch.float16)
    state.prune(torch.ones(out, width, dtype=torch.bool))
    one = compensated(state, moments_of(torch.eye(width)), rank=1).low_rank
    assert one is not None
    # Two factors, each rounded to 11 bits.
    assert torch.allclose(one.product(), state.dense, rtol=2.1 * 2**-11, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("out", "width"), [(128, 24), (24, 128), (20, 40)], ids=["tall", "wide", "no group fits"])
def test_factors_on_a_grid(out: int, width: int, bits: int) -> None:
    """A group of 64 along the longer side has at most 2^bits equally spaced values, the nearest to those without it."""
    state, moments = lossy(out, width, seed=18), moments_of(correlated(300, width, seed=19))
    free = compensated(state, moments, rank=6).low_rank
    rounded = compensated(state, moments, rank=6, factor_bits=bits).low_rank
    assert free is not None
    assert rounded is not None
    for wanted, found in ((free.up.T, rounded.up.T), (free.down, rounded.down)):  # (rank, long side)
        assert not torch.equal(wanted, found)
        group = 64 if wanted.shape[1] % 64 == 0 else wanted.shape[1]
        for before, after in zip(wanted.reshape(-1, group), found.reshape(-1, group), strict=True):
            largest = float(before.abs().max())
            step = 2 * largest / (2**bits - 1)
            places = after / step
            assert torch.allclose(places, places.round(), atol=1e-3)
            assert int(places.round().max()) <= 2 ** (bits - 1) - 1
            assert int(places.round().min()) >= -(2 ** (bits - 1))
            assert float((after - before).abs().max()) <= step / 2 * (1 + 1e-4)


def test_coarser_factors_cost_more() -> None:
    state, inputs = lossy(64, 128, seed=20), correlated(300, 128, seed=21)
    delta, H = lost(state), exact(inputs).T @ exact(inputs)
    none, eight, four = (
        error(compensated(state, moments_of(inputs), rank=16, factor_bits=bits), delta, H) for bits in (None, 8, 4)
    )
    assert none < eight < four < float(np.trace(delta @ H @ delta.T))


def test_the_spectrum_is_relative_to_the_layer() -> None:
    """With a budget: the σ_i², by which ranks are allocated, over ``‖W X‖²``."""
    state, inputs = lossy(12, 20, seed=22), correlated(80, 20, seed=23)
    one = compensated(state, moments_of(inputs), rank=5, budget=100).low_rank
    assert one is not None
    assert one.spectrum is not None
    T = exact(inputs).T
    wanted = np.linalg.svd(lost(state) @ T, compute_uv=False)[:5] ** 2 / np.linalg.norm(exact(state.dense) @ T) ** 2
    assert np.allclose(exact(one.spectrum), wanted, rtol=1e-4)
    plain = compensated(state, moments_of(inputs), rank=5, budget=100, norm="weight").low_rank
    assert plain is not None
    assert plain.spectrum is not None
    wanted = np.linalg.svd(lost(state), compute_uv=False)[:5] ** 2 / np.linalg.norm(exact(state.dense)) ** 2
    assert np.allclose(exact(plain.spectrum), wanted, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"norm": "weight"}, {"factor_bits": 4}, {"norm": "weight", "factor_bits": 4}])
def test_the_errors_are_those_of_the_first_ranks(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """With a budget: of every rank that it may leave, in the norm of the inputs, of the factors as they are stored."""
    state, inputs = lossy(12, 20, seed=24), correlated(80, 20, seed=25)
    state.dtype = dtype
    one = compensated(state, moments_of(inputs), rank=5, budget=100, **settings).low_rank
    assert one is not None
    assert one.errors is not None
    delta, up, down, X = lost(state), exact(one.up), exact(one.down), exact(inputs).T
    wanted = [np.linalg.norm((delta - up[:, :k] @ down[:k]) @ X) ** 2 for k in range(6)]
    assert np.allclose(exact(one.errors), np.array(wanted) / np.linalg.norm(exact(state.dense) @ X) ** 2, rtol=1e-4)


# ---------------------------------------------------------------- a budget


def spectra_of(seed: int) -> dict[str, Tensor]:
    return {name: draw(4, seed=seed + n).square().sort(descending=True).values for n, name in enumerate("abc")}


def left(spectra: dict[str, Tensor], ranks: dict[str, int]) -> float:
    return sum(float(values[ranks[name] :].double().sum()) for name, values in spectra.items())


def optimum(spectra: dict[str, Tensor], sizes: dict[str, int], budget: int) -> float:
    """The least that any allocation within the budget leaves, all of them tried."""
    choices = (dict(zip("abc", ranks, strict=True)) for ranks in product(range(5), repeat=3))
    return min(left(spectra, one) for one in choices if sum(sizes[n] * r for n, r in one.items()) <= budget)


@pytest.mark.parametrize("seed", range(5))
def test_linears_of_one_size_get_the_best_ranks(seed: int) -> None:
    spectra, sizes = spectra_of(10 * seed), dict.fromkeys("abc", 7)
    for budget in range(0, 100, 3):
        ranks = spend(spectra, sizes, budget)
        assert sum(7 * rank for rank in ranks.values()) <= budget
        assert left(spectra, ranks) == pytest.approx(optimum(spectra, sizes, budget))


@pytest.mark.parametrize("seed", range(5))
def test_linears_of_other_sizes_get_them_for_what_is_spent(seed: int) -> None:
    """Greedy is not optimal for sizes that differ: a knapsack's last gap may be filled better.

    It is as long as no rank was too large for what was left, and what it misses is less than the first that was.
    """
    spectra, sizes = spectra_of(10 * seed), {"a": 5, "b": 8, "c": 11}
    exactly = 0
    for budget in range(0, 100):
        ranks = spend(spectra, sizes, budget)
        spent = sum(sizes[name] * rank for name, rank in ranks.items())
        assert spent <= budget
        found, best = left(spectra, ranks), optimum(spectra, sizes, budget)
        steps = sorted((-float(v) / sizes[n], n, float(v)) for n, values in spectra.items() for v in values)
        used = dict.fromkeys("abc", 0)
        refused_value = 0.0
        for _, name, value in steps:
            if used[name] == ranks[name]:
                refused_value = value
                break
            used[name] += 1
        if used == ranks:  # nothing smaller was taken after a rank that did not fit
            assert found == pytest.approx(optimum(spectra, sizes, spent))
            exactly += 1
        assert best - 1e-9 <= found <= best + refused_value
    assert exactly > 20


def test_no_budget_is_no_branch() -> None:
    assert spend(spectra_of(0), {"a": 5, "b": 8, "c": 11}, 0) == dict.fromkeys("abc", 0)


# ---------------------------------------------------------------- in a plan

HEAD = PLAN[: PLAN.index("[[pass]]")]
FIRST = HEAD.count("\n") + 1  # the line of the first [[pass]]
EORA = 'use = "eora"\nrank = 4'


def write(*passes: str) -> None:
    Path("plan.toml").write_text(HEAD + "".join(f"[[pass]]\n{one}\n" for one in passes))


@pytest.mark.parametrize(
    ("later", "rule", "fix"),
    [
        ('use = "sparsegpt"\nsparsity = 0.5', 3, "move it before pass[0] eora"),
        ('use = "wanda"\npattern = "2:4"', 3, "move it before pass[0] eora"),
        ('use = "magnitude"\nsparsity = 0.5', 3, "move it before pass[0] eora"),
        ('use = "rtn"\ngroup_size = 16', 5, "move it before pass[0] eora"),
        ('use = "gptq"\ngroup_size = 16', 5, "move it before pass[0] eora"),
        ('use = "awq"', 1, "move the rewrite to the front"),
        (EORA, 7, "leave one of the two out: a linear has one low-rank branch"),
    ],
)
def test_nothing_that_moves_weights_may_follow(
    later: str, rule: int, fix: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor a second branch."""
    write(EORA, later, *(['use = "gptq"\ngroup_size = 16'] if "awq" in later else []))
    found = " ".join(refused(capsys, "plan.toml").split())
    use = later.split('"')[1]
    assert f"plan.toml:{FIRST + 3}: pass[1]: {use} would break the low-rank branch that pass[0] eora makes" in found
    assert f"rule {rule}: {RULES[rule][0]}" in found
    assert f"fix: {fix}" in found


def test_a_rank_above_the_smaller_side_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write('use = "wanda"\nsparsity = 0.5', 'use = "eora"\nrank = 17')
    found = " ".join(refused(capsys, "plan.toml").split())
    assert f"plan.toml:{FIRST + 3}: pass[1]" in found
    assert "rank 17 is above 16, the smaller side of a 16 × 32 linear" in found
    assert "fix: rank = 16 or less; a [[pass.where]] can give some linears another" in found
    write(
        'use = "wanda"\nsparsity = 0.5',
        'use = "eora"\nrank = 17\n[[pass.where]]\nmatch = ["*.k_proj", "*.v_proj"]\nrank = 16',
    )
    assert {linear.rank for linear in compile_plan(load_plan("plan.toml")).linears} == {16, 17}


def test_settings_out_of_range_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, says in (
        ("factor_bits = 3", "no grid of factors has 3 bits"),
        ("rank = 0", "greater than or equal to 1"),
        ("budget = -1", "greater than or equal to 0"),
    ):
        write(f'use = "eora"\n{text}')
        found = refused(capsys, "plan.toml")
        assert f"plan.toml:{FIRST + 2}: pass[0].{text.split()[0]}" in found
        assert says in found


def test_one_budget_for_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget for some linears would be none: it is spent over all of them together."""
    write('use = "eora"\nrank = 4\n[[pass.where]]\nmatch = "*.q_proj"\nbudget = 100')
    found = " ".join(refused(capsys, "plan.toml").split())
    assert f"plan.toml:{FIRST + 5}: pass[0].where[0].budget" in found
    assert "budget is one for all linears" in found


def plan_of(folder: Path, *passes: Any, output: str = "out", refresh: str = "block", **settings: Any) -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=8, length=32),
        run=compress.Run(output=str(folder / output), refresh=refresh),
        passes=passes,
        **settings,
    )


@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_it_shares_the_sweep_of_what_comes_before(folder: Path, monkeypatch: pytest.MonkeyPatch, refresh: str) -> None:
    """With sparsegpt and gptq: no forward more, and no Gram matrix more, than with them alone."""
    counts = {"forwards": 0, "tokens": 0}
    forward, add = Walk._forward, Moments.add

    def counted_forward(self: Walk, *arguments: Any, **settings: Any) -> Tensor:
        counts["forwards"] += 1
        return forward(self, *arguments, **settings)

    def counted_add(self: Moments, inputs: Tensor) -> None:
        assert self.statistics is Statistics.GRAM
        counts["tokens"] += len(inputs)
        add(self, inputs)

    monkeypatch.setattr(Walk, "_forward", counted_forward)
    monkeypatch.setattr(Moments, "add", counted_add)
    passes = [SparseGPT(pattern="2:4"), GPTQ(group_size=16)]
    seen = []
    for number, some in enumerate((passes, [*passes, EoRA(rank=4)])):
        plan = plan_of(folder, *some, output=f"out{number}", refresh=refresh)
        assert compile_plan(plan).sweeps == (tuple(range(len(some))),)
        counts |= {"forwards": 0, "tokens": 0}
        compress.run(plan)
        seen.append(dict(counts))
    assert seen[0] == seen[1]
    assert seen[0]["tokens"] == 2 * 4 * 8 * 32  # blocks, subsets, samples, length: each input once


def test_the_ledger_says_what_it_gained(folder: Path) -> None:
    """Error before and after, of the same layer in the same norm; more rank gains more."""
    after = {}
    for rank in (2, 8):
        report = compress.run(plan_of(folder, SparseGPT(pattern="2:4"), EoRA(rank=rank), output=f"out{rank}"))
        lines = [line for line in report.linears if line.use == "eora"]
        assert len(lines) == 2 * 7
        for line in lines:
            assert line.error_kind == "gram"
            assert line.error_before is not None
            assert line.error_after is not None
            assert line.error_after < line.error_before
            assert line.detail == f"rank {rank}"
        after[rank] = sum(line.error_after or 0.0 for line in lines if ".layers.0." in line.linear)
    assert after[8] < after[2]


def test_a_dense_model_gets_a_zero_branch(folder: Path) -> None:
    """Alone there is nothing to make up for; nothing is NaN."""
    compress.run(plan_of(folder, EoRA(rank=3)))
    model, out = load_file(folder / "model" / "model.safetensors"), load_file(folder / "out" / "model.safetensors")
    assert model.keys() == out.keys()
    assert all(torch.equal(out[name], value) for name, value in model.items())
    branches = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    assert len(branches) == 2 * 2 * 7
    for name, up in branches.items():
        if name.endswith("lora_B.weight"):
            assert not (up @ branches[name.replace("lora_B", "lora_A")]).any()
    assert all(torch.isfinite(value).all() for value in branches.values())


def test_a_budget_of_nothing_writes_no_adapter(folder: Path) -> None:
    """In the first block, whose inputs no branch has changed, all is as without the pass."""
    report = compress.run(plan_of(folder, SparseGPT(pattern="2:4"), EoRA(rank=4, budget=0)))
    for line in report.linears:
        if line.use == "eora":
            assert line.error_after == pytest.approx(line.error_before, rel=1e-3)
            assert line.detail == "rank 0"
    compress.run(plan_of(folder, SparseGPT(pattern="2:4"), output="without"))
    assert not (folder / "out" / "adapter").exists()
    found, wanted = (load_file(folder / name / "model.safetensors") for name in ("out", "without"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items() if ".layers.1." not in name)


@pytest.mark.parametrize("settings", [{}, {"norm": "weight"}])
def test_a_budget_is_spent_on_the_leading_ranks(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The branches of a budget are the first columns and rows of those without one, and they keep to it.

    The ledger has the errors of a plan that asks for these ranks itself.
    """
    tiny_directory(tmp_path / "model", "llama", blocks=2)
    budget, passes = 3000, [SparseGPT(pattern="2:4")]
    report = compress.run(plan_of(tmp_path, *passes, EoRA(rank=8, budget=budget, **settings)))
    # In the first block, whose inputs no branch has changed, those without a budget are the same.
    compress.run(plan_of(tmp_path, *passes, EoRA(rank=8, **settings), output="all"))
    some, every = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("out", "all"))
    spent = sum(value.numel() for value in some.values())
    assert budget - (48 + 32) < spent <= budget  # the largest linear's rank costs 80
    ranks = set()
    for name, value in every.items():
        if "layers.0." not in name:
            continue
        rank = some[name].shape[0 if "lora_A" in name else 1] if name in some else 0
        ranks.add(rank)
        if rank:
            assert torch.equal(some[name], value[:rank] if "lora_A" in name else value[:, :rank])
    assert len(ranks) > 1
    left = {
        name[len("base_model.model.") : -len(".lora_A.weight")]: len(v) for name, v in some.items() if "_A." in name
    }
    where = tuple(Where(match=name, rank=rank) for name, rank in left.items())
    one = EoRA(rank=8, where=where, **settings)
    same = compress.run(plan_of(tmp_path, *passes, one, output="same"))
    compared = 0
    for found, wanted in zip(report.linears, same.linears, strict=True):
        if found.use == "eora" and found.linear in left and ".layers.0." in found.linear:
            assert found.detail == wanted.detail
            assert found.error_after == pytest.approx(wanted.error_after, rel=1e-4)
            compared += 1
    assert compared > 2


@pytest.mark.parametrize("budgets", [(100, None), (None, 100), (100, 50), (0, 50)])
def test_each_pass_has_a_budget_of_its_own(folder: Path, budgets: tuple[int | None, int | None]) -> None:
    """Whatever another pass on other linears has, first or last; without one, all ranks stay."""
    leaves = ("q_proj", "v_proj")
    passes = [EoRA(rank=2, match=f"*.{leaf}", budget=budget) for leaf, budget in zip(leaves, budgets, strict=True)]
    report = compress.run(plan_of(folder, Wanda(pattern="2:4"), *passes))
    found = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    for leaf, budget, rank_size in zip(leaves, budgets, (64, 48), strict=True):  # 32 × 32 and 16 × 32
        branches = {name: value for name, value in found.items() if leaf in name}
        spent = sum(value.numel() for value in branches.values())
        assert spent == (2 * 2 * rank_size if budget is None else budget // rank_size * rank_size)
        for line in report.linears:
            if line.use == "eora" and leaf in line.linear:
                down = branches.get(f"base_model.model.{line.linear}.lora_A.weight", ())
                assert line.detail == f"rank {len(down)}"


def test_other_ranks_for_some(folder: Path) -> None:
    where = (Where(match="*.down_proj", rank=9), Where(match="model.layers.1.*", rank=2))
    compress.run(plan_of(folder, SparseGPT(pattern="2:4"), EoRA(rank=4, except_="*.o_proj", where=where)))
    found = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    ranks = {name: len(value) for name, value in found.items() if "lora_A" in name}
    assert len(ranks) == 2 * 6
    for name, rank in ranks.items():
        assert rank == (2 if "layers.1." in name else 9 if "down_proj" in name else 4), name
