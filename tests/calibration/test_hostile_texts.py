"""Tokenizers and texts of others: programs that never end or make gigabytes, and decompression bombs."""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest
from pyarrow import parquet

from compress.calibration import tokenizer as tokenizers
from compress.calibration.rows import MAX_LINE
from compress.calibration.sources import file_digest, texts
from compress.calibration.tokenizer import load_tokenizer, render
from compress.calibration.tokens import eval_stream
from compress.checkpoint import read_header
from compress.errors import ModelError, PlanError
from compress.evals.outcomes import Outcomes
from compress.limits import GIB, MIB, LimitExceeded, bounded_memory, within
from compress.report import load_report
from fuzz.oracle import judged
from tests.conftest import ROOT
from tests.test_cli import PLAN, refused

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def model(folder: Path) -> Path:
    (folder / "plan.toml").write_text(PLAN)
    return Path("model")


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
