"""Models and texts as they are out there: damaged, hostile, of another family, too short."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import files_of, some_text, tiny_directory
from tests.test_checkpoint import HOSTILE, hub_cache, write
from tests.test_cli import PLAN, command, left_behind, refused

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = Path("model")
WEIGHTS = MODEL / "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_directory(folder / "model", "llama", blocks=2, tied=False)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "plan.toml").write_text(PLAN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configure(**changes: Any) -> None:
    """Change config.json; None removes a key."""
    config = json.loads((MODEL / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (MODEL / "config.json").write_text(json.dumps(config))


def reweigh(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(WEIGHTS)
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, WEIGHTS, metadata={"format": "pt"})


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    "case", ["begins outside", "overlap", "a hole", "unknown dtype", "dtype is a list", "too deep"]
)
def test_a_header_that_lies(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, says = HOSTILE[case]
    write(WEIGHTS, header)
    message = refused(capsys, "plan.toml")
    assert "model/model.safetensors: " in message
    assert says in message
    assert "download or save it again" in message
    assert left_behind(folder) == []


def _truncate(_: Path) -> None:
    os.truncate(WEIGHTS, WEIGHTS.stat().st_size // 2)


def _empty(_: Path) -> None:
    WEIGHTS.write_bytes(b"")


def _folder(_: Path) -> None:
    WEIGHTS.unlink()
    WEIGHTS.mkdir()


def _none(_: Path) -> None:
    WEIGHTS.unlink()


def _pickle(_: Path) -> None:
    WEIGHTS.unlink()
    (MODEL / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")


def _link(folder: Path) -> None:
    WEIGHTS.rename(folder / "elsewhere")
    WEIGHTS.symlink_to(folder / "elsewhere")


def _html(_: Path) -> None:
    WEIGHTS.write_text("<!DOCTYPE html><html>Please log in" + " " * 2000)


def _pointer(_: Path) -> None:
    WEIGHTS.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "truncated"),
        (_empty, "truncated"),
        (_folder, "is not a file"),
        (_none, "no model.safetensors and no model.safetensors.index.json"),
        (_pickle, "only a pickled checkpoint (pytorch_model.bin) is here"),
        (_link, "a link that leads outside"),
        (_html, "truncated: the header needs"),
        (_pointer, "truncated: the header needs"),
    ],
)
def test_weights_that_cannot_be_used(
    damage: Callable[[Path], None], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    for arguments in (["plan.toml"], ["check", "plan.toml"]):
        assert says in refused(capsys, *arguments)
    assert not (folder / "out").exists()
    assert not (folder / ".out.compress").exists()
    assert not Path("owned").exists()


def test_the_hubs_cache_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = hub_cache(folder / "hub", MODEL)
    Path("plan.toml").write_text(PLAN.replace('"model"', f'"{snapshot}"'))
    assert command(capsys, "plan.toml").code == 0
    assert not any(path.is_symlink() for path in Path("out").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [UP, "model.layers.0.input_layernorm.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_a_weight_that_is_no_number(name: str, value: float, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[7] = value
        return weight

    reweigh(name, spoil)
    message = refused(capsys, "plan.toml", code=3)
    assert f"{name} holds NaN or infinity" in message
    assert "repair or re-download the model" in message
    assert not (folder / "out").exists()


def test_a_head_that_is_no_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reweigh("lm_head.weight", lambda weight: weight.fill_(float("nan")))
    assert "lm_head.weight holds NaN or infinity" in refused(capsys, "plan.toml", code=3)


@pytest.mark.parametrize(
    ("name", "factor", "layer"),
    [
        (UP, 1e30, "model.layers.1.mlp.down_proj"),
        ("model.layers.0.mlp.up_proj.weight", 1e36, "model.layers.0.mlp.down_proj"),
        ("model.layers.0.self_attn.v_proj.weight", 1e30, "model.layers.0.self_attn.o_proj"),
        ("model.layers.0.mlp.down_proj.weight", 1e38, "block 0"),
    ],
)
@pytest.mark.parametrize("refresh", ["block", "subset"])
def test_finite_weights_whose_activations_overflow(
    name: str, factor: float, layer: str, refresh: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.toml").write_text(PLAN.replace("threads = 1", f'refresh = "{refresh}"'))
    reweigh(name, lambda weight: (weight * factor).clamp(-3e38, 3e38))
    message = refused(capsys, "plan.toml", code=3)
    assert layer in message
    assert "NaN or infinity" in message
    assert not (folder / "out").exists()
    assert refused(capsys, "plan.toml", code=3).splitlines()[0] == message.splitlines()[0]  # resumed, it says the same


# ------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "config.json is missing"),
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"{}", '"model_type" is missing'),
        (b'{"model_type": 3}', '"model_type" is missing'),
        (b'{"model_type": "lama"}', 'unknown architecture "lama"; did you mean "llama"?'),
        (b'{"model_type": "bert"}', 'unknown architecture "bert"'),
        (b'{"model_type": "../../etc/passwd"}', "unknown architecture"),
    ],
)
def test_a_config_that_cannot_be_used(
    content: bytes | None, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (MODEL / "config.json").unlink()
    if content is not None:
        (MODEL / "config.json").write_bytes(content)
    message = refused(capsys, "plan.toml")
    assert says in message
    assert "config.json" in message
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64},
        {"hidden_size": -32},
        {"hidden_size": "wide"},
        {"intermediate_size": 50},
        {"vocab_size": 63},
        {"vocab_size": 10**18},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 1},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},  # to be refused before it is built
        {"hidden_act": "no_such"},
        {"rope_parameters": {"rope_type": "no_such"}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"tie_word_embeddings": "maybe"},
        {"max_position_embeddings": "long"},
        {"model_type": "gpt2"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights(
    changes: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(**changes)
    message = refused(capsys, "plan.toml")
    assert message.startswith(("error: model", "error: config.json", "error: plan.toml")), message
    assert len(message) < 600
    assert left_behind(folder) == []


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}])
def test_a_model_that_is_quantized_already(
    settings: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(quantization_config=settings)
    message = refused(capsys, "plan.toml")
    assert "already quantized" in message
    assert "original checkpoint" in message


def test_weights_that_are_quantized_already(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reweigh(UP, lambda weight: weight.to(torch.int8))
    assert f"{UP} is stored as I8: the model is already quantized" in refused(capsys, "plan.toml")


def test_a_tensor_that_is_missing_or_renamed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(WEIGHTS)
    tensors["model.layers.1.mlp.upper"] = tensors.pop(UP)
    save_file(tensors, WEIGHTS, metadata={"format": "pt"})
    message = refused(capsys, "plan.toml")
    assert f"1 tensors of the model are not in the checkpoint, {UP} among them" in message


# -------------------------------------------------------------- remote code

EVIL = "open('owned', 'w').close()\n"


def test_code_that_comes_with_a_model_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (MODEL / "evil.py").write_text(EVIL)
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    configure(model_type="evil", auto_map=auto)
    message = refused(capsys, "plan.toml")
    assert "does not permit" in message
    assert "trust_remote_code = true" in message
    configure(model_type="llama")  # a known family with a map: the known code runs
    assert command(capsys, "plan.toml").code == 0
    assert not Path("owned").exists()
    assert not Path("out/evil.py").exists()


def test_code_that_comes_with_a_tokenizer_is_not_offered(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "n")
    (MODEL / "evil.py").write_text(EVIL)
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (MODEL / "tokenizer_config.json").write_text(json.dumps(config))
    refused(capsys, "plan.toml")
    assert not Path("owned").exists()
    assert not asked


def test_a_link_to_a_private_file_is_not_published(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("id_rsa").write_text("private key")
    (MODEL / "tokenizer_notes.txt").symlink_to(folder / "id_rsa")
    result = command(capsys, "plan.toml")
    assert result.code == 2 or not any("private key" in path.read_text("latin-1") for path in Path("out").iterdir())


# ------------------------------------------------------------- calibration


def test_no_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in MODEL.glob("tokenizer*"):
        path.unlink()
    message = refused(capsys, "plan.toml")
    assert "model: no usable tokenizer" in message
    assert "copy tokenizer.json" in message


def test_a_damaged_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (MODEL / "tokenizer.json").write_text("{")
    assert "no usable tokenizer" in refused(capsys, "plan.toml")


def test_a_tokenizer_of_another_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: number + (number > 3) * 1000 for word, number in vocabulary.items()}
    (MODEL / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(capsys, "plan.toml")
    assert "the tokenizer makes token 1" in message
    assert "but the model has 64" in message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text.txt", b"", "is empty"),
        ("text.txt", b"\n \n\n", "is empty"),
        ("text.txt", b"w5 w6 w7", "asked for 2 × 16 = 32 tokens, text.txt has"),
        ("text.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("text.jsonl", b"", "is empty"),
        ("text.jsonl", b"{", "not JSON"),
        ("text.jsonl", b'{"body": "w5"}', 'no column "text" or "messages"; the columns are body'),
        ("text.parquet", b"PAR1", "cannot be read as parquet"),
        ("text.pdf", b"%PDF", '".pdf" is not a kind of text file'),
    ],
)
def test_a_text_that_cannot_be_used(
    name: str, content: bytes, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    Path("plan.toml").write_text(PLAN.replace("text.txt", name))
    message = refused(capsys, "plan.toml")
    assert says in message
    assert name in message
    assert not (folder / "out").exists()


def test_an_output_behind_a_link_to_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("loop").symlink_to("loop")
    Path("plan.toml").write_text(PLAN.replace('"out"', '"loop/out"'))
    for arguments in (["plan.toml"], ["check", "plan.toml"]):
        message = refused(capsys, *arguments)
        assert "plan.toml:8: run.output: " in message
        assert "choose another output" in message


def test_a_text_that_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.txt").unlink()
    for arguments in (["plan.toml"], ["check", "plan.toml"]):
        assert 'plan.toml:4: calibration.source: no such file "text.txt"' in refused(capsys, *arguments)
    assert left_behind(folder) == []


@pytest.mark.parametrize("mended", ["plan", "text"])
def test_after_too_little_text_the_mended_plan_just_runs(
    mended: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was computed yet that could belong to another plan."""
    Path("text.txt").write_text(some_text(40))
    Path("plan.toml").write_text(PLAN.replace("samples = 2", "samples = 9"))
    assert "fix: give more text, or a smaller samples or length" in refused(capsys, "plan.toml")
    if mended == "plan":
        Path("plan.toml").write_text(PLAN)
    else:
        Path("text.txt").write_text(some_text(4000))
    assert command(capsys, "plan.toml").code == 0


def test_a_model_that_changes_while_a_run_is_stopped(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compress.execution.export", stop)
        assert command(capsys, "plan.toml").code == 130
    reweigh(UP, lambda weight: weight + 1)
    message = refused(capsys, "plan.toml")
    assert "another model" in message
    assert "--restart" in message
    assert command(capsys, "plan.toml", "--restart").code == 0


@pytest.mark.parametrize("what", ["model", "text"])
def test_a_finished_output_of_other_data_is_not_done(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, "plan.toml").code == 0
    before = files_of(folder / "out")
    if what == "model":
        reweigh(UP, lambda weight: weight + 1)
    else:
        Path("text.txt").write_text(some_text(3000, seed=5))
    result = command(capsys, "plan.toml")
    assert "already holds the result" not in result.out
    assert files_of(folder / "out") == before  # nor is it replaced unasked
