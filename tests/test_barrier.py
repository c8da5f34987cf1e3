"""Passes over the whole model: the model is transformers' own, and whatever stops a run, the bytes are the same."""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compress
from compress.adapting import AdaptedLinear
from compress.barrier import WholeModel, build
from compress.compiling import compile_plan
from compress.errors import RunError
from compress.journal import Workspace
from compress.passes import GPTQ, PERP, EoRA, Invariant, ModelPass, Note, SparseGPT, Wanda
from compress.sweep import Sweep
from compress.training_store import TrainingStore
from tests.conftest import some_text, tiny_directory, write_tokenizer
from tests.crash import entries_of
from tests.models import FAMILIES, save_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SHORT: dict[str, Any] = {"steps": 4, "evaluate_every": 2, "batch_size": 2, "holdout": 0.0, "patience": 9}


def plan_of(folder: Path, *passes: Any, output: str = "out", samples: int = 8) -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=samples, length=16),
        run=compress.Run(output=str(folder / output)),
        passes=passes,
    )


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def ids_of(rows: int = 2) -> Tensor:
    return torch.randint(3, 60, (rows, 16), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids_of()).logits


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_that_transformers_loads(tmp_path: Path, family: str, tied: bool) -> None:
    tiny_directory(tmp_path / "model", family, tied=tied, blocks=2)
    lock = compile_plan(plan_of(tmp_path, Wanda(sparsity=0.5)))
    built = build(lock, torch.device("cpu"), {})
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits_of(built), logits_of(wanted))
    assert not any(p.requires_grad for p in built.parameters())
    head, embedding = (built.get_parameter(name) for name in (lock.skeleton.head, lock.skeleton.embedding))
    assert (head is embedding) == (wanted.get_output_embeddings().weight is wanted.get_input_embeddings().weight)


def test_values_take_the_place_of_the_file(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "llama", blocks=2)
    lock = compile_plan(plan_of(tmp_path, Wanda(sparsity=0.5)))
    values = {
        name: torch.full(lock.skeleton.shapes[name], 0.5) for name in ("model.norm.weight", lock.skeleton.embedding)
    }
    built = dict(build(lock, torch.device("cpu"), values).named_parameters(remove_duplicate=False))
    changed = {name for name, p in built.items() if bool((p == 0.5).all())}
    assert changed == {*values, lock.skeleton.head}  # which is tied


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_whose_file_holds_both(tmp_path: Path, equal: bool) -> None:
    """transformers ties them where they are equal and only there; a training keeps it so."""
    save_tiny(tmp_path / "model", "llama", tied=True, gqa=True, blocks=2)
    write_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(some_text(3000))
    tensors = weights_of(tmp_path / "model")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + (0.0 if equal else 0.25)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(tmp_path, Wanda(sparsity=0.5), PERP(train=("embeddings",), **SHORT))
    built = build(compile_plan(plan), torch.device("cpu"), {})
    assert torch.equal(logits_of(built), logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()))
    compress.run(plan)
    found = weights_of(tmp_path / "out")
    assert not torch.equal(found["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    if equal:
        assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    else:
        assert torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])


