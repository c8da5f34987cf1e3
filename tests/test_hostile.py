"""Files of others: whatever they hold, a refusal in words, in time, in memory, and nothing is read or run elsewhere.

The fuzzer's targets run here on inputs that Hypothesis draws; `fuzz.oracle` judges them. What a fuzzer seldom finds
(links, FIFOs, bombs, programs that never end) has a test of its own.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import compress
from compress import checkpoint, hub, model_files
from compress.calibration import rows
from compress.calibration import tokenizer as tokenizers
from compress.calibration.rows import MAX_LINE
from compress.calibration.sources import file_digest, texts
from compress.calibration.tokenizer import load_tokenizer, render
from compress.calibration.tokens import eval_stream
from compress.checkpoint import INDEX, SINGLE, Checkpoint, read_header
from compress.errors import LONGEST, ModelError, PlanError
from compress.evals import outcomes
from compress.evals.outcomes import Outcomes
from compress.evals.specs import read_specs
from compress.export.formats import selects
from compress.export.reader import open_model
from compress.hub import load_config
from compress.limits import GIB, MIB, LimitExceeded, bounded_memory, within
from compress.model_files import check_directory
from compress.plan import load_plan
from compress.report import load_report
from fuzz.oracle import Broken, judged
from fuzz.targets import TARGETS
from tests.conftest import ROOT, tiny_directory
from tests.test_checkpoint import hub_cache
from tests.test_cli import PLAN, command, refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.target import Target

# Each in about two seconds on an idle machine; python -m fuzz runs thousands.
EXAMPLES = {"rows": 150, "header": 30, "tokenizer": 60, "baseline": 60, "plan": 60}
_targets: dict[str, Target] = {}


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A target, whose seeds are made once."""
    name = request.param
    if name not in _targets:
        _targets[name] = TARGETS[name](tmp_path_factory.mktemp(name))
    return _targets[name]


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("rows",)], indirect=True)
def test_the_seeds_are_valid(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else every change to them would be refused for the same reason."""
    monkeypatch.chdir(target.folder)
    target.read()


@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_whatever_a_file_holds(target: Target) -> None:
    @settings(
        max_examples=EXAMPLES.get(target.name, 20),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=8, max_size=64))
    def judge(data: bytes) -> None:
        target.run(data)

    judge()


# ------------------------------------------------------- the oracle can fail


def _reads_elsewhere(folder: Path) -> None:
    Path("/etc/hostname").read_bytes()


def _unpickles(folder: Path) -> None:
    pickle.loads(b"cos\ngetcwd\n.")


def _starts(folder: Path) -> None:
    subprocess.run(["true"], check=True)


def _runs(folder: Path) -> None:
    (folder / "evil.py").write_text("x = 1")
    exec(compile("x = 1", str(folder / "evil.py"), "exec"))


def _says_nothing(folder: Path) -> None:
    raise PlanError("wrong")


def _obeyed(folder: Path) -> None:
    class Raw(PlanError):
        def __str__(self) -> str:
            return "\x1b[2J"

    raise Raw("wrong", fix="mend")


@pytest.mark.parametrize("deed", [_reads_elsewhere, _unpickles, _starts, _runs, _says_nothing, _obeyed])
def test_the_oracle_sees(deed: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(Broken), judged(tmp_path):
        deed(tmp_path)


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


# --------------------------------------------------------------- tokenizers


def retoken(**changes: Any) -> None:
    path = Path("model/tokenizer.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["Replace", None])  # of no known type: tokenizers takes it by its other keys
def test_replacements_that_make_gigabytes_of_a_line(
    kind: str | None, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundredfold, five times over: the process would be killed, or abort."""
    step = {"type": kind, "pattern": {"String": "a"}, "content": "a" * 100}
    retoken(normalizer={"type": "Sequence", "normalizers": [step, {"type": "Sequence", "normalizers": [step] * 4}]})
    message = refused(capsys, "plan.toml")
    assert "no usable tokenizer: model/tokenizer.json: its replacements can make a text 100 times as long" in message


def test_a_charsmap_that_makes_gigabytes_of_a_line(model: Path) -> None:
    """SentencePiece's own form of replacements, as tokenizers reads it."""
    charsmap = (0).to_bytes(4, "little") + b"a" * 10**6 + b"\0"
    retoken(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    with pytest.raises(ModelError, match="its replacements can make a text 100 times as long"):
        load_tokenizer(model)


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_an_affix_of_a_million_characters(key: str, model: Path) -> None:
    tokenizer = json.loads(Path("model/tokenizer.json").read_text())
    retoken(model=tokenizer["model"] | {key: "a" * 1_000_000})
    with pytest.raises(ModelError, match=f'"{key}" has 1,000,000 characters'):
        load_tokenizer(model)


def test_a_regular_expression_that_panics(model: Path) -> None:
    """Oniguruma gives up, which tokenizers turns into a panic: no Exception in Python."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    retoken(pre_tokenizer=split, normalizer=None)
    tokenizer = load_tokenizer(model)
    with pytest.raises(ModelError, match=r"fails on a text of 41 characters: PanicException: .*retry-limit"):
        eval_stream("a" * 40 + "b", tokenizer)


def test_a_regular_expression_that_takes_years(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the number of steps at which Oniguruma gives up, 2^18 of them, but at each of 20,000 words."""
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+[yz]"}, "behavior": "Isolated", "invert": False}
    retoken(pre_tokenizer=split, normalizer=None)
    tokenizer = load_tokenizer(model)
    monkeypatch.setattr(tokenizers, "SECONDS", 1.0)
    monkeypatch.setattr(tokenizers, "CHARACTERS_PER_SECOND", 1e9)
    begun = time.monotonic()
    with pytest.raises(ModelError, match="takes longer than 1 s"):
        eval_stream(("x" * 17 + " ") * 20_000 + "y", tokenizer)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 1 s"),
        ("{{ 'a' * 99999999999 }}", "of memory"),
        ("{% set x = ['a' * 9999999] %}{% for i in range(30) %}{% set _ = x.extend(x) %}{% endfor %}", ""),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('touch owned') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ a.b.c }}", "undefined"),
        ("{% for %}", ""),
    ],
)
def test_a_chat_template_is_a_program(
    template: str, says: str, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (model / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(model)
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 1.0)
    begun = time.monotonic()
    found = []
    with judged(tmp_path):
        try:
            render(tokenizer, [{"role": "user", "content": "hi"}], "plan.toml")
        except PlanError as error:
            found.append(str(error))
    assert "the chat template refuses" in found[0]
    assert says in found[0]
    assert time.monotonic() - begun < 20
    assert not Path("owned").exists()


# --------------------------------------------------------- calibration data


def page_bomb(path: Path) -> None:
    """One text of 300 MB, a page of its own, which compresses to 10 kB."""
    text = pyarrow.array(["a" * 300_000_000], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"text": text}), path, compression="zstd", use_dictionary=False)


