"""Where calibration and evaluation text comes from: a local file or a dataset of the Hugging Face hub.

A document is a string or one conversation, a list of chat messages ``{"role": ..., "content": ...}``.

=========  ==========================================================  =============================
source     documents                                                   the whole text
=========  ==========================================================  =============================
.txt       paragraphs, separated by blank lines                        the file's content, verbatim
.jsonl     one object per line, its column                             rows joined with a blank line
.json      a JSON array of objects, or what a .jsonl holds             rows joined with a blank line
.parquet   one row, its column; row groups are streamed                rows joined with a blank line
the hub    one row, its column; streamed, never downloaded as a whole  rows joined with a blank line
=========  ==========================================================  =============================

Joining rows with a blank line, the empty rows included, is the convention of published WikiText-2 perplexities
(METHODS.md 0.1; any other choice moves the number by 10 % and more, EVALS.md).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from compress.calibration.rows import check_regular, decode, modest, parquet_rows, read, unreadable
from compress.calibration.rows import json_rows as json_rows  # tasks read files by it; see compress.evals.tasks
from compress.errors import PlanError, nearest
from compress.limits import GIB, each_within

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Document: TypeAlias = str | list[dict[str, Any]]

SEPARATOR = "\n\n"
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
COLUMNS = ("text", "messages")
HUB_MEMORY = 8 * GIB  # for reading the next row, the buffer of a shuffle included
SHUFFLE_ROWS = 10_000  # rows held by a streamed shuffle: the default of datasets' own streaming guide

_BLANK_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LOCAL_FILE = "give a local .txt, .jsonl or .parquet file as the source"


@dataclass(frozen=True)
class HubDataset:
    """A hub dataset behind a short name; `splits` maps train, validation and test to the names it uses."""

    repository: str
    name: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)


DATASETS: dict[str, HubDataset] = {
    "wikitext": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": HubDataset("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "c4": HubDataset("allenai/c4", "en", {"test": "validation"}),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "sample-10BT"),
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "ultrachat": HubDataset(
        "HuggingFaceH4/ultrachat_200k", None, {"train": "train_sft", "validation": "test_sft", "test": "test_sft"}
    ),
}


class Documents(ABC):
    """The documents of one source, read anew at each iteration.

    Iterating raises PlanError where the source cannot be read, a row has no such column, or there is no document.
    """

    where: str

    @abstractmethod
    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in the order in which they are stored."""

    def shuffled(self, seed: int) -> Iterator[Document]:
        """Yield every document once, in an order drawn from `seed`; holds them all in memory."""
        documents = list(self)
        random.Random(seed).shuffle(documents)
        return iter(documents)

    def whole_text(self) -> str:
        """All documents as one text; PlanError where they are chat messages."""
        parts: list[str] = []
        for document in self:
            if not isinstance(document, str):
                raise PlanError(
                    "holds chat messages where plain text is needed", where=self.where, fix="name a column of text"
                )
            parts.append(document)
        return SEPARATOR.join(parts)


@dataclass(frozen=True)
class TextFile(Documents):
    """A .txt file."""

    path: Path

    @property
    def where(self) -> str:  # type: ignore[override]
        """The file."""
        return str(self.path)

    def __iter__(self) -> Iterator[Document]:
        """Yield the paragraphs."""
        yield from paragraphs(self.whole_text())

    def whole_text(self) -> str:
        """The content verbatim, without a byte order mark."""
        text = decode(read(self.path), self.path)
        if not text.strip():
            raise _empty(self.where)
        return text


@dataclass(frozen=True)
class FileRows(Documents):
    """The rows of a .jsonl, .json or .parquet file."""

    path: Path
    column: str | None

    @property
    def where(self) -> str:  # type: ignore[override]
        """The file."""
        return str(self.path)

    def __iter__(self) -> Iterator[Document]:
        """Yield one document per row."""
        if _suffix(self.path) == ".parquet":
            rows = parquet_rows(self.path, lambda names: _column(names, self.column, self.where))
        else:
            rows = json_rows(self.path)
        return modest(_documents(rows, self.column, self.where), self.path)


@dataclass(frozen=True)
class HubRows(Documents):
    """The rows of a split of a hub dataset (or of a local directory laid out as one), streamed."""

    repository: str
    name: str | None
    split: str
    column: str | None

    @property
    def where(self) -> str:  # type: ignore[override]
        """The dataset, its configuration and split."""
        return ", ".join(filter(None, (self.repository, self.name, f"split {self.split}")))

    def __iter__(self) -> Iterator[Document]:
        """Yield one document per row."""
        return _documents(self._rows(None), self.column, self.where)

    def shuffled(self, seed: int) -> Iterator[Document]:
        """Shuffle shards and a buffer of rows only: a web-scale dataset never fits in memory."""
        return _documents(self._rows(seed), self.column, self.where)

    def _rows(self, seed: int | None) -> Iterator[tuple[str, Any]]:
        # datasets lets the exceptions of fsspec, httpx, pyarrow and the hub through: whatever it raises, the source
        # cannot be read, and the user needs the name that was tried and a way out rather than a traceback.
        try:
            from datasets import load_dataset  # here, because it takes a second and files do not need it

            dataset = load_dataset(self.repository, self.name, split=self.split, streaming=True)
            if seed is not None:
                dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS)
            rows = each_within(dataset, HUB_MEMORY)
        except Exception as error:
            raise self._unreadable(error) from error
        number = 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from error
            number += 1
            yield f"{self.where}, row {number}", row

    def _unreadable(self, error: Exception) -> PlanError:
        reason = " ".join(str(error).split())[:500]
        return PlanError(
            f"cannot load this dataset with Hugging Face datasets ({type(error).__name__}: {reason})",
            where=self.where,
            fix=f"check its name, configuration and split, the network and the login (hf auth login), or {_LOCAL_FILE}",
        )


