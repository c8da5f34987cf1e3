"""Every kind of source, and what each says when it cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from compress.calibration.sources import DATASETS, file_digest, is_file, texts, whole_text
from compress.errors import PlanError

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path: Path, *rows: object) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return str(path)


def read(source: str, **options: Any) -> list[Any]:
    return list(texts(source, default_split="train", **options))


# --- what is a file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing.txt", "data/x.JSONL", "a.json", "b.parquet", "./x", "/x/y", "../x", "~/x"])
def test_suffixes_and_paths_mean_files(name: str) -> None:
    assert is_file(name)


@pytest.mark.parametrize("name", ["wikitext", "c4", "allenai/c4", "data/missing"])
def test_other_names_mean_datasets(name: str) -> None:
    assert not is_file(name)


def test_existing_files_are_files_but_directories_and_short_names_are_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notes", "text")
    write(tmp_path / "c4", "text")
    (tmp_path / "folder").mkdir()
    assert is_file("notes")
    assert not is_file("c4")
    assert is_file("./c4")
    assert not is_file("folder")
    assert not is_file(str(tmp_path))


# --- files ------------------------------------------------------------------------------------------------------------


def test_text_documents_are_paragraphs_and_the_whole_text_is_verbatim(tmp_path: Path) -> None:
    content = "\n = Title = \n\n  one\ntwo\n \t\n\nthree\r\n\r\nfour é\n\n"
    source = write(tmp_path / "a.txt", content)
    assert read(source) == [" = Title = ", "  one\ntwo", "three", "four é"]
    assert whole_text(source, default_split="test") == content


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert whole_text(write(tmp_path / "a.txt", b"\xef\xbb\xbftext"), default_split="test") == "text"
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n')) == ["x"]


def test_jsonl_takes_text_then_messages_then_the_named_column(tmp_path: Path) -> None:
    assert read(jsonl(tmp_path / "a.jsonl", {"text": "a\u2028b"}, {"text": ""})) == ["a\u2028b", ""]
    assert read(jsonl(tmp_path / "b.jsonl", {"messages": CHAT, "prompt": "x"})) == [CHAT]
    assert read(jsonl(tmp_path / "c.jsonl", {"body": "x", "text": "y"}), column="body") == ["x"]
    assert read(write(tmp_path / "d.jsonl", '{"text": "x"}\n\n{"text": "y"}')) == ["x", "y"]


def test_json_holds_an_array_or_lines(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", '[\n {"text": "x"},\n {"text": "y"}\n]')) == ["x", "y"]
    assert read(write(tmp_path / "b.json", '{"text": "x"}\n{"text": "y"}\n')) == ["x", "y"]


def test_parquet_streams_across_batches_and_row_groups(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(2500)]
    source = parquet(tmp_path / "a.parquet", {"id": list(range(2500)), "text": rows}, row_group_size=700)
    assert read(source) == rows
    assert read(parquet(tmp_path / "b.parquet", {"messages": [CHAT]})) == [CHAT]


def test_rows_join_with_a_blank_line_the_empty_ones_included(tmp_path: Path) -> None:
    rows = ["", " = A = \n", "", " text \n"]
    source = parquet(tmp_path / "a.parquet", {"text": rows})
    assert whole_text(source, default_split="test") == "\n\n".join(rows)


def test_chat_is_no_evaluation_text(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="chat messages"):
        whole_text(jsonl(tmp_path / "a.jsonl", {"messages": CHAT}), default_split="test")


def test_shuffling_is_a_permutation_fixed_by_the_seed(tmp_path: Path) -> None:
    documents = texts(jsonl(tmp_path / "a.jsonl", *({"text": str(i)} for i in range(100))), default_split="train")
    first, again, other = (list(documents.shuffled(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(map(str, first)) == sorted(map(str, other)) == sorted(map(str, documents))
    assert first != list(documents)


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    assert file_digest(write(tmp_path / "a.txt", "text")) == hashlib.sha256(b"text").hexdigest()
    with pytest.raises(PlanError, match="cannot be read"):
        file_digest(tmp_path / "missing.txt")


BROKEN: dict[str, tuple[str, bytes, dict[str, str], str]] = {
    "not utf-8": ("a.txt", b"fine\nbad \xff\n", {}, r"a\.txt:2: not UTF-8"),
    "not utf-8 in jsonl": ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', {}, r"a\.jsonl:2: not UTF-8"),
    "malformed line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', {}, r"a\.jsonl:2: not JSON"),
    "malformed array": ("a.json", b'[{"text": "x"},', {}, r"a\.json: not JSON"),
    "row is no object": ("a.jsonl", b"[1]\n", {}, r"a\.jsonl:1: a row is not an object"),
    "null document": ("a.jsonl", b'{"text": null}\n', {}, r"a\.jsonl:1: .*NoneType"),
    "messages without roles": ("a.jsonl", b'{"messages": [{"from": "x"}]}\n', {}, r"a\.jsonl:1: .*neither text nor"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', {}, r"a\.jsonl:1: .*surrogate"),
    "surrogate in chat": ("a.jsonl", b'{"messages": [{"role": "\\ud800"}]}\n', {}, r"a\.jsonl:1: .*surrogate"),
    "deep nesting": ("a.jsonl", b"[" * 200_000 + b"\n", {}, r"a\.jsonl:1: not JSON"),
    "no such column": (
        "a.jsonl",
        b'{"body": "x", "id": 1}\n',
        {"column": "bdy"},
        r'a\.jsonl:1: no column "bdy"; the columns are body, id; did you mean "body"\?',
    ),
    "no default column": ("a.jsonl", b'{"texts": "x"}\n', {}, r'no column "text" or "messages"; .*mean "texts"'),
    "no parquet": ("a.parquet", b"PAR1 but no more", {}, r"a\.parquet: cannot be read as parquet"),
    "empty parquet": ("a.parquet", b"", {}, r"a\.parquet: cannot be read as parquet"),
    "empty text": ("a.txt", b"", {}, r"a\.txt: is empty"),
    "blank text": ("a.txt", b" \n\n\t\n", {}, r"a\.txt: is empty"),
    "empty jsonl": ("a.jsonl", b"\n", {}, r"a\.jsonl: is empty"),
    "empty array": ("a.json", b"[]", {}, r"a\.json: is empty"),
    "split of a file": ("a.jsonl", b'{"text": "x"}\n', {"split": "test"}, r'has no split "test"'),
    "configuration of a file": ("a.parquet", b"", {"name": "en"}, r'has no name "en"'),
    "column of a text": ("a.txt", b"x", {"column": "text"}, r'has no column "text"'),
    "kind": ("a.csv", b"text\nx\n", {}, r'"\.csv" is not a kind of text file'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_with_place_and_fix(tmp_path: Path, case: str) -> None:
    name, content, options, message = BROKEN[case]
    with pytest.raises(PlanError) as caught:
        read(write(tmp_path / name, content), **options)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert caught.value.fix
    assert "\n" not in caught.value.problem


def test_a_missing_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such file"):
        texts(str(tmp_path / "missing.txt"), default_split="train")


def test_parquet_without_the_column_or_rows(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the columns are id, txet; did you mean"):
        read(parquet(tmp_path / "a.parquet", {"id": [1], "txet": ["x"]}), column="text")
    with pytest.raises(PlanError, match="is empty"):
        read(parquet(tmp_path / "b.parquet", {"text": []}))
    with pytest.raises(PlanError, match=r"row 2: .*NoneType"):
        read(parquet(tmp_path / "c.parquet", {"text": ["x", None]}))


def test_a_truncated_parquet_is_refused(tmp_path: Path) -> None:
    source = Path(parquet(tmp_path / "a.parquet", {"text": ["x" * 100] * 1000}))
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(PlanError, match="cannot be read as parquet"):
        read(str(source))


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local directory in the hub's layout: two splits of .jsonl."""
    directory = tmp_path / "dataset"
    directory.mkdir()
    jsonl(directory / "train.jsonl", *({"text": f"train {i}"} for i in range(50)))
    jsonl(directory / "test.jsonl", {"text": "test 0"}, {"text": ""}, {"text": "test 2"})
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return str(directory)


