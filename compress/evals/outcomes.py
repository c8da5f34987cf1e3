"""What an evaluation found, sample by sample: readable JSON, and a compact parquet file beside it.

A baseline and an entry of the cache are both such a pair of files.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError
from pydantic_core import from_json

from compress.calibration.rows import read
from compress.calibration.sources import file_digest
from compress.errors import PlanError
from compress.evals.results import Measured
from compress.limits import GIB, within
from compress.model_files import MAX_JSON
from compress.report import replace_text
from compress.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

SCHEMA_VERSION = 1
MAX_SAMPLES = 20_000_000  # of all tasks; MMLU has 56,000 with its four choices
READING, READING_MEMORY = 600.0, 8 * GIB  # seconds and bytes for the file of samples
NO_BASELINE = "give a file that compress baseline wrote, or write it again"


@dataclass(frozen=True, slots=True)
class Sample:
    """One document of a task under one filter of it.

    `doc` and `prompt` are hashes (16 hex digits): of the document, and of all that was asked of it, targets included.
    `loglikelihoods` (nats) and `greedy` have one entry per request; `gold` is the index of the right one in a multiple
    choice. `metrics` are what the harness aggregates: one number, or a log-likelihood and its weight.
    """

    filter: str
    doc_id: int
    doc: str
    prompt: str
    loglikelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    gold: int | None
    metrics: dict[str, tuple[float, ...]]

    @property
    def identity(self) -> tuple[str, str, str]:
        """What a sample of another run must have, to be the same sample."""
        return self.filter, self.doc, self.prompt

    @property
    def answer(self) -> int | None:
        """The choice that the model prefers; of equal ones the first, as in lm-eval."""
        return self.loglikelihoods.index(max(self.loglikelihoods)) if len(self.loglikelihoods) > 1 else None

    @property
    def tied(self) -> bool:
        """Whether the preferred choice has an equal."""
        return len(self.loglikelihoods) > 1 and self.loglikelihoods.count(max(self.loglikelihoods)) > 1


def filters_of(samples: Iterable[Sample]) -> list[str]:
    """The filters of a task, in its order; each document has a sample under each of them."""
    return list(dict.fromkeys(sample.filter for sample in samples))


def metric_name(metric: str, chosen: str) -> str:
    """A metric under a filter, as it is shown: "exact_match,strict-match", or "acc" under the default one."""
    return metric if chosen == "none" else f"{metric},{chosen}"


class Task(Settings):
    """One task: how it was asked, and the harness's own figures. `hash` is that of its configuration."""

    name: str
    spec: str  # as the plan or the command names it
    hash: str
    prompts: str  # hash over the prompts of all samples, whatever their order
    version: str
    num_fewshot: int
    output_type: str
    samples: int  # documents
    metrics: dict[str, Measured]  # by `metric_name`
    aggregation: dict[str, str]  # "mean", "perplexity", "weighted_perplexity", ...
    higher_is_better: dict[str, bool]