def is_file(source: str) -> bool:
    """Whether `source` means a local file rather than a hub dataset.

    A short name of `DATASETS` is always the dataset (write ./c4 for a file of that name), and a directory is a dataset
    in the hub's layout. Anything else that exists, ends like a data file or starts like a path is a file.
    """
    if source in DATASETS or Path(source).expanduser().is_dir():
        return False
    looks_local = source.startswith(("/", "./", "../", "~"))
    return looks_local or Path(source).exists() or _suffix(Path(source)) in SUFFIXES


def texts(
    source: str,
    *,
    name: str | None = None,
    split: str | None = None,
    column: str | None = None,
    default_split: str,
) -> Documents:
    """The documents of `source`.

    `name` is the configuration of a hub dataset, `split` its split (`default_split` where None), `column` the column
    of rows ("text" where None, else "messages"). Raises PlanError for a missing file, an unknown kind of file or
    dataset, or a setting the source does not have; reading the documents raises PlanError where a row is malformed.
    """
    if not is_file(source):
        return _hub_rows(source, name, split, column, default_split)
    path = Path(source).expanduser()
    unused = {"name": name, "split": split, "column": column if _suffix(path) == ".txt" else None}
    for key, value in unused.items():
        if value is not None:
            raise PlanError(f'a {path.suffix} file has no {key} "{value}"', where=source, fix=f"remove {key}")
    if not path.is_file():
        raise PlanError("no such file", where=source, fix="correct the path; in a plan it is relative to the plan file")
    if _suffix(path) not in SUFFIXES:
        raise PlanError(f'"{path.suffix}" is not a kind of text file', where=source, fix=f"use {', '.join(SUFFIXES)}")
    return TextFile(path) if _suffix(path) == ".txt" else FileRows(path, column)


def whole_text(
    source: str,
    *,
    name: str | None = None,
    split: str | None = None,
    column: str | None = None,
    default_split: str,
) -> str:
    """The evaluation text of `source`: a .txt verbatim, rows joined with a blank line (the field's convention).

    Raises PlanError like `texts`, and where rows are chat messages.
    """
    return texts(source, name=name, split=split, column=column, default_split=default_split).whole_text()


def paragraphs(text: str) -> Iterator[str]:
    """Yield the parts of `text` between blank lines, none of them blank."""
    return (part for part in (piece.strip("\r\n") for piece in _BLANK_LINES.split(text)) if part.strip())


def file_digest(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex. Raises PlanError where it cannot be read."""
    try:
        check_regular(Path(path).expanduser())
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(Path(path), error) from error


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _hub_rows(source: str, name: str | None, split: str | None, column: str | None, default_split: str) -> HubRows:
    if Path(source).expanduser().is_dir():
        known = HubDataset(str(Path(source).expanduser()))
    elif source in DATASETS:
        known = DATASETS[source]
    elif _HUB_NAME.fullmatch(source):
        known = HubDataset(source)
    else:
        raise PlanError(
            f"neither a file nor a dataset{nearest(source, DATASETS)}",
            where=source,
            fix=f'give a path ending in {", ".join(SUFFIXES)}, a hub dataset as "organisation/name", or one of '
            + ", ".join(DATASETS),
        )
    # The user's own split is taken as written; only the default is translated to the dataset's habit.
    chosen = split or known.splits.get(default_split, default_split)
    return HubRows(known.repository, name or known.name, chosen, column)


def _documents(rows: Iterable[tuple[str, Any]], column: str | None, where: str) -> Iterator[Document]:
    empty = True
    for place, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise PlanError("a row is not an object", where=place, fix='write {"text": "..."}')
        yield _checked(row[_column(row, column, place)], place)
    if empty:
        raise _empty(where)


def _column(existing: Iterable[str], column: str | None, where: str) -> str:
    names = list(existing)
    for candidate in COLUMNS if column is None else (column,):
        if candidate in names:
            return candidate
    wanted = '"text" or "messages"' if column is None else f'"{column}"'
    raise PlanError(
        f"no column {wanted}; the columns are {', '.join(names) or 'none'}{nearest(column or 'text', names)}",
        where=where,
        fix="set column to one of them",
    )


def _checked(value: Any, where: str) -> Document:
    """`value` if it is a document that tokenizers accept."""
    if not (isinstance(value, str) or _is_chat(value)):
        raise PlanError(
            f"a document is neither text nor a list of chat messages but {type(value).__name__}",
            where=where,
            fix='choose a column of strings, or of lists of {"role": ..., "content": ...}',
        )
    try:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError as error:
        raise PlanError("the text holds an unpaired surrogate", where=where, fix="repair or remove the row") from error
    document: Document = value
    return document


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _empty(where: str) -> PlanError:
    return PlanError("is empty", where=where, fix="give a source with text")
