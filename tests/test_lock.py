"""The lock: exact bytes, the order of passes, and that no weight is read to make it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import ClassVar

import pytest

from compress.checking import check_plan, explain
from compress.checkpoint import INDEX, Checkpoint
from compress.compiling import compile_plan
from compress.passes import Invariant, LinearPass, LinearState, Moments, Note
from compress.plan import load_plan
from compress.rules import RULES
from tests.conftest import tiny_directory
from tests.models import FAMILIES
from tests.test_cli import PLAN, command, refused

HERE = "tests.test_lock"


class FakeQuantizer(LinearPass):
    """Puts weights on a grid, or says so."""

    rule: ClassVar[int] = 5
    establishes: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID})
    preserves: ClassVar[frozenset[Invariant]] = frozenset(Invariant)

    bits: int = 8

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        return {}


class ScaleTrainer(FakeQuantizer):
    """Needs a grid."""

    rule: ClassVar[int] = 6
    requires: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID})


class MaskBreaker(FakeQuantizer):
    """Merges something dense."""

    rule: ClassVar[int] = 4
    preserves: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID})


def plan_with(*passes: str) -> None:
    """Write a plan of these passes: each is the text of a table."""
    head = PLAN[: PLAN.index("[[pass]]")]
    Path("plan.toml").write_text(head + "".join(f"[[pass]]\n{one}\n" for one in passes))


WANDA = 'use = "wanda"\nsparsity = 0.5'
SPARSEGPT = 'use = "sparsegpt"\nsparsity = 0.5'
QUANTIZER = f'use = "{HERE}:FakeQuantizer"'


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_bytes_are_exact_for_every_family(
    family: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_directory(tmp_path / "model", family, blocks=1, tied=tied)
    monkeypatch.chdir(tmp_path)
    Path("plan.toml").write_text(PLAN + "[[export]]\nshard_size = 20000\n")
    lock = compile_plan(load_plan("plan.toml"))
    assert command(capsys, "plan.toml").code == 0
    written = {path.name: path.stat().st_size for path in Path("out").glob("*.safetensors")}
    assert written == {shard.file: shard.bytes for shard in lock.shards}
    assert len(written) > 1
    assert sum(written.values()) + Path("out", INDEX).stat().st_size == lock.output_bytes
    index = json.loads(Path("out", INDEX).read_text())
    stored = Checkpoint(Path("model")).tensors
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(info.bytes for info in stored.values())
    written = json.loads(Path("out/lock.json").read_text())
    del written["made_of"]  # hashes of what was read, which a lock does not read
    assert written == lock.to_json()


@pytest.mark.parametrize("size", [1, 1000, 30_000, 10**9])
def test_any_shard_size(size: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.toml").write_text(PLAN + f"[[export]]\nshard_size = {size}\n")
    found = check_plan(load_plan("plan.toml"))
    assert command(capsys, "plan.toml").code == 0
    files = [path for path in (folder / "out").iterdir() if "safetensors" in path.name]
    assert sum(path.stat().st_size for path in files) == found["output_bytes"]
    assert ((folder / "out" / INDEX).exists()) == (len(found["files"]) > 1)
    tensors = Checkpoint(folder / "out").tensors
    assert len(found["files"]) == (len(tensors) if size == 1 else len(found["files"]))


# ------------------------------------------------------------------ order


def test_compensating_after_a_grid_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_with(QUANTIZER, SPARSEGPT)
    message = refused(capsys, "plan.toml")
    assert "plan.toml:13: pass[1]: sparsegpt would break the grid that pass[0]" in message
    assert f"{HERE}:FakeQuantizer makes for model.layers.0.self_attn.q_proj" in message
    assert f"rule 3: {RULES[3][0]}" in message
    assert f"fix: {RULES[3][1]}" in message
    assert not (folder / ".out.compress").exists()


@pytest.mark.parametrize(
    "passes",
    [
        (QUANTIZER, WANDA),  # only removes codes: 0 is on every grid
        (SPARSEGPT, QUANTIZER),
        (WANDA, QUANTIZER, f'use = "{HERE}:ScaleTrainer"'),
        (QUANTIZER + '\nmatch = "*.q_proj"', SPARSEGPT + '\nexcept = "*.q_proj"'),  # never on the same linear
    ],
)
def test_orders_that_are_fine(passes: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_with(*passes)
    assert command(capsys, "plan.toml").code == 0


def test_a_pass_without_what_it_requires(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_with(WANDA, f'use = "{HERE}:ScaleTrainer"', QUANTIZER)
    message = refused(capsys, "check", "plan.toml")
    assert f"plan.toml:14: pass[1]: {HERE}:ScaleTrainer needs a grid, which no earlier pass makes" in message
    assert f"rule 6: {RULES[6][0]}" in message
    assert f"fix: {RULES[6][1]}" in message


def test_a_rule_broken_on_one_linear_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_with(WANDA + '\nmatch = "model.layers.1.mlp.down_proj"', f'use = "{HERE}:MaskBreaker"')
    message = refused(capsys, "check", "plan.toml")
    assert f"{HERE}:MaskBreaker would break the mask that pass[0] wanda makes" in message
    assert "for model.layers.1.mlp.down_proj" in message
    assert "rule 4" in message


def test_a_pattern_that_only_a_where_asks_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a pass establishes depends on the linear's own settings."""
    where = '\n[[pass.where]]\nmatch = "*.down_proj"\npattern = "2:4"'
    plan_with(WANDA + where, QUANTIZER)
    lock = compile_plan(load_plan("plan.toml"))
    provided = {linear.name: linear.passes[0][1].provides() for linear in lock.linears}
    assert provided["model.layers.0.mlp.down_proj"] == {Invariant.MASK, Invariant.PATTERN}
    assert provided["model.layers.0.mlp.up_proj"] == {Invariant.MASK}