def test_a_dataset_streams_a_split(dataset: str) -> None:
    assert read(dataset) == [f"train {i}" for i in range(50)]
    assert read(dataset, split="test") == ["test 0", "", "test 2"]
    assert whole_text(dataset, default_split="test") == "test 0\n\n\n\ntest 2"


def test_a_dataset_is_shuffled_by_the_seed(dataset: str) -> None:
    documents = texts(dataset, default_split="train")
    first, again, other = (list(documents.shuffled(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(map(str, first)) == sorted(map(str, documents))


def test_a_dataset_without_the_split_or_column_says_so(dataset: str) -> None:
    with pytest.raises(PlanError, match=r"split validation: cannot load .*'train', 'test'") as caught:
        read(dataset, split="validation")
    assert "local .txt, .jsonl or .parquet" in str(caught.value)
    with pytest.raises(PlanError, match='row 1: no column "txt"; the columns are text'):
        read(dataset, column="txt")


def test_a_short_name_stands_for_repository_configuration_and_splits() -> None:
    assert texts("wikitext", default_split="test").where == "Salesforce/wikitext, wikitext-2-raw-v1, split test"
    assert texts("c4", default_split="test").where == "allenai/c4, en, split validation"
    assert texts("c4", name="de", split="train", default_split="test").where == "allenai/c4, de, split train"
    assert texts("org/name", default_split="train").where == "org/name, split train"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlanError, match='did you mean "wikitext"'):
        texts("wikitxt", default_split="train")
    assert all("/" in known.repository for known in DATASETS.values())


def test_offline_says_what_was_tried_and_quickly() -> None:
    code = (
        "from compress.calibration.sources import texts\n"
        "from compress.errors import PlanError\n"
        "try: list(texts('wikitext', default_split='train'))\n"
        "except PlanError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent", "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert time.monotonic() - start < 20
    assert answer.stdout.startswith("Salesforce/wikitext, wikitext-2-raw-v1, split train: cannot load this dataset")
    assert "OfflineModeIsEnabled" in answer.stdout
    assert "fix: check its name" in answer.stdout
    assert "local .txt" in answer.stdout
    assert "Traceback" not in answer.stdout + answer.stderr


def test_files_need_no_hub_library(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "text")
    code = (
        "import sys; from compress.calibration.sources import whole_text\n"
        f"assert whole_text({source!r}, default_split='test') == 'text'\n"
        "assert 'datasets' not in sys.modules and 'pyarrow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