class Look(ModelPass):
    """Changes nothing; tells what it saw."""

    rule: ClassVar[int] = 4
    preserves: ClassVar[frozenset[Invariant]] = frozenset(Invariant)
    seen: ClassVar[list[Any]] = []

    def learns(self) -> bool:
        return True

    def apply_model(self, model: WholeModel) -> dict[str, Note]:
        self.seen.append({"logits": model.logits(ids_of())[0], "states": set(model.states), "tokens": model.tokens})
        self.seen[-1]["dense"] = model.logits(ids_of(), of=model.dense())[0]
        self.seen[-1]["adapted"] = {n for n, m in model.module.named_modules() if isinstance(m, AdaptedLinear)}
        return {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_it_sees_what_the_sweeps_before_it_made(tmp_path: Path, family: str) -> None:
    """Masks, codes and branches, as they are emitted; and the dense model beside it."""
    tiny_directory(tmp_path / "model", family, blocks=2)
    Look.seen.clear()
    steps = [SparseGPT(pattern="2:4"), GPTQ(bits=4, group_size=16), EoRA(rank=2)]
    compress.run(plan_of(tmp_path, *steps, Look()))
    (seen,) = Look.seen
    assert torch.equal(seen["dense"], logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()))
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    branches = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, up in branches.items():
            if name.endswith("lora_B.weight"):
                product = up @ branches[name.replace("lora_B", "lora_A")]
                weight = out.get_parameter(name.removeprefix("base_model.model.").replace("lora_B.", ""))
                weight += product.T if family == "gpt2" else product
    assert torch.allclose(seen["logits"], logits_of(out), rtol=1e-4, atol=1e-5)
    compress.run(plan_of(tmp_path, *steps, output="without"))
    assert weights_of(tmp_path / "out").keys() == weights_of(tmp_path / "without").keys()
    assert all(torch.equal(weights_of(tmp_path / "out")[n], w) for n, w in weights_of(tmp_path / "without").items())


def test_it_works_on_what_its_patterns_name(folder: Path) -> None:
    Look.seen.clear()
    report = compress.run(plan_of(folder, Wanda(sparsity=0.5), Look(match="*.q_proj", except_="*.1.*")))
    name = "model.layers.0.self_attn.q_proj"
    assert Look.seen[0]["states"] == {name}
    assert [line.linear for line in report.linears if line.pass_index == 1] == [name]


# ---------------------------------------------------------------- stopped, and gone on


class Interrupted(BaseException):
    pass


