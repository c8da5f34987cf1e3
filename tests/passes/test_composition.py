"""Passes after passes: masks only shrink, zeros stay exact, patterns hold, counts are exact, a grid is made once.

First on one linear, then in whole runs, in every order that the rules allow and in every format.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.errors import PlanError, RunError
from compress.export.reader import open_model
from compress.invariants import check_invariants
from compress.passes import (
    GPTQ,
    RTN,
    LinearPass,
    LinearState,
    Magnitude,
    Moments,
    PruningPass,
    QuantizingPass,
    SparseGPT,
    Wanda,
)
from compress.rules import RULES
from tests.conftest import files_of, same_bits, tiny_directory
from tests.passes import correlated, draw, floor_of, moments_of, state_of
from tests.test_resume import at_every_block, interrupt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


def linear_of(*passes: LinearPass) -> SimpleNamespace:
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


def broken(state: LinearState, mask_before: Tensor | None = None, *passes: LinearPass) -> str:
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


def on_grid() -> LinearState:
    state = state_of(draw(ROWS, COLUMNS, seed=6))
    RTN(group_size=16).apply(state, moments_of(correlated(100, COLUMNS, seed=6)))
    return state


def regrid(state: LinearState, **changes: Any) -> None:
    assert state.grid is not None
    state.grid = replace(state.grid, **changes)


def change_code(state: LinearState) -> None:
    assert state.grid is not None
    state.grid.codes[3, 5] ^= 1


def change_scale(state: LinearState) -> None:
    assert state.grid is not None
    state.grid.scale[0, 0] = 0.0


def raise_code(state: LinearState) -> None:
    assert state.grid is not None
    state.grid.codes[3, 5] = 16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: setattr(state, "grid", None), "there is no grid, though the pass declares one"),
        (lambda state: regrid(state, spec=state.grid.spec._replace(bits=3)), "the grid is (3, 16, True), but the plan"),
        (
            lambda state: regrid(state, spec=state.grid.spec._replace(symmetric=False)),
            "but the plan says (4, 16, True)",
        ),
        (lambda state: regrid(state, scale=state.grid.scale[:, :1]), "do not fit the layer"),
        (lambda state: regrid(state, zero=state.grid.zero[:-1]), "do not fit the layer"),
        (lambda state: regrid(state, codes=state.grid.codes[:, :-1]), "do not fit the layer"),
        (change_scale, "a scale is not positive and finite"),
        (lambda state: regrid(state, scale=state.grid.scale * float("inf")), "a scale is not positive and finite"),
        (raise_code, "a code is above 15"),
        (lambda state: regrid(state, zero=state.grid.zero + 8), "a code is above 15"),
        (change_code, "the weight is not the value of its codes"),
        (lambda state: state.weight.mul_(1.001), "the weight is not the value of its codes"),
    ],
)
def test_a_pass_that_breaks_a_grid_is_caught(change: Callable[[LinearState], object], says: str) -> None:
    check_invariants(linear_of(RTN(group_size=16)), 0, on_grid(), None)  # type: ignore[arg-type]
    state = on_grid()
    change(state)
    assert says in broken(state, None, RTN(group_size=16))


def test_a_grid_that_no_pass_declares_is_caught() -> None:
    assert "but the plan says None" in broken(on_grid(), None, Magnitude(sparsity=0))


# ---------------------------------------------------------------- whole runs


PRUNING: dict[str, LinearPass] = {
    "magnitude": Magnitude(sparsity=0.5, match=("*.q_proj", "*.down_proj")),
    "wanda": Wanda(pattern="2:4", match=("*.q_proj", "*.down_proj")),
    "sparsegpt": SparseGPT(sparsity=0.4, mask_block=16, match=("*.q_proj", "*.down_proj")),
}
GRID: dict[str, Any] = {"group_size": 16, "clip": "minmax"}
QUANTIZING: dict[str, LinearPass] = {
    "rtn": RTN(bits=4, **GRID, match=("*.q_proj", "*.down_proj")),
    "gptq": GPTQ(bits=2, symmetric=False, **GRID, match=("*.q_proj", "*.down_proj")),
    "gptq by activation": GPTQ(bits=4, order="activation", **GRID, match=("*.q_proj", "*.down_proj")),
}
JOINT: dict[str, LinearPass] = {
    "sparsegpt on a grid": SparseGPT(pattern="2:4", bits=4, **GRID, match=("*.q_proj", "*.down_proj")),
}
ALL = PRUNING | QUANTIZING | JOINT
LINEARS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
FORMATS = ("huggingface", "gptq", "compressed-tensors")


def refused(first: str, second: str) -> bool:
    """A grid is made once, and what moves weights comes before it."""
    return first in QUANTIZING | JOINT and second not in ("magnitude", "wanda")


PAIRS = [pair for pair in product(ALL, ALL) if {*pair} - {*PRUNING}]  # one of both at least makes a grid


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composition")
    return tiny_directory(folder / "model", "llama", blocks=1, dtype=torch.float16)


@pytest.fixture
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time of a tiny run is waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def emitted(model: Path, output: Path, form: str, *passes: LinearPass) -> Path:
    plan = compress.Plan(
        model=compress.Model(path=str(model)),
        calibration=compress.Calibration(source=str(model.parent / "text.txt"), samples=6, length=16),
        run=compress.Run(output=str(output), device="cpu", threads=1),
        passes=list(passes),
        exports=[compress.Export(format=form)],
    )
    compress.run(plan)
    return output


def weights(directory: Path) -> dict[str, Tensor]:
    _, checkpoint = open_model(directory)
    return {name: checkpoint.read(f"{name}.weight") for name in LINEARS}


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What each pruning pass prunes of each linear when it is the only pass."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for number, (name, one) in enumerate(PRUNING.items()):
        pruned = weights(emitted(model, folder / str(number), "huggingface", one))
        found[name] = {linear: weight == 0 for linear, weight in pruned.items()}
    return found


def pruned_share(one: LinearPass, linear: Tensor) -> int:
    """How many weights of a linear a pass prunes."""
    if getattr(one, "pattern", None):
        return linear.numel() // 2
    return floor_of(one.sparsity, linear.numel())  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_no_sync")
@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if not refused(*pair)])
def test_the_whole_mask_survives_in_every_format(
    first: str, second: str, model: Path, alone: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    passes = ALL[first], ALL[second]
    outputs = {form: emitted(model, tmp_path / form, form, *passes) for form in FORMATS}
    found = {form: weights(directory) for form, directory in outputs.items()}
    masks = {form: load_file(outputs[form] / "masks.safetensors") for form in FORMATS[1:]}
    assert not (outputs["huggingface"] / "masks.safetensors").exists()
    pruning = [one for one in passes if isinstance(one, PruningPass)]
    for linear in LINEARS:
        plain = found["huggingface"][linear]
        packed = masks["gptq"][f"{linear}.mask"].numpy()
        kept = torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little")[:, : plain.shape[1]]).bool()
        assert torch.equal(masks["compressed-tensors"][f"{linear}.mask"], masks["gptq"][f"{linear}.mask"])
        assert int((~kept).sum()) >= max(pruned_share(one, plain) for one in pruning)
        if len(pruning) == 1:
            assert int((~kept).sum()) == pruned_share(pruning[0], plain)
        for one in pruning:
            if one.pattern:
                assert (kept.unflatten(1, (-1, 4)).sum(-1) <= 2).all()
        if first in PRUNING:
            assert not (kept & alone[first][linear]).any()
            assert len(pruning) == 2 or torch.equal(~kept, alone[first][linear])
        for form in FORMATS:
            assert same_bits(found[form][linear], plain), form
            assert (found[form][linear][~kept].view(torch.int16) == 0).all(), form
        assert (plain[kept] != 0).double().mean() > 0.4  # the rest is there: at 2 bits much of it rounds to 0
    for form in FORMATS[1:]:
        marker = {"gptq": "qweight", "compressed-tensors": "weight_packed"}[form]
        stored = {name for path in outputs[form].glob("*.safetensors") for name in load_file(path)}
        assert {f"{linear}.{marker}" for linear in LINEARS} <= stored
        assert not {f"{linear}.weight" for linear in LINEARS} & stored


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if refused(*pair)])
def test_other_orders_are_refused_by_their_rule(first: str, second: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as failure:
        emitted(model, tmp_path / "out", "huggingface", ALL[first], ALL[second])
    rule = 5 if isinstance(ALL[second], QuantizingPass) else 3
    assert f"{ALL[second].use()} would break the grid that pass[0] {ALL[first].use()} makes" in failure.value.problem
    assert f"rule {rule}: {RULES[rule][0]}" in failure.value.problem
    twice = ALL[second].grid() is not None
    assert failure.value.fix == ("leave one of the two out: a linear has one grid" if twice else RULES[3][1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_no_sync")
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_passes_that_share_a_sweep_share_forward_gram_and_factor(
    order: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"factorizations": 0, "batches": 0}

    def counted(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[what] += 1
            return original(*arguments, **options)

        return call

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted("factorizations", torch.linalg.cholesky_ex))
    monkeypatch.setattr(Moments, "add", counted("batches", Moments.add))
    pruning = SparseGPT(pattern="2:4", match=("*.q_proj", "*.k_proj", "*.down_proj"))
    quantizing = GPTQ(**GRID, order=order, match=("*.q_proj", "*.k_proj", "*.down_proj"))
    found = []
    for number, passes in enumerate([(pruning,), (pruning, quantizing)]):
        counts |= {"factorizations": 0, "batches": 0}
        emitted(model, tmp_path / str(number), "huggingface", *passes)
        found.append(dict(counts))
    # Two inputs: that of q and k, and that of down. Activation order factorizes H with its columns in another order.
    assert found[0]["factorizations"] == 2
    assert found[1]["factorizations"] == (2 if order == "natural" else 4)
    assert found[0]["batches"] == found[1]["batches"] > 0


# ---------------------------------------------------------------- resumed


RESUMED = """
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 20
length = 24
[run]
output = "out"
[[pass]]
use = "sparsegpt"
sparsity = 0.3
match = ["*.q_proj", "*.down_proj"]
[[pass]]
use = "gptq"
bits = 3
group_size = 16
symmetric = false
[[pass]]
use = "magnitude"
sparsity = 0.5
scope = "global"
[[export]]
format = "compressed-tensors"
"""


@pytest.fixture(scope="module")
def resumable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plan, model and text, and in reference/ the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("resumable")
    tiny_directory(folder / "model", "llama", blocks=2, dtype=torch.float16)
    (folder / "plan.toml").write_text(RESUMED)
    compress.run(compress.load_plan(folder / "plan.toml"))
    (folder / "out").rename(folder / "reference")
    return folder


@at_every_block
def test_a_run_with_a_grid_that_is_killed_resumes_to_the_same_bytes(
    resumable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: int, block: int
) -> None:
    """The grid goes through the journal twice: into the next block, and into the sweep that prunes on it."""
    shutil.copytree(resumable, tmp_path, dirs_exist_ok=True)
    work = interrupt(tmp_path, monkeypatch, sweep, block)
    assert len(list(work.glob("block-*"))) == 2 * sweep + block
    report = compress.run(compress.load_plan(tmp_path / "plan.toml"))
    assert report.resumed == 1
    assert files_of(tmp_path / "out") == files_of(tmp_path / "reference")
    assert "masks.safetensors" in files_of(tmp_path / "out")