def dictionary_bomb(path: Path) -> None:
    """One text of a megabyte, stored once, and 50,000 times said."""
    same = pyarrow.array([0] * 50_000, pyarrow.int32())
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(same, ["a" * 1_000_000])})
    parquet.write_table(table, path, compression="zstd")


def chat_bomb(path: Path) -> None:
    """The same in messages, 300 of 200 kB."""
    chat = [{"role": "user", "content": "x" * 200_000}]
    parquet.write_table(pyarrow.table({"messages": pyarrow.array([chat] * 300)}), path, compression="zstd")


def long_chat_bomb(path: Path) -> None:
    """One conversation of 2,000 of them, which is one row."""
    chat = [{"role": "user", "content": "x" * 200_000}] * 2000
    parquet.write_table(pyarrow.table({"messages": pyarrow.array([chat])}), path, compression="zstd")


def object_bomb(path: Path) -> None:
    """A line that is small as text, and large as objects."""
    path.write_text("[" + "[]," * 4_000_000 + "[]]\n")


READ = """
import sys
from compress.calibration import rows
from compress.calibration.sources import texts
from compress.errors import PlanError
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
import pyarrow.parquet
rows.ROWS_MEMORY, rows.FREE = 128 << 20, 32 << 20  # smaller, so that the bombs may be
before = peak()
try:
    list(texts(sys.argv[1], default_split="train").shuffled(0))
except PlanError as error:
    print(error)
print((peak() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded and told by Linux only")
@pytest.mark.parametrize(
    ("bomb", "says", "most"),
    [
        (page_bomb, "cannot be read: ", 200),
        (dictionary_bomb, "the file is a decompression bomb", 120),
        (chat_bomb, "the file is a decompression bomb", 120),
        (long_chat_bomb, "cannot be read: a row does not fit into memory", 200),
        (object_bomb, "cannot be read: a row does not fit into memory", 200),
    ],
)
def test_a_bomb(bomb: Callable[[Path], None], says: str, most: int, tmp_path: Path) -> None:
    file = "bomb.jsonl" if bomb is object_bomb else "bomb.parquet"
    bomb(tmp_path / file)
    assert (tmp_path / file).stat().st_size < 20_000_000
    done = subprocess.run(
        [sys.executable, "-c", READ, file],
        cwd=tmp_path,
        # mimalloc reserves a GiB of address space at once, which a page could fill without a word.
        env=os.environ | {"PYTHONPATH": str(ROOT), "ARROW_DEFAULT_MEMORY_POOL": "system"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert says in done.stdout
    assert "fix: the file is" in done.stdout
    assert int(done.stdout.split()[-1]) < most


def test_a_page_that_lies_about_its_size(tmp_path: Path) -> None:
    """Every byte of the page header that can be wrong, one after the other."""
    stored = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["some text", "other text"]}), stored, compression="zstd")
    whole = stored.getvalue()
    path = tmp_path / "rows.parquet"
    for place in range(4, 40):
        for value in (0x00, 0x7F, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with judged(tmp_path):
                list(texts(str(path), default_split="train"))


@pytest.mark.parametrize(("suffix", "size"), [(".jsonl", MAX_LINE + 1), (".json", 3 * GIB), (".txt", 9 * GIB)])
def test_a_text_of_gigabytes(suffix: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    with path.open("wb") as file:
        file.truncate(size)  # sparse: it takes no disk, and no line ends in it
    with pytest.raises(PlanError, match=r"a line has more than|bytes; of a .* file at most") as caught:
        list(texts(str(path), default_split="train"))
    assert str(path) in (caught.value.where or "")


def test_many_small_rows_are_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ""}\n' * 50_000 + '{"text": "a"}\n')
    assert len(list(texts(str(path), default_split="train"))) == 50_001


def _read_header(folder: Path) -> None:
    list(read_header(folder / "fifo.safetensors"))


def _load_report(folder: Path) -> None:
    (folder / "fifo.safetensors").rename(folder / "report.json")
    load_report(folder)


def _load_baseline(folder: Path) -> None:
    Outcomes.load(folder / "fifo.safetensors")


def _digest(folder: Path) -> None:
    file_digest(folder / "fifo.safetensors")


@pytest.mark.parametrize("reader", [_read_header, _load_report, _load_baseline, _digest])
def test_a_fifo_anywhere_else(reader: Callable[[Path], None], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    with pytest.raises(PlanError, match="is not a file"):
        reader(tmp_path)


# ------------------------------------------------------------------- limits


def test_what_ends_in_time_ends_as_ever() -> None:
    assert within(lambda: 3, seconds=10, memory=GIB) == 3
    with pytest.raises(KeyError):
        within(lambda: {}["a"], seconds=10)


def test_a_thread_that_takes_too_long_is_ended() -> None:
    ticks = []

    def tick() -> None:
        while True:
            ticks.append(1)
            time.sleep(0.01)

    before = threading.active_count()
    with pytest.raises(LimitExceeded, match="longer than 0 s"):
        within(tick, seconds=0.2)
    assert threading.active_count() == before
    assert ticks


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux only")
def test_memory_is_bounded_for_a_while_only() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(LimitExceeded, match=r"needs more than 0\.5 GiB"):
        within(lambda: bytearray(2 * GIB), seconds=60, memory=512 * MIB)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with bounded_memory(512 * MIB), bounded_memory(8 * GIB), pytest.raises(MemoryError):  # the inner one lifts nothing
        bytearray(2 * GIB)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(600 * MIB)) == 600 * MIB


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