class Outcomes(Settings):
    """The tasks of one model under one set of conditions; `samples` of each."""

    schema_version: int = SCHEMA_VERSION
    compress_version: str
    model: str  # the directory's name
    model_hash: str
    tokenizer_hash: str
    harness: str  # version of lm-eval
    versions: dict[str, str]
    device: str
    dtype: Literal["auto", "float16", "bfloat16", "float32"]
    batch_size: int = Field(ge=1)
    limit: int | None = Field(ge=1)
    num_fewshot: int | None = Field(ge=0)
    add_bos_token: bool | None
    include_path: str | None = None  # of a baseline: relative to its folder
    tasks: tuple[Task, ...]
    groups: dict[str, dict[str, Measured]] = Field(default_factory=dict)  # aggregates of lm-eval's groups
    samples_file: str | None = None
    samples_sha256: str | None = None

    _samples: dict[str, list[Sample]] = PrivateAttr(default_factory=dict)

    @property
    def samples(self) -> dict[str, list[Sample]]:
        """The samples of each task, by its name."""
        return self._samples

    def with_samples(self, samples: dict[str, list[Sample]]) -> Outcomes:
        """Attach samples."""
        self._samples = samples
        return self

    def save(self, path: Path) -> None:
        """Write ``path``, JSON, and beside it the samples as ``.parquet``; each replaced whole or left as it was."""
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]

        beside = path.with_suffix(".parquet")
        temporary = beside.with_name(f".{beside.name}.{os.getpid()}")  # two commands may keep the same result at once
        try:
            parquet.write_table(_table(self._samples), temporary, compression="zstd")
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
            temporary.replace(beside)
        finally:
            temporary.unlink(missing_ok=True)
        named = self.model_copy(update={"samples_file": beside.name, "samples_sha256": digest})
        replace_text(path, named.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Outcomes:
        """Read what `save` wrote.

        Raises:
            PlanError: a file is missing, damaged, of another kind or of a newer version.
        """
        try:
            written = read(path, MAX_JSON)
            if b'"lm_eval_version"' in written:
                raise ValueError("it is a result of lm-eval's own command, without the samples that a gate compares")
            content = from_json(written, allow_inf_nan=False)
            version = content.get("schema_version") if isinstance(content, dict) else None
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise ValueError(f"it has schema version {version}, and this compress reads up to {SCHEMA_VERSION}")
            if (odd := _unprintable(content)) is not None:
                raise ValueError(f"{odd!a} holds characters that cannot be printed")
            found = cls.model_validate(content)
            if found.samples_file is None or found.samples_file != Path(found.samples_file).name:
                raise ValueError('"samples_file" names no file beside it')
            beside = path.parent / found.samples_file
            if file_digest(beside) != found.samples_sha256:
                raise ValueError(f"{beside.name} is not the file that belongs to it")
            return found.with_samples(_read_samples(beside, found.tasks))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"])) or "the document"
            raise PlanError(f"{key}: {first['msg']}", where=str(path), fix=NO_BASELINE) from None
        except PlanError as error:
            raise PlanError(error.problem, where=error.where, fix=NO_BASELINE) from None
        except Exception as error:  # pyarrow has an error of its own for each kind of damage
            reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
            raise PlanError(f"cannot be read: {reason}", where=str(path), fix=NO_BASELINE) from None


def _unprintable(value: Any) -> str | None:
    """A name or a text of a JSON document that a terminal would obey."""
    if isinstance(value, str):
        return None if value.isprintable() else value[:100]
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((odd for one in inner if (odd := _unprintable(one)) is not None), None)


def prompts_hash(samples: Iterable[Sample]) -> str:
    """SHA-256 over what was asked, whatever the order: how often, under which filter."""
    counted = Counter(sample.identity for sample in samples)
    return hashlib.sha256(repr(sorted(counted.items())).encode()).hexdigest()


def _schema() -> Any:
    import pyarrow as pa

    names, numbers = pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.float64())
    hashes = pa.binary(8)
    return pa.schema(
        {
            "task": names,
            "filter": names,
            "doc_id": pa.int64(),
            "doc": hashes,
            "prompt": hashes,
            "loglikelihoods": numbers,
            "greedy": pa.list_(pa.bool_()),
            "gold": pa.int32(),
            "metrics": pa.map_(pa.string(), numbers),
        }
    )


def _table(samples: dict[str, list[Sample]]) -> Any:
    import pyarrow as pa

    rows = [
        {
            "task": task,
            "filter": one.filter,
            "doc_id": one.doc_id,
            "doc": bytes.fromhex(one.doc),
            "prompt": bytes.fromhex(one.prompt),
            "loglikelihoods": one.loglikelihoods,
            "greedy": one.greedy,
            "gold": one.gold,
            "metrics": list(one.metrics.items()),
        }
        for task, found in samples.items()
        for one in found
    ]
    return pa.Table.from_pylist(rows, schema=_schema())


def _read_samples(path: Path, tasks: tuple[Task, ...]) -> dict[str, list[Sample]]:
    """The samples of a file, which must be as many for each task as that says."""
    import pyarrow.parquet as parquet

    def read() -> dict[str, list[Sample]]:
        rows, wanted = parquet.read_metadata(path).num_rows, sum(task.samples for task in tasks)
        if rows < wanted or rows > MAX_SAMPLES:  # a task has a row for each sample and filter
            raise ValueError(f"{path.name} has {rows:,} rows, for tasks of {wanted:,} samples")
        return _samples(parquet.read_table(path))

    found = within(read, seconds=READING, memory=READING_MEMORY)
    absent = [task.name for task in tasks if task.name not in found]
    if absent or len(found) > len(tasks):
        raise ValueError(f"{path.name} has samples of other tasks than {', '.join(task.name for task in tasks)}")
    return found


def _samples(table: Any) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    if not table.schema.equals(_schema()):
        raise ValueError("the columns of the samples are not the ones that are known")
    if any(table[name].null_count for name in table.column_names if name != "gold"):
        raise ValueError("a sample lacks a value")
    for row in table.to_pylist():
        sample = Sample(
            filter=row["filter"],
            doc_id=row["doc_id"],
            doc=row["doc"].hex(),
            prompt=row["prompt"].hex(),
            loglikelihoods=tuple(row["loglikelihoods"]),
            greedy=tuple(row["greedy"]),
            gold=row["gold"],
            metrics={name: tuple(values) for name, values in row["metrics"]},
        )
        if None in (*sample.loglikelihoods, *sample.greedy, *(n for m in sample.metrics.values() for n in m)):
            raise ValueError("a sample lacks a value")
        if sample.gold is not None and not 0 <= sample.gold < len(sample.loglikelihoods):
            raise ValueError(f"of {len(sample.loglikelihoods)} choices none is number {sample.gold}")
        found.setdefault(row["task"], []).append(sample)
    return found
