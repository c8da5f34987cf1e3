"""Whole runs on tiny models, against an independent pipeline: the whole model in memory, hooks, and twenty lines."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress import estimate, pipeline
from compress.architecture import architecture_for
from compress.calibration import collect
from compress.calibration.moments import Moments, Statistics
from compress.compiling import compile_plan
from compress.errors import RunError
from compress.passes import Magnitude, SparseGPT, Wanda
from compress.progress import Progress
from compress.stream import Skeleton
from tests.conftest import files_of, same_bits, some_text, tiny_directory, write_tokenizer
from tests.models import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from compress.passes import Pass
    from compress.plan import Plan
    from compress.report import Report

SAMPLES, LENGTH = 90, 24  # two batches, the last one smaller
PASSES: dict[str, Pass] = {
    "magnitude": Magnitude(sparsity=0.4),
    "magnitude-row": Magnitude(sparsity=0.4, scope="row"),
    "magnitude-2:4": Magnitude(pattern="2:4"),
    "wanda": Wanda(sparsity=0.4),
    "wanda-2:4": Wanda(pattern="2:4"),
    "sparsegpt": SparseGPT(sparsity=0.4),
    "sparsegpt-2:4": SparseGPT(pattern="2:4"),
}


def plan_of(folder: Path, *passes: Pass, output: str = "out", **more: Any) -> Plan:
    """A plan over `folder`/model and text; `more` are settings of [run], and the tables calibration and evaluate."""
    calibration = {"samples": SAMPLES, "length": LENGTH, "selection": "first"} | more.pop("calibration", {})
    evaluate = more.pop("evaluate", None)
    return compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(**{"source": str(folder / "text.txt")} | calibration),
        run=compress.Run(output=str(folder / output), **more),
        passes=list(passes),
        evaluate=evaluate,
    )


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, through the safetensors package."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def linears_of(plan: Plan) -> dict[str, tuple[str, bool]]:
    """Linear -> (stored name, transposed)."""
    return {linear.name: (linear.stored, linear.transposed) for linear in compile_plan(plan).linears}


def pruned_of(plan: Plan) -> dict[str, Tensor]:
    """(out, in) bool by linear: the zeros of the output."""
    tensors = stored(plan.resolve(plan.run.output))
    return {
        name: (tensors[key].T if transposed else tensors[key]) == 0
        for name, (key, transposed) in linears_of(plan).items()
    }


def calibration_ids(folder: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer((folder / "text.txt").read_text())["input_ids"]
    return torch.tensor(ids[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH)


# --- the independent pipeline -----------------------------------------------------------------------------------------


def lowest_share(scores: Tensor, sparsity: float) -> Tensor:
    """True at the floor(share · n) lowest scores of each row."""
    return scores.argsort(dim=1, stable=True).argsort(1) < math.floor(sparsity * scores.shape[1] + 1e-9)


def two_of_four(scores: Tensor) -> Tensor:
    groups = scores.view(scores.shape[0], -1, 4)
    return (groups.argsort(-1).argsort(-1) < 2).view_as(scores)


def brute_choice(kind: str, weight: Tensor, squares: Tensor) -> Tensor:
    """The entries to prune of a weight (out, in); `squares` (in,) sums x²."""
    scores = weight.abs() * squares.sqrt() if kind.startswith("wanda") else weight.abs()
    if kind.endswith("2:4"):
        return two_of_four(scores)
    return (
        lowest_share(scores.reshape(1, -1), 0.4).view_as(scores) if kind == "magnitude" else lowest_share(scores, 0.4)
    )


@torch.no_grad()
def brute(folder: Path, kind: str, refresh: str) -> dict[str, Tensor]:
    """State dict of the pruned model: everything in memory, the whole model run anew for every statistic."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    architecture, ids = architecture_for(model.config.model_type), calibration_ids(folder)
    for block in model.get_submodule(architecture.blocks):
        subsets = architecture.subsets
        for group in subsets if refresh == "subset" else [tuple(name for subset in subsets for name in subset)]:
            squares: dict[str, Tensor] = {}

            def keep(name: str, squares: dict[str, Tensor] = squares) -> Any:
                def hook(_: Any, args: tuple[Tensor, ...]) -> None:
                    squares[name] = args[0].flatten(0, -2).square().sum(0)

                return hook

            handles = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in group]
            model(ids, use_cache=False)
            for handle in handles:
                handle.remove()
            for name in group:
                parameter = block.get_submodule(name).weight
                weight = parameter.T if name in architecture.transposed else parameter
                weight.masked_fill_(brute_choice(kind, weight, squares[name]), 0.0)
    return model.state_dict()