def test_every_rule_has_words_and_a_fix() -> None:
    assert set(RULES) == set(range(1, 9))
    assert all(words and fix for words, fix in RULES.values())


def test_local_passes_share_a_sweep_and_a_survey_begins_one(folder: Path) -> None:
    plan_with(WANDA, QUANTIZER, 'use = "magnitude"\nsparsity = 0.6\nscope = "global"', QUANTIZER)
    assert compile_plan(load_plan("plan.toml")).sweeps == ((0, 1), (2, 3))


# ------------------------------------------------------- no weight is read


def test_no_weight_is_read(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plan.toml").write_text(PLAN)

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("compress.checkpoint.read_tensor", read)
    assert command(capsys, "check", "plan.toml").code == 0
    assert command(capsys, "explain", "plan.toml", "model.layers.0.mlp.up_proj").code == 0


def test_a_model_of_which_only_headers_exist(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A terabyte of weights that nobody has: a sparse file takes no disk and has no data worth reading."""
    columns = 1 << 20
    config = json.loads(Path("model/config.json").read_text())
    config |= {"vocab_size": columns * 64, "tie_word_embeddings": True}
    Path("model/config.json").write_text(json.dumps(config))
    old = Checkpoint(Path("model"))
    header, at = {}, 0
    for name, info in old.tensors.items():
        shape = [columns * 64, 32] if name == "model.embed_tokens.weight" else list(info.shape)
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with Path("model/model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    Path("plan.toml").write_text(PLAN)
    began = time.perf_counter()
    lock = compile_plan(load_plan("plan.toml"))
    assert lock.output_bytes > 8 << 30
    assert time.perf_counter() - began < 5
    result = command(capsys, "check", "plan.toml")
    assert result.code == 0 or "on the disk of its output" in result.err


def test_the_lock_is_the_same_every_time(folder: Path) -> None:
    Path("plan.toml").write_text(PLAN)
    one, other = (compile_plan(load_plan("plan.toml")) for _ in range(2))
    assert one.to_json() == other.to_json()
    assert one.digest() == other.digest()
    Path("plan.toml").write_text("# a comment\n" + PLAN.replace("threads = 1\n", ""))
    assert compile_plan(load_plan("plan.toml")).digest() == one.digest()
    Path("plan.toml").write_text(PLAN.replace("0.5", "0.25"))
    assert compile_plan(load_plan("plan.toml")).digest() != one.digest()


def test_explain_shows_defaults_pass_and_where(folder: Path) -> None:
    wheres = (
        '\n[[pass.where]]\nmatch = "*.mlp.*"\nsparsity = 0.3\n[[pass.where]]\nmatch = "*.down_proj"\nsparsity = 0.2'
    )
    plan_with('use = "magnitude"\nsparsity = 0.5' + wheres, QUANTIZER + '\nmatch = "*.q_proj"')
    lock = compile_plan(load_plan("plan.toml"))

    def origin(layer: str, setting: str) -> tuple[object, str]:
        (one,) = (s for s in explain(lock, layer)["passes"][0]["settings"] if s["key"] == setting)
        return one["value"], one["from"]

    assert origin("model.layers.0.mlp.down_proj", "sparsity") == (0.2, "plan.toml:19")
    assert origin("model.layers.0.mlp.up_proj", "sparsity") == (0.3, "plan.toml:16")
    assert origin("model.layers.0.self_attn.o_proj", "sparsity") == (0.5, "plan.toml:13")
    assert origin("model.layers.0.mlp.down_proj", "scope") == ("layer", "default")
    assert explain(lock, "model.layers.0.mlp.up_proj")["passes"][1]["skipped"] == "no match pattern matches"


def test_a_where_replaces_a_pattern_by_a_sparsity(folder: Path) -> None:
    plan_with('use = "wanda"\npattern = "2:4"\n[[pass.where]]\nmatch = "*.down_proj"\nsparsity = 0.25')
    settings = {linear.name: linear.passes[0][1].settings() for linear in compile_plan(load_plan("plan.toml")).linears}
    down, up = settings["model.layers.0.mlp.down_proj"], settings["model.layers.0.mlp.up_proj"]
    assert (down["sparsity"], down["pattern"]) == (0.25, None)
    assert (up["sparsity"], up["pattern"]) == (None, "2:4")


# ------------------------------------------------------------------ the hub


def test_a_hub_model_is_looked_for_offline_and_quickly(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    Path("plan.toml").write_text(PLAN.replace('"model"', '"some-org/some-model"'))
    began = time.perf_counter()
    message = refused(capsys, "plan.toml")
    assert time.perf_counter() - began < 5
    assert 'plan.toml:2: model.path: "some-org/some-model" is neither a local directory nor a model' in message
    assert "download the model and give its directory" in message
    Path("models").mkdir()
    (folder / "model").rename(folder / "models" / "llama-tiny")
    Path("plan.toml").write_text(PLAN.replace('"model"', '"models/lama-tiny"'))  # a typo that looks like a hub id
    assert 'did you mean "llama-tiny"?' in refused(capsys, "plan.toml")


@pytest.mark.parametrize("name", ["org/na me", "org/..", "org/--", "a" * 200 + "/b", "org/n\\u00e4me"])
def test_odd_hub_names(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("plan.toml").write_text(PLAN.replace('"model"', f'"{name}"'))
    assert "plan.toml:2: model.path" in refused(capsys, "plan.toml")


def test_a_hub_model_without_revision_is_warned_about(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder / "model"))
    Path("plan.toml").write_text(PLAN.replace('"model"', '"org/name"'))
    assert "no revision" in command(capsys, "check", "plan.toml").out
    Path("plan.toml").write_text(PLAN.replace('"model"', '"org/name"\nrevision = "abc"'))
    assert "no revision" not in command(capsys, "check", "plan.toml").out
