"""The estimate refuses what cannot fit, and grows with what is asked for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import compress
from compress import estimate
from compress.calibration.tokenizer import load_tokenizer
from compress.calibration.tokens import eval_stream
from compress.compiling import compile_plan
from compress.errors import PlanError
from compress.estimate import choose_mode, find_device, memory
from compress.memory import peak_memory, reset_peak_memory, resident_memory
from compress.passes import GPTQ, PEQA, PERP, RTN, EoRA, LoRAPrune, LQLoRA, Magnitude, SparseGPT, Wanda, WidthPruning
from compress.training_store import TrainingStore
from tests.conftest import tiny_directory

if TYPE_CHECKING:
    from compress.lock import Lock
    from compress.passes import Pass

REFERENCE = Path(__file__).parents[1] / "examples" / "reference"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(estimate, "resident_memory", lambda: 0)
    return tiny_directory(tmp_path / "model", "llama")


def lock_of(
    model: Path, *passes: Pass, samples: int = 200, length: int = 32, evaluated: bool = False, **run: Any
) -> Lock:
    text = str(model.parent / "text.txt")
    return compile_plan(
        compress.Plan(
            model=compress.Model(path=str(model)),
            calibration=compress.Calibration(source=text, samples=samples, length=length),
            run=compress.Run(output=str(model.parent / "out"), **run),
            passes=passes or (SparseGPT(pattern="2:4"),),
            evaluate=compress.Evaluate(perplexity=text) if evaluated else None,
        )
    )


def test_an_impossible_memory_is_refused(model: Path) -> None:
    lock = lock_of(model, memory="10MiB")
    with pytest.raises(PlanError, match=r"the run needs .* more than memory = ") as caught:
        choose_mode(lock)
    assert "run.memory" in str(caught.value)
    with pytest.raises(PlanError, match="more than memory"):
        compress.run(lock.plan)
    assert sorted(p.name for p in model.parent.iterdir()) == ["model", "text.txt"]


@pytest.mark.parametrize(
    ("phase", "fix"),
    [
        ("blocks", "calibrate on fewer or shorter samples"),
        ("self-calibration", "calibrate on a text instead"),
        ("training", "give the pass a smaller batch_size"),
        ("verification", "allow more memory"),
        ("evaluation", "leave evaluate.perplexity out"),
        ("tasks", "leave evaluate.tasks and the gate out"),
    ],
)
def test_the_largest_phase_says_what_makes_it_smaller(
    phase: str, fix: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.estimate.memory", lambda *_: {"embedding": 1, phase: 20 << 20})
    with pytest.raises(PlanError, match=rf"needs 20.00 MiB \({phase}\)") as caught:
        choose_mode(lock_of(model, memory="10MiB"))
    assert str(caught.value.fix).endswith(fix) or f", or {fix}" in str(caught.value.fix)


@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_the_fastest_mode_that_fits_is_chosen(model: Path, refresh: str) -> None:
    """Pausing serves only statistics that are collected subset by subset."""
    lock = lock_of(model, refresh=refresh)
    wishes = [(True, True, True), (True, False, True), (False, False, True), (False, False, False)]
    wishes = wishes[0 if refresh == "subset" else 1 :]
    peaks = [max(memory(lock, *wish).values()) for wish in wishes]
    assert peaks == sorted(set(peaks), reverse=True)
    for wish, peak in zip(wishes, peaks, strict=True):
        mode = choose_mode(lock_of(model, refresh=refresh, memory=peak))
        assert ((mode.keep, mode.pause, mode.overlap), mode.peak) == (wish, peak)
    with pytest.raises(PlanError):
        choose_mode(lock_of(model, refresh=refresh, memory=peaks[-1] - 1))


def test_without_a_limit_a_full_machine_gets_the_leanest(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_available", lambda _: 1)
    mode = choose_mode(lock_of(model))
    assert (mode.keep, mode.pause) == (False, False)


@pytest.mark.parametrize("one", [SparseGPT(pattern="2:4"), Wanda(sparsity=0.5)], ids=["gram", "norms"])
@pytest.mark.parametrize(("keep", "pause"), [(True, True), (True, False), (False, False)])
def test_no_phase_shrinks_with_more_samples(model: Path, one: Pass, keep: bool, pause: bool) -> None:
    phases = [memory(lock_of(model, one, samples=samples), keep=keep, pause=pause) for samples in (1, 8, 64, 512, 4096)]
    for less, more in pairwise(phases):
        assert less.keys() == more.keys()
        assert all(less[name] <= more[name] for name in less)
    if keep:
        assert phases[0]["blocks"] < phases[-1]["blocks"]
        per_sample = (phases[-1]["blocks"] - phases[-2]["blocks"]) / (4096 - 512)
        assert per_sample >= 4 * 32 * 32  # float32 × length × hidden


def test_no_phase_shrinks_with_longer_samples(model: Path) -> None:
    phases = [memory(lock_of(model, length=length), keep=True, pause=True) for length in (2, 8, 32, 64)]
    for less, more in pairwise(phases):
        assert less["blocks"] <= more["blocks"]


def test_on_disk_memory_does_not_depend_on_the_number_of_samples(model: Path) -> None:
    few, many = (memory(lock_of(model, samples=samples), keep=False, pause=False) for samples in (5_000, 500_000))
    assert few == many


def test_a_gram_matrix_costs_memory(model: Path) -> None:
    lean, norms, gram = (
        memory(lock_of(model, one, samples=1, length=2), keep=False, pause=False)["blocks"]
        for one in (Magnitude(sparsity=0.5), Wanda(sparsity=0.5), SparseGPT(sparsity=0.5))
    )
    assert lean <= norms < gram


def test_without_calibration_there_are_no_activations(model: Path) -> None:
    lock = lock_of(model, Magnitude(sparsity=0.5), samples=10_000)
    phases = memory(lock, keep=True, pause=True)
    assert phases == memory(lock, keep=False, pause=False)
    assert "embedding" not in phases


def test_fisher_information_is_a_phase_and_a_file(model: Path) -> None:
    plain, weighed = (lock_of(model, LQLoRA(group_size=8, rank=2, fisher=fisher)) for fisher in (False, True))
    phases = memory(weighed, keep=True, pause=True)
    weights = sum(linear.weights for linear in weighed.linears)
    assert phases["fisher"] > estimate.LATER_IMPORTS + 8 * weights  # the model and the sums
    assert "fisher" not in memory(plain, keep=True, pause=True)
    assert estimate.disk_bytes(weighed) - estimate.disk_bytes(plain) >= 4 * weights


def test_a_reconstruction_holds_all_inputs_wherever_activations_are(model: Path) -> None:
    one = PERP(mode="reconstruct", **QUICK)
    for keep in (False, True):
        few, many = (
            memory(lock_of(model, Magnitude(sparsity=0.5), one, samples=samples), keep=keep, pause=False)[
                "reconstruction"
            ]
            for samples in (1000, 3000)
        )
        assert many - few >= 2 * 4 * 2000 * 32 * 32  # samples of 32 tokens of 32 channels, twice


def test_a_training_keeps_masks_and_the_weights_that_it_makes(model: Path) -> None:
    def training(*passes: Pass) -> int:
        return memory(lock_of(model, *passes), keep=True, pause=True)["training"]

    weights = sum(linear.weights for linear in lock_of(model).linears)
    prune, codes = Wanda(sparsity=0.5), RTN(bits=4, group_size=8)
    fixed = training(prune, PERP(train=("norms",), **QUICK))
    masklora = training(prune, PERP(train=("low_rank",), variant="masklora", **QUICK))
    assert training(prune, codes, PEQA(**QUICK)) - training(codes, PEQA(**QUICK)) == weights
    assert masklora - fixed > 4 * weights
    assert training(codes, PEQA(**QUICK)) > 4 * 5 * weights  # model, dense, current, steps, what a forward makes


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (EoRA(rank=1), EoRA(rank=4)),
        (GPTQ(group_size=8), GPTQ(group_size=8, rescale=True)),
        (SparseGPT(pattern="2:4"), SparseGPT(pattern="2:4", least_squares=True)),
        (WidthPruning(channels=0.5, multiple=8, score="flap"), WidthPruning(channels=0.5, multiple=8)),
    ],
    ids=["eora", "rescale", "least_squares", "width"],
)
def test_what_a_solution_needs_beside_the_factor_counts(model: Path, less: Pass, more: Pass) -> None:
    small, large = (memory(lock_of(model, one, samples=1, length=2), keep=True, pause=False) for one in (less, more))
    assert small["blocks"] < large["blocks"]


def test_evaluation_is_a_phase(model: Path) -> None:
    without, phases = (
        memory(lock_of(model, evaluated=evaluated), keep=True, pause=True) for evaluated in (False, True)
    )
    assert phases.keys() - without.keys() == {"evaluation"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak")
def test_a_text_to_evaluate_is_held_as_a_whole_while_it_is_tokenized(model: Path) -> None:
    """Also where only a few of its windows are measured."""
    tokenizer, words = load_tokenizer(REFERENCE), "the quick brown fox jumps over the lazy dog. " * 50_000
    lock = lock_of(model, evaluated=True)
    (model.parent / "text.txt").write_text(words)
    start = resident_memory()
    reset_peak_memory()
    eval_stream(words, tokenizer)
    taken = peak_memory(torch.device("cpu")) - start
    assert memory(lock, keep=False, pause=False)["evaluation"] > taken > 100 * len(words)


def test_time_grows_with_samples(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_speed", lambda _: 1e9)
    locks = [lock_of(model, samples=samples) for samples in (8, 80, 800)]
    times = [estimate.seconds(lock, choose_mode(lock)) for lock in locks]
    assert times == sorted(times)
    assert times[0] < times[2]


def test_a_full_disk_is_refused_before_the_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_of(model)
    free = estimate.disk_bytes(lock)

    class Usage:
        pass

    usage = Usage()
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: usage)
    usage.free = free  # type: ignore[attr-defined]
    estimate.check_disk(lock)
    usage.free = free - 1  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="on the disk of its output"):
        compress.run(lock.plan)
    assert not (model.parent / "out").exists()


QUICK: dict[str, Any] = {"steps": 4, "batch_size": 2, "evaluate_every": 1}


@pytest.mark.parametrize(
    "passes",
    [
        (PERP(train=("all",), **QUICK),),
        (PERP(train=("low_rank", "norms", "embeddings", "head"), rank=2, **QUICK),),
        (Magnitude(sparsity=0.5), PERP(train=("weights", "norms"), mode="reconstruct", **QUICK)),
        (RTN(bits=4, group_size=8), PEQA(**QUICK)),
        (LoRAPrune(channels=0.5, multiple=8, rank=2, prune_every=2, **QUICK),),
    ],
    ids=["all", "low_rank", "reconstruct", "peqa", "loraprune"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_disk_holds_what_trainings_keep(
    tmp_path: Path, passes: tuple[Pass, ...], tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two states of each; those of a block go when it is done, so they are seen alone."""
    model = tiny_directory(tmp_path / "model", "llama", tie_word_embeddings=tied)
    lock = lock_of(model, *passes, samples=8)
    kept = []
    save = TrainingStore.save

    def saved(store: TrainingStore, tensors: dict[str, torch.Tensor], numbers: dict[str, float]) -> None:
        save(store, tensors, numbers)
        kept.append(2 * sum(tensor.nbytes for tensor in tensors.values()))

    monkeypatch.setattr(TrainingStore, "save", saved)
    compress.run(lock.plan)
    alone = 2 if getattr(passes[-1], "mode", "") == "reconstruct" else 1
    planned = 2 * estimate._training_state(lock, len(passes) - 1)
    assert 0.97 < planned / (alone * max(kept)) < 1.1  # numbers of steps and means of inputs are not counted
    assert estimate.disk_bytes(lock) > planned + lock.output_bytes


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "is no device"), ("mps", "is not supported"), ("cuda", "no CUDA device")]
)
def test_devices_that_are_not_there(model: Path, monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match=message):
        find_device(lock_of(model, Magnitude(sparsity=0.5), device=device))


def test_check_reads_no_weight(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a weight was read")

    lock = lock_of(model)
    monkeypatch.setattr("compress.checkpoint.read_tensor", forbidden)
    found = compress.check(lock.plan)
    assert found["memory"]["peak_bytes"] == max(found["memory"]["phases"].values())
    assert found["output_bytes"] == sum(file["bytes"] for file in found["files"])


@pytest.mark.slow
def test_the_real_peak_keeps_to_the_estimate(assets: Path, tmp_path: Path) -> None:
    """On the reference model, in a fresh process: other tests would have raised the floor."""
    import json
    import subprocess
    import sys

    plan = f"""
[model]
path = "{assets / "models" / "reference"}"
[calibration]
source = "{assets / "text" / "prose-calibration.txt"}"
samples = 64
length = 256
[run]
output = "{tmp_path / "out"}"
refresh = "subset"
[[pass]]
use = "sparsegpt"
pattern = "2:4"
"""
    (tmp_path / "plan.toml").write_text(plan)
    subprocess.run([sys.executable, "-m", "compress", str(tmp_path / "plan.toml")], check=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["peak_memory_bytes"] <= 1.05 * report["estimated_memory_bytes"]
