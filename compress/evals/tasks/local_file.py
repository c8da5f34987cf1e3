"""What the task files beside this one call: their documents, from a file, and their counts.

lm-eval loads this module by its place, so that its own command runs these tasks too:
``lm-eval run --include_path FOLDER --tasks minimal_pairs --metadata '{"file": "pairs.jsonl"}' ...``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.calibration import sources
from compress.errors import PlanError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

INDICES = {"gold": "choices", "label": "endings"}  # a field that is an index, and the list that it points into


def documents(file: str | None = None, **_: Any) -> dict[str, Any]:
    """The documents of a .txt, .jsonl or .parquet file, each as ``{"text": ...}``, as the split "test"."""
    found = [{"text": text} for text in sources.texts(_given(file), default_split="test") if str(text).strip()]
    if not all(isinstance(row["text"], str) for row in found):
        raise PlanError("holds chat messages", where=file, fix="give plain text")
    return _split(found, _given(file))


def rows(file: str | None = None, fields: Iterable[str] = (), **_: Any) -> dict[str, Any]:
    """The rows of a .jsonl or .json file, of each the `fields`, as the split "test".

    Raises:
        PlanError: a row lacks a field, or its index leads nowhere; with file and line.
    """
    path = Path(_given(file))
    return _split([_row(row, fields, where) for where, row in sources.json_rows(path)], str(path))


def _row(row: Any, fields: Iterable[str], where: str) -> dict[str, Any]:
    names = ", ".join(fields)
    if not isinstance(row, dict):
        raise PlanError("is no object", where=where, fix=f"give an object with {names}")
    for field in fields:
        if field not in row:
            raise PlanError(f'lacks the field "{field}"{nearest(field, row)}', where=where, fix=f"give {names}")
    found = {field: row[field] for field in fields}
    for field, values in INDICES.items():
        if field in found:
            found[field] = _index(found[field], found[values], field, values, where)
    return found


def _index(value: Any, values: Any, field: str, name: str, where: str) -> int:
    if not isinstance(values, list) or not values or not all(isinstance(one, str) and one for one in values):
        raise PlanError(f'"{name}" must be a list of texts', where=where, fix="give the answers to choose from")
    if isinstance(value, str) and value.isdigit():  # as the hub's HellaSwag has it
        value = int(value)
    if not isinstance(value, int) or not 0 <= value < len(values):
        fix = f"{field} is the index, from 0, of the right one among {len(values)} {name}"
        raise PlanError(f'"{field}" is {value!r}', where=where, fix=fix)
    return value


def rolling(doc: dict[str, Any], results: Any) -> dict[str, tuple[float, int]]:
    """Log-likelihood and size of a document. Words are counted as lm-eval's `wikitext` does: at white space."""
    (loglikelihood,) = results
    words, size = len(re.split(r"\s+", doc["text"])), len(doc["text"].encode())
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, size),
        "bits_per_byte": (loglikelihood, size),
    }


def _given(file: str | None) -> str:
    if file is None:
        raise PlanError("this task needs a file", fix='write TASK:FILE, or give lm-eval --metadata \'{"file": "..."}\'')
    return file


def _split(found: list[dict[str, Any]], where: str) -> dict[str, Any]:
    from datasets import Dataset

    if not found:
        raise PlanError("holds no document", where=where, fix="give a file with at least one")
    try:
        return {"test": Dataset.from_list(found)}
    except Exception as error:  # pyarrow has an error of its own for each kind of value that differs between rows
        raise PlanError(f"its rows do not have the same types: {error}", where=where, fix="correct the file") from None