# Every kind of sweep, and what is trained is of every kind: outside the blocks, in them, beside weights.
STEPS = [
    SparseGPT(pattern="2:4"),
    PERP(train=("norms", "embeddings"), **SHORT),
    GPTQ(bits=4, group_size=16),
    EoRA(rank=3, budget=1200),
    PERP(train=("norms", "low_rank"), **(SHORT | {"holdout": 0.25})),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model and text, and in reference/ the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("barrier")
    tiny_directory(folder / "model", "llama", blocks=2, dtype=torch.float16)
    compress.run(plan_of(folder, *STEPS))
    (folder / "out").rename(folder / "reference")
    return folder


@pytest.fixture
def stopped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Runs until the journal has so many lines; returns the work directory."""

    def until(lines: int) -> Path:
        for path in (tmp_path / "out", tmp_path / ".out.compress"):
            shutil.rmtree(path, ignore_errors=True)
        original, count = Workspace._commit, [0]

        def commit(self: Any, *arguments: Any) -> None:
            if count[0] == lines:
                raise Interrupted
            original(self, *arguments)
            count[0] += 1

        with monkeypatch.context() as patch:
            patch.setattr(Workspace, "_commit", commit)
            with pytest.raises(Interrupted):
                again(tmp_path)
        return tmp_path / ".out.compress"

    for name in ("model", "text.txt"):
        (tmp_path / name).symlink_to(source / name)
    return until


def again(folder: Path) -> Any:
    plan = plan_of(folder, *STEPS)
    return compress.run(plan)


def everything(directory: Path) -> dict[str, bytes]:
    """The files that must be the same, those in the adapter's folder too; but the plan, which names another folder."""
    adapter = {path.name: path.read_bytes() for path in (directory / "adapter").iterdir()}
    top = {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}
    return top | adapter


def kinds(work: Path) -> list[str]:
    """What each line of a journal is."""
    return [entry["kind"] for entry in entries_of(work)]


# What the journal of STEPS holds, line by line: after the start, the sweep of sparsegpt, and so on.
LINES = ["begin", "threads", "calibration", "block", "block"]
LINES += [*["training"] * 2, "outside", "block", "block"]
LINES += ["block", "block", "ranks"]
LINES += [*["training"] * 2, "outside", "block", "block"]


@pytest.mark.parametrize("lines", [6, 7, 8, 9, 12, 14, 17])
def test_a_stopped_run_goes_on_with_the_same_bytes(source: Path, stopped: Callable[[int], Path], lines: int) -> None:
    """Within a training, before and after it commits what is outside the blocks, or a block; before ranks are dealt."""
    work = stopped(lines)
    assert kinds(work) == LINES[:lines]
    report = again(work.parent)
    assert report.resumed == 1
    assert everything(work.parent / "out") == everything(source / "reference")
    assert not work.exists()


@pytest.mark.slow
def test_stopped_before_every_line_of_the_journal(source: Path, stopped: Callable[[int], Path]) -> None:
    for lines in range(len(LINES)):
        work = stopped(lines)
        again(work.parent)
        assert everything(work.parent / "out") == everything(source / "reference"), lines
        assert not work.exists()


def test_stopped_at_every_line_in_turn(source: Path, stopped: Callable[[int], Path], monkeypatch: Any) -> None:
    """A run that dies at its third line, again and again, from the first training on."""
    work, deaths = stopped(5), 0
    original = Workspace._commit
    while work.exists():
        count = [0]

        def commit(self: Any, *arguments: Any, count: list[int] = count) -> None:
            if count[0] == 3:
                raise Interrupted
            original(self, *arguments)
            count[0] += 1

        with monkeypatch.context() as patch, suppress(Interrupted):
            patch.setattr(Workspace, "_commit", commit)
            again(work.parent)
        deaths += work.exists()
        assert deaths < 20
    assert deaths > 3
    assert everything(work.parent / "out") == everything(source / "reference")


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("which", ["newest", "both", "gone"])
def test_damaged_states_of_a_training(
    source: Path, stopped: Callable[[int], Path], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before the newest is taken, or the training starts over; the bytes are the same."""
    work = stopped(7)
    files = sorted(work.glob("training-*"))
    assert len(files) == 2
    entries = entries_of(work)[-2:]
    assert {entry["file"] for entry in entries} == {path.name for path in files}
    for path in files if which == "both" else [work / entries[-1]["file"]]:
        damage(path)
    if which == "gone":
        (work / entries[-1]["file"]).unlink()
    found = []
    original = TrainingStore.load

    def load(self: TrainingStore) -> Any:
        found.append(original(self))
        return found[-1]

    monkeypatch.setattr(TrainingStore, "load", load)
    again(work.parent)
    assert (found[0] is None) == (which == "both")
    if found[0] is not None:
        assert found[0][1]["step"] == 2 == entries[0]["numbers"]["step"]
    assert everything(work.parent / "out") == everything(source / "reference")


@pytest.mark.parametrize("name", ["outside-1-00000", "block-1-00000", "block-1-00001"])
def test_damaged_results_are_made_again(
    source: Path, stopped: Callable[[int], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their training, and nothing behind it."""
    work = stopped(11)
    damage(work / f"{name}.safetensors")
    blocks: list[tuple[int, int]] = []
    original = Sweep._block

    def note(self: Sweep, index: int, *arguments: Any) -> Any:
        blocks.append((self.number, index))
        return original(self, index, *arguments)

    monkeypatch.setattr(Sweep, "_block", note)
    again(work.parent)
    assert blocks == [(2, 1)]
    assert everything(work.parent / "out") == everything(source / "reference")


def test_a_training_that_ends_otherwise_is_not_mixed_with_what_it_was(
    source: Path, stopped: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = stopped(11)
    damage(work / "block-1-00001.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("compress.barrier.write_shard", lambda *_: "0" * 64)
        with pytest.raises(RunError, match="could not be made again"):
            again(work.parent)
    assert {entry.get("sweep", 0) for entry in entries_of(work)} == {0}
    again(work.parent)
    assert everything(work.parent / "out") == everything(source / "reference")


def test_no_state_stays_when_a_training_is_done(stopped: Callable[[int], Path]) -> None:
    assert len(list(stopped(9).glob("training-1-*"))) == 2
    assert not list(stopped(11).glob("training-1-*"))