def each_family(*wanted: tuple[str, str], slow: tuple[tuple[str, str], ...]) -> Any:
    """Families × (pass, refresh)."""
    cases = [pytest.param(family, *one, id="-".join([family, *one])) for family in FAMILIES for one in wanted]
    cases += [
        pytest.param(family, *one, id="-".join([family, *one]), marks=pytest.mark.slow)
        for family in FAMILIES
        for one in slow
    ]
    return pytest.mark.parametrize(("family", "kind", "refresh"), cases)


@each_family(
    ("wanda", "subset"),
    ("wanda-2:4", "block"),
    slow=(("wanda", "block"), ("wanda-2:4", "subset"), ("magnitude", "block"), ("magnitude-2:4", "block")),
)
def test_emitted_weights_are_those_of_the_independent_pipeline(
    tmp_path: Path, family: str, kind: str, refresh: str
) -> None:
    tiny_directory(tmp_path / "model", family, blocks=2, tied=False, seed=1)
    compress.run(plan_of(tmp_path, PASSES[kind], refresh=refresh))
    emitted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = brute(tmp_path, kind, refresh)
    assert emitted.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(emitted[name], tensor), name


@each_family(
    ("sparsegpt-2:4", "subset"),
    ("magnitude-row", "block"),
    slow=(("sparsegpt", "block"), ("sparsegpt", "subset"), ("sparsegpt-2:4", "block")),
)
def test_masks_lie_along_the_inputs_and_the_rest_is_untouched(
    tmp_path: Path, family: str, kind: str, refresh: str
) -> None:
    tiny_directory(tmp_path / "model", family, blocks=2, dtype=torch.bfloat16, max_shard_size="30KB")
    plan = plan_of(tmp_path, PASSES[kind], refresh=refresh)
    report = compress.run(plan)
    before, after = stored(tmp_path / "model"), stored(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    linears = linears_of(plan)
    compressed = {key for key, _ in linears.values()}
    assert all(same_bits(before[name], after[name]) for name in before if name not in compressed)
    for name, pruned in pruned_of(plan).items():
        if kind == "sparsegpt-2:4":
            assert bool((pruned.unflatten(1, (-1, 4)).sum(-1) == 2).all()), name
        elif kind == "magnitude-row":
            assert bool((pruned.sum(1) == math.floor(0.4 * pruned.shape[1])).all()), name
        else:
            assert int(pruned.sum()) == math.floor(0.4 * pruned.numel()), name
    lines = {line.linear: line for line in report.linears}
    assert lines.keys() == linears.keys()
    assert all(lines[name].sparsity == pytest.approx(p.float().mean()) for name, p in pruned_of(plan).items())
    if kind.startswith("sparsegpt"):  # kept weights have moved, and that has helped
        name, (key, _) = next(iter(linears.items()))
        kept = after[key] != 0
        assert not torch.equal(before[key][kept], after[key][kept])
        assert all(line.error_after < line.sparsity for line in report.linears)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_that_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    tiny_directory(tmp_path / "model", family, dtype=torch.float16)
    text = str(tmp_path / "text.txt")
    evaluate = compress.Evaluate(perplexity=text, window=40, windows=20)
    report = compress.run(plan_of(tmp_path, PASSES["sparsegpt-2:4"], evaluate=evaluate))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")((tmp_path / "text.txt").read_text())["input_ids"]
    windows = torch.tensor(ids[: 20 * 40]).view(20, 40)
    (line,) = report.evaluation
    for directory, score in (("out", line.compressed), ("model", line.dense)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / directory, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(windows, use_cache=False).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        assert score is not None
        assert score.nll == pytest.approx(float(loss), rel=2e-6)


# --- several passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_passes_of_one_sweep_share_one_gram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refresh: str) -> None:
    tiny_directory(tmp_path / "model", "llama")
    made: list[Statistics] = []

    class Counted(Moments):
        def __init__(self, in_features: int, statistics: Statistics, *device: torch.device) -> None:
            made.append(statistics)
            super().__init__(in_features, statistics, *device)

    monkeypatch.setattr(collect, "Moments", Counted)
    plan = plan_of(tmp_path, Wanda(sparsity=0.3), SparseGPT(pattern="2:4"), refresh=refresh)
    assert compile_plan(plan).sweeps == ((0, 1),)
    report = compress.run(plan)
    assert made.count(Statistics.GRAM) == 3 * 4  # blocks × subsets
    assert made.count(Statistics.NORMS) == 0
    assert len(report.linears) == 2 * 21
    assert {line.tokens for line in report.linears} == {SAMPLES * LENGTH}
    for name, pruned in pruned_of(plan).items():
        groups = pruned.unflatten(1, (-1, 4)).sum(-1)
        assert bool((groups >= 2).all()), name
        wanda, sparse = [line.sparsity for line in report.linears if line.linear == name]
        assert (wanda, sparse) == (
            pytest.approx(math.floor(0.3 * pruned.shape[1]) / pruned.shape[1]),
            pytest.approx(float(pruned.float().mean())),
        )


def full_sort(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """The lowest |w| of all, ties by order: masks of the pruned."""
    flat = torch.cat([weight.float().abs().flatten() for weight in weights])
    pruned = torch.zeros_like(flat, dtype=torch.bool)
    pruned[flat.argsort(stable=True)[: math.floor(sparsity * len(flat))]] = True
    parts = pruned.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_global_magnitude_is_a_sort_of_the_whole_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    tiny_directory(tmp_path / "model", family, dtype=dtype)
    plan = plan_of(tmp_path, Magnitude(sparsity=0.37, scope="global"))
    compress.run(plan)
    before = stored(tmp_path / "model")
    weights = [before[key].T if transposed else before[key] for key, transposed in linears_of(plan).values()]
    for found, wanted in zip(pruned_of(plan).values(), full_sort(weights, 0.37), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("first", [Wanda(sparsity=0.2), SparseGPT(sparsity=0.2)], ids=["wanda", "sparsegpt"])
def test_a_second_sweep_goes_on_from_the_first(tmp_path: Path, first: Pass) -> None:
    tiny_directory(tmp_path / "model", "llama", dtype=torch.float16)
    both = plan_of(tmp_path, first, Magnitude(sparsity=0.5, scope="global"), output="both")
    assert compile_plan(both).sweeps == ((0,), (1,))
    report = compress.run(both)
    one = plan_of(tmp_path, first, output="one")
    compress.run(one)
    start, end = stored(tmp_path / "one"), stored(tmp_path / "both")
    keys = [key for key, _ in linears_of(both).values()]
    for key, pruned in zip(keys, full_sort([start[key] for key in keys], 0.5), strict=True):
        assert torch.equal(end[key], start[key].masked_fill(pruned, 0.0))
    assert [(block.sweep, block.index) for block in report.blocks] == [(s, i) for s in (0, 1) for i in range(3)]


def test_a_calibrated_second_sweep_sees_the_first_ones_model(tmp_path: Path) -> None:
    """The sweep of a global magnitude and Wanda, alone on what an earlier sweep has emitted."""
    tiny_directory(tmp_path / "model", "llama")
    first, rest = Magnitude(sparsity=0.2), (Magnitude(sparsity=0.3, scope="global"), Wanda(sparsity=0.5))
    compress.run(plan_of(tmp_path, first, output="start"))
    chained = plan_of(tmp_path, first, *rest)
    assert compile_plan(chained).sweeps == ((0,), (1, 2))
    compress.run(chained)
    shutil.move(tmp_path / "model", tmp_path / "dense")
    shutil.copytree(tmp_path / "start", tmp_path / "model")
    compress.run(plan_of(tmp_path, *rest, output="apart"))
    found, wanted = stored(tmp_path / "out"), stored(tmp_path / "apart")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_padding_enters_no_statistic(tmp_path: Path, family: str, refresh: str) -> None:
    tiny_directory(tmp_path / "model", family)
    (tmp_path / "text.txt").write_text(some_text(1200, seed=3))  # paragraphs of 3 to 20 words
    found = []
    for pad in ("<pad>", "</s>", "k"):
        write_tokenizer(tmp_path / "model", pad=pad)
        calibration = {"packing": "documents", "samples": 50, "length": 24}
        output = f"out-{pad[-2:]}"
        plan = plan_of(tmp_path, PASSES["sparsegpt"], output=output, refresh=refresh, calibration=calibration)
        report = compress.run(plan)
        assert report.calibration is not None
        assert report.calibration.tokens < 50 * 24
        assert {line.tokens for line in report.linears} == {report.calibration.tokens}
        found.append((tmp_path / output / "model.safetensors").read_bytes())
    assert len(set(found)) == 1


def test_padding_gives_the_statistics_of_the_bare_rows(tmp_path: Path) -> None:
    """Wanda on padded documents equals Wanda by hooks on each document alone."""
    tiny_directory(tmp_path / "model", "llama", blocks=1)
    (tmp_path / "text.txt").write_text(some_text(600, seed=4))
    calibration = {"packing": "documents", "samples": 30, "length": 24}
    plan = plan_of(tmp_path, PASSES["wanda"], calibration=calibration, refresh="block")
    compress.run(plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    squares: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + args[0].flatten(0, -2).square().sum(0)

        return hook

    for name in linears_of(plan):
        model.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.no_grad():
        for paragraph in (tmp_path / "text.txt").read_text().split("\n\n")[:30]:
            model(torch.tensor([tokenizer(paragraph)["input_ids"][:24]]), use_cache=False)
    for name, pruned in pruned_of(plan).items():
        assert torch.equal(pruned, brute_choice("wanda", model.get_submodule(name).weight.detach(), squares[name]))


def test_without_calibration_no_forward_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_directory(tmp_path / "model", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a forward ran")

    monkeypatch.setattr(Skeleton, "_record", forbidden)
    monkeypatch.setattr(torch.nn.Linear, "forward", forbidden)
    plan = compress.Plan(
        model=compress.Model(path=str(tmp_path / "model")),
        run=compress.Run(output=str(tmp_path / "out")),
        passes=[Magnitude(sparsity=0.5), Magnitude(sparsity=0.6, scope="global")],
    )
    report = compress.run(plan)
    assert report.calibration is None
    assert report.output.linear_sparsity == pytest.approx(0.6, abs=1e-3)


def test_where_and_except_reach_the_output(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama")
    plan = plan_of(
        tmp_path,
        Wanda(
            sparsity=0.5,
            **{"except": ["*.layers.0.*", "*.v_proj"]},
            where=[{"match": "*.1.mlp.down_proj", "sparsity": 0.25}, {"match": "*.2.mlp.down_proj", "pattern": "1:4"}],
        ),
        refresh="subset",
    )
    report = compress.run(plan)
    before, after = stored(tmp_path / "model"), stored(tmp_path / "out")
    for name, pruned in pruned_of(plan).items():
        if ".layers.0." in name or name.endswith("v_proj"):
            assert same_bits(before[f"{name}.weight"], after[f"{name}.weight"])
            assert name not in {line.linear for line in report.linears}
            continue
        share = {"layers.2.mlp.down_proj": 0.75, "layers.1.mlp.down_proj": 0.25}.get(name.removeprefix("model."), 0.5)
        assert bool((pruned.sum(1) == share * pruned.shape[1]).all()), name
    lock = json.loads((tmp_path / "out" / "lock.json").read_text())
    entry = next(e for e in lock["linears"] if e["name"] == "model.layers.2.mlp.down_proj")
    assert entry["passes"][0]["pattern"] == "1:4"


def test_the_last_where_replaces_a_sparsity_by_a_pattern(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama")
    where = [{"match": "*.down_proj", "sparsity": 0.25}, {"match": "*.2.mlp.down_proj", "pattern": "1:4"}]
    plan = plan_of(tmp_path, Wanda(sparsity=0.5, where=where))
    compress.run(plan)
    shares = {name: float(pruned.float().mean()) for name, pruned in pruned_of(plan).items()}
    assert shares["model.layers.2.mlp.down_proj"] == 0.75
    assert shares["model.layers.1.mlp.down_proj"] == 0.25


def test_check_can_be_called_twice(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama")
    plan = plan_of(tmp_path, PASSES["wanda"])
    compress.check(plan)
    compress.check(plan)


@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_a_memory_limit_changes_how_but_not_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refresh: str) -> None:
    tiny_directory(tmp_path / "model", "llama")
    monkeypatch.setattr(estimate, "resident_memory", lambda: 0)
    passes = (Wanda(sparsity=0.2), SparseGPT(pattern="2:4"), Magnitude(sparsity=0.6, scope="global"))

    def plan(output: str, **more: Any) -> Plan:
        calibration = {"samples": 180, "length": 24}  # more than two batches
        return plan_of(tmp_path, *passes, output=output, refresh=refresh, calibration=calibration, **more)

    (tmp_path / "text.txt").write_text(some_text(6000))
    lock = compile_plan(plan("out"))
    wishes = [(True, True), (True, False), (False, False)][refresh == "block" :]  # then there is nothing to wait for
    peaks = [max(estimate.memory(lock, keep=keep, pause=pause).values()) for keep, pause in wishes]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(wishes)
    found = []
    for number, peak in enumerate(peaks):
        limited = plan(f"out-{number}", memory=peak)
        shown = compress.check(limited)
        assert (shown["activations"] == "memory", shown["pausing"]) == wishes[number]
        assert compress.run(limited).estimated_memory_bytes == peak
        found.append((tmp_path / f"out-{number}" / "model.safetensors").read_bytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_runs_give_the_same_bytes(tmp_path: Path, family: str) -> None:
    tiny_directory(tmp_path / "model", family)
    plan = plan_of(
        tmp_path,
        SparseGPT(sparsity=0.5, least_squares=True),
        refresh="subset",
        evaluate=compress.Evaluate(perplexity=str(tmp_path / "text.txt"), window=32, windows=9),
        calibration={"selection": "random"},
    )
    compress.run(plan)
    (tmp_path / "out").rename(tmp_path / "first")
    compress.run(plan)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "out")


def test_the_same_plan_again_returns_the_finished_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_directory(tmp_path / "model", "llama")
    plan = plan_of(tmp_path, PASSES["wanda"])
    report = compress.run(plan)
    monkeypatch.setattr(pipeline, "Execution", None)
    again = compress.run(plan)
    assert again.output == report.output
    assert again.linears == report.linears


def test_unknown_tensors_and_side_files_are_copied(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "gpt2")
    path = tmp_path / "model" / "model.safetensors"
    odd = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).tril(), "odd": torch.arange(3), "bit": torch.ones(1) > 0}
    save_file(load_file(path) | odd, path, metadata={"format": "pt"})
    (tmp_path / "model" / "LICENSE").write_text("as you like")
    (tmp_path / "model" / "notes.pdf").write_text("not a part of a model")
    report = compress.run(plan_of(tmp_path, PASSES["wanda"]))
    assert "3 stored tensors are unknown" in report.warnings[0]
    found = stored(tmp_path / "out")
    assert all(same_bits(found[name], tensor) for name, tensor in odd.items())
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"
    assert not (tmp_path / "out" / "notes.pdf").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_output_in_shards_has_the_size_that_check_said(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama")
    plan = plan_of(tmp_path, PASSES["wanda"])
    plan = compress.Plan(**{**dict(plan), "exports": [compress.Export(shard_size=20_000)]})
    shown = compress.check(plan)
    report = compress.run(plan)
    files = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 3
    assert {file["name"]: file["bytes"] for file in shown["files"]} == files
    index = (tmp_path / "out" / "model.safetensors.index.json").stat().st_size
    assert report.output.bytes == shown["output_bytes"] == sum(files.values()) + index
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# --- failures ---------------------------------------------------------------------------------------------------------


def blow_up(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state["model.layers.1.mlp.up_proj.weight"][:] = 1e38
    return state


def test_an_overflow_is_an_error_that_names_its_place(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama")
    path = tmp_path / "model" / "model.safetensors"
    save_file(blow_up(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.down_proj holds NaN or infinity"):
        compress.run(plan_of(tmp_path, PASSES["wanda"], refresh="subset"))
    assert not (tmp_path / "out").exists()


def revive(self: Magnitude, linear: Any, moments: Any) -> dict[str, Any]:
    linear.mask = None
    return {}


def dirty(self: Magnitude, linear: Any, moments: Any) -> dict[str, Any]:
    linear.mask = torch.zeros_like(linear.weight, dtype=torch.bool)
    return {}


def endless(self: Magnitude, linear: Any, moments: Any) -> dict[str, Any]:
    linear.weight = linear.weight / 0
    return {}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (revive, "pruned weights came back"),
        (dirty, "a pruned weight is not zero"),
        (endless, "NaN or infinity"),
        (lambda *_: {}, "a group holds more than 2:4 allows"),
    ],
)
def test_a_pass_that_breaks_its_promise_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], message: str
) -> None:
    tiny_directory(tmp_path / "model", "llama")
    monkeypatch.setattr(Magnitude, "apply", fault)
    with pytest.raises(RunError, match=message):
        compress.run(plan_of(tmp_path, Wanda(sparsity=0.2), Magnitude(pattern="2:4")))
    assert not (tmp_path / "out").exists()


def test_the_report_counts_what_is_in_the_files(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama")
    plan = plan_of(tmp_path, PASSES["wanda-2:4"])
    report: Report = compress.run(plan)
    zeros = sum(int(pruned.sum()) for pruned in pruned_of(plan).values())
    weights = sum(pruned.numel() for pruned in pruned_of(plan).values())
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())
    assert report.output.parameters == report.model.parameters == parameters
    assert report.output.nonzero_parameters == parameters - zeros
    assert report.output.linear_sparsity == pytest.approx(zeros / weights) == 0.5
    assert report.verified.tensors == len(stored(tmp_path / "out"))


def test_progress_says_what_is_pruned_of_a_block(tmp_path: Path) -> None:
    """After the last pass of each linear, each weight counted once."""
    tiny_directory(tmp_path / "model", "llama")
    plan, told = plan_of(tmp_path, Magnitude(sparsity=0.25), Magnitude(sparsity=0.75, match="*.mlp.*")), io.StringIO()
    compress.run(plan, progress=Progress(Console(file=told, width=200)))
    inside = [pruned for name, pruned in pruned_of(plan).items() if ".layers.0." in name]
    share = sum(int(pruned.sum()) for pruned in inside) / sum(pruned.numel() for pruned in inside)
    assert re.findall(r"block 1/\d.*pruned (\S+)", told.getvalue()) == [f"{share:.1%}"]
