"""Model directories of others: whatever they hold, a refusal in words and in time; nothing is read or run elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import re
import time
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import checkpoint, hub, model_files
from compress.calibration import rows
from compress.calibration import tokenizer as tokenizers
from compress.calibration.rows import MAX_LINE
from compress.checkpoint import INDEX, SINGLE, Checkpoint
from compress.errors import LONGEST, ModelError, PlanError
from compress.evals import outcomes
from compress.evals.specs import read_specs
from compress.export.formats import selects
from compress.export.reader import open_model
from compress.hub import load_config
from compress.limits import GIB, MIB
from compress.model_files import check_directory
from compress.plan import load_plan
from fuzz.oracle import judged
from fuzz.targets import TARGETS
from tests.conftest import ROOT, tiny_directory
from tests.test_checkpoint import hub_cache
from tests.test_cli import PLAN, command, refused

# --------------------------------------------------------- a model directory


@pytest.fixture
def model(folder: Path) -> Path:
    (folder / "plan.toml").write_text(PLAN)
    return Path("model")


def configure(**changes: Any) -> None:
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_labels"])
def test_a_count_of_a_billion(family: str, key: str, tmp_path: Path) -> None:
    """transformers makes a list of so many labels or layer types while it reads config.json."""
    directory = tiny_directory(tmp_path / "model", family)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {key: 10**9}
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    begun = time.monotonic()
    with pytest.raises(ModelError, match=f'"{key}" is 1000000000; at most'):
        load_config(directory, trust_remote_code=False)
    assert time.monotonic() - begun < 30


def test_more_blocks_than_the_weights_can_fill(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of tensors cost an attacker nothing: what has no room for every linear of a block is no block."""
    tensors = len(Checkpoint(model).tensors)
    configure(num_hidden_layers=tensors // 7 + 1)
    assert f"do not match the {tensors} stored tensors: a block has 7 at least" in refused(capsys, "check", "plan.toml")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_spread_that_is_none(value: float, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers draws weights with it where it computes a module's buffers, in the midst of a run."""
    configure(initializer_range=value)
    assert f'"initializer_range" is {value}, no standard deviation' in refused(capsys, "check", "plan.toml")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernels", "kernels-community/flash-attn3", "flash_attention_2", {"": "a/b"}])
def test_kernels_that_the_hub_would_be_asked_for(
    key: str, value: Any, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(**{key: value})
    message = refused(capsys, "check", "plan.toml")
    assert f'"{key}" asks for kernels of another package' in message
    assert f'fix: remove "{key}"' in message


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", INDEX, SINGLE, "README.md"]
)
def test_a_fifo_in_the_model(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To open it would wait for a writer that never comes."""
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for arguments in (["check", "plan.toml"], ["plan.toml"]):
        assert f"model/{name}: is not a file" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt", INDEX,
        "chat_template.jinja", "generation_config.json", "adapter_config.json", "README.md", "spiece.model",
        "adapter/adapter_config.json", "additional_chat_templates/tool.jinja",
    ],
)  # fmt: skip
def test_a_link_that_leads_out(name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, outside = model / name, tmp_path / "private"
    place.parent.mkdir(exist_ok=True)
    outside.write_bytes(place.read_bytes() if place.exists() else b"{}")
    place.unlink(missing_ok=True)
    place.symlink_to(outside)
    assert f"model/{name}: is a link that leads outside the model directory" in refused(capsys, "check", "plan.toml")


@pytest.mark.parametrize("name", ["adapter", "additional_chat_templates"])
def test_a_folder_that_is_a_link_out(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (model / name).symlink_to(tmp_path / "private")
    with pytest.raises(ModelError, match="leads outside"):
        open_model(model)


def test_a_name_that_no_file_can_have(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a" * 300
    (model / SINGLE).unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "outside the model directory" in refused(capsys, "check", "plan.toml")
    for old in ('"model"', '"text.txt"', '"out"'):
        Path("plan.toml").write_text(PLAN.replace(old, f'"./{name}"'))
        assert "has a part of 300 bytes" in refused(capsys, "check", "plan.toml")
    with pytest.raises(PlanError, match="File name too long"):
        read_specs([f"minimal_pairs:{name}.jsonl"], Path(), "tasks")


def test_links_in_a_circle(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("tokenizer.json")
    assert "tokenizer.json: is a link" in refused(capsys, "check", "plan.toml")


def test_the_hubs_cache_is_no_link_out(model: Path, tmp_path: Path) -> None:
    check_directory(hub_cache(tmp_path / "hub", model))


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_of_gigabytes(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (model / name).open("wb") as file:
        file.truncate(3 * GIB)  # sparse: it takes no disk
    message = refused(capsys, "check", "plan.toml")
    assert f"model/{name}: has 3,221,225,472 bytes; of such a file at most" in message


@pytest.mark.parametrize(
    "name", [SINGLE, "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"]
)
def test_a_pickle(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the place of the weights it is refused, beside them it is not opened."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch owned",)

    (model / name).write_bytes(pickle.dumps({"weight": Evil()}))
    if name == SINGLE:
        assert "truncated: the header needs" in refused(capsys, "plan.toml")
    else:
        assert command(capsys, "plan.toml").code == 0
        assert not Path("out", name).exists()
    assert not Path("owned").exists()


def test_an_index_that_names_a_pickle(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(Checkpoint(model).tensors)
    (model / SINGLE).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "pytorch_model.bin")}))
    assert "pytorch_model.bin: truncated: the header needs" in refused(capsys, "plan.toml")


def test_an_adapter_in_the_place_of_the_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With peft installed, transformers would follow its base_model_name_or_path."""
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    Path("plan.toml").write_text(PLAN.replace('"text.txt"', '"self"'))
    assert "model: holds adapter_config.json, an adapter of another model" in refused(capsys, "plan.toml")


@pytest.mark.parametrize("output", ["model", "model/out", "model/../model/a/b", "."])
def test_an_output_that_would_destroy_the_model(output: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.toml").write_text(PLAN.replace('"out"', f'"{output}"'))
    for arguments in (["check", "plan.toml"], ["plan.toml", "--overwrite"]):
        message = refused(capsys, *arguments)
        assert "plan.toml:8: run.output: the output " in message
        assert "the model directory" in message


def test_an_output_is_not_replaced_by_what_is_made_of_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "plan.toml").code == 0
    Path("plan.toml").write_text(PLAN.replace('path = "model"', 'path = "out"'))
    assert "the output is the model directory" in refused(capsys, "plan.toml", "--overwrite")
    assert Checkpoint(Path("out")).tensors


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b'{"max_new_tokens": -5}', b'{"temperature": -1}'])
def test_a_damaged_generation_config(content: bytes, model: Path, tmp_path: Path) -> None:
    """Whoever reads it: compress.load, and calibration by text of the model's own."""
    (model / "generation_config.json").write_bytes(content)
    Path("plan.toml").write_text(PLAN.replace('"text.txt"', '"self"'))
    for read in (lambda: compress.load("model", device="cpu"), lambda: compress.run(load_plan("plan.toml"))):
        with judged(tmp_path):
            read()


def test_forwards_answer_as_ever(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json can ask for tuples, in which nobody looks for logits."""
    configure(return_dict=False, output_hidden_states=True)
    assert command(capsys, "plan.toml").code == 0


# ------------------------------------------------- patterns of quantized models


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*!",
        "(a+)+$",
        "(?:a|aa)*b",
        r"(\w+\.?){9}!",
        ".*.*.*!",
        "(?x)(a+) *b",
        r"(\()+(x)",
        "a" * 2000,
        "[a)]*[b]*c*",
    ],
)
def test_a_pattern_that_could_take_forever(pattern: str) -> None:
    with pytest.raises(ValueError, match="could take forever"):
        selects(pattern, "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    "pattern",
    [
        r"^model\.layers\.0\.(?:q|k)_proj$",
        r".*q_proj",
        r"model\.layers\.\d+\..*",
        "[qk]_proj",
        "q_proj|k_proj",
        "",
        r"\(a\)",
    ],
)
def test_an_honest_pattern_matches_as_ever(pattern: str) -> None:
    for name in ("model.layers.0.q_proj", "model.layers.1.k_proj", "q_proj", "(a)b", "lm_head"):
        assert selects(pattern, name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(("form", "where"), [("gptq", "dynamic"), ("compressed-tensors", "config_groups")])
def test_a_quantized_model_with_such_a_pattern(form: str, where: str, tmp_path: Path) -> None:
    target = TARGETS[form](tmp_path)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    quantization = config["quantization_config"]
    if form == "gptq":
        quantization["dynamic"] = {r"+:(\w+\.?)+!": {"bits": 4}}
    else:
        for group in quantization["config_groups"].values():
            group["targets"] = [r"re:(\w+\.?)+!"]
    path.write_text(json.dumps(config))
    begun = time.monotonic()
    with pytest.raises(ModelError, match="could take forever to match"):
        open_model(tmp_path / "out")
    assert time.monotonic() - begun < 30
    assert target.name == form
    assert where in quantization


# ----------------------------------------------------------------- messages


def test_a_message_is_one_line_that_no_terminal_obeys() -> None:
    error = PlanError("\x1b[2Jno\nfix: pip install evil\u202e", where="a\rb\x9b", fix="mend\x07")
    assert str(error) == "a\\rb\\x9b: \\x1b[2Jno\\nfix: pip install evil\\u202e\nfix: mend\\x07"
    long = str(PlanError("a" * 10**6 + "end", fix="b"))
    assert len(long) < LONGEST + 50
    assert long.endswith("aend\nfix: b")


def test_names_of_a_plan_do_not_reach_the_terminal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.toml").write_text(PLAN.replace('"wanda"', '"wanda\\u001b[2J"'))
    result = command(capsys, "check", "plan.toml")
    assert result.code == 2
    assert "\x1b[2J" not in result.err


def test_the_limits_are_those_that_are_stated() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    stated = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE))
    sizes = {
        "header of a safetensors file; JSON file of a model; baseline": f"{checkpoint.MAX_HEADER // MIB} MiB",
        "chat template": f"{model_files.READ['*.jinja'] // MIB} MiB",
        "time of a tokenizer for one text": f"{tokenizers.SECONDS:.0f} s, and 1 s for every "
        f"{tokenizers.CHARACTERS_PER_SECOND:,} characters",
        "what a tokenizer's replacements can make of a character": f"{tokenizers.MAX_GROWTH} characters",
        "a line of `.jsonl`": f"{MAX_LINE // MIB} MiB",
        "`.txt`; `.json`": f"{rows.MAX_FILE // GIB} GiB; {rows.MAX_ARRAY // GIB} GiB, and "
        f"{rows.ARRAY_MEMORY // GIB} GiB for its objects",
        "reading the next rows of `.parquet`, or a large line": f"{rows.ROWS_MEMORY // GIB} GiB more memory",
        "documents of a file, in memory": f"{rows.MAX_RATIO} times its size, or {rows.FREE // MIB} MiB",
        "a chat template, for one conversation": f"{tokenizers.TEMPLATE_SECONDS:.0f} s, and "
        f"{tokenizers.TEMPLATE_MEMORY // GIB} GiB more memory",
        "time to load a tokenizer": f"{tokenizers.LOADING:.0f} s, and "
        f"{tokenizers.LOADING_MEMORY // GIB} GiB more memory",
        "samples of a baseline": f"{outcomes.MAX_SAMPLES:,}; {outcomes.READING:.0f} s, and "
        f"{outcomes.READING_MEMORY // GIB} GiB more memory",
    }
    assert {name: stated[name] for name in sizes} == sizes
    assert stated["blocks, labels"].startswith(f"{hub.MAX_COUNT:,};")
