"""The plan: a TOML file, or the same objects built in Python.

Every table is a frozen pydantic model and the world is closed: an unknown key, an unknown pass or an impossible value
is one `PlanError` that names file, line and key, the nearest valid name and the fix.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ByteSize, Field, PrivateAttr, SerializeAsAny, ValidationError, field_validator, model_validator

from compress.errors import PlanError, nearest
from compress.passes.base import Pass, Patterns, SettingError
from compress.plan_passes import find_pass, key_names, pass_classes, pass_from_table, refuse_python_names
from compress.plan_text import Location, Source
from compress.settings import Settings, wrong_shape
from compress.state import Pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic_core import ErrorDetails


LONGEST_NAME = 255  # bytes, on all file systems that are in use; a longer one makes every look-up fail

# Keys whose values may be paths.
PATHS = frozenset({"path", "source", "output", "perplexity", "include_path", "baseline", "store"})


class Model(Settings):
    """The model to compress."""

    path: str = Field(min_length=1, description="a local directory, or a hub id such as meta-llama/Llama-3.2-1B")
    revision: str | None = Field(default=None, description="hub revision (commit); needed for a reproducible lock")
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")


class Calibration(Settings):
    """Where calibration tokens come from and how they are cut."""

    source: str = Field(min_length=1, description='a txt, jsonl or parquet file, a hub dataset, or "self"')
    name: str | None = Field(default=None, description="configuration of the hub dataset")
    split: str | None = Field(default=None, description="split of the hub dataset")
    column: str | None = Field(default=None, description='the text column; default "text", or "messages" for chats')
    samples: int = Field(default=128, ge=1, le=1_000_000, description="rows")
    length: int = Field(default=2048, ge=2, le=1 << 24, description="tokens per row")
    seed: int = Field(default=0, ge=0)
    packing: Literal["windows", "documents"] = Field(default="windows", description="cut one stream, or pad documents")
    selection: Literal["random", "first"] = Field(default="random", description="which part of the text")
    chat_template: bool = Field(default=False, description="render each document through the chat template")
    special_tokens: bool = Field(default=True, description="let the tokenizer add its special tokens")


class Run(Settings):
    """Where and how to run."""

    output: str = Field(min_length=1, description="directory to create")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    memory: ByteSize | None = Field(default=None, gt=0, description='the peak the estimate must fit, as in "20GiB"')
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: torch's")
    refresh: Literal["block", "subset"] = Field(
        default="block", description="collect statistics once per block, or anew before each of its subsets"
    )


class Export(Settings):
    """A checkpoint format to write."""

    format: Literal["huggingface", "gptq", "compressed-tensors", "packed"] = Field(
        default="huggingface", description="plain weights, or codes in one of the formats that servers read"
    )
    shard_size: ByteSize = Field(default=ByteSize(5_000_000_000), gt=0, description="bytes per file at most")


class Evaluate(Settings):
    """What to measure on the emitted directory."""

    perplexity: Patterns = Field(default=(), description="text files or hub datasets")
    window: int | None = Field(default=None, ge=2, description="tokens; default: the model's context, 2048 at most")
    stride: int | None = Field(default=None, ge=1, description="tokens between windows; default: window")
    windows: int | None = Field(default=None, ge=1, description="evaluate only the first so many windows")
    special_tokens: bool = Field(default=True, description="let the tokenizer add its special tokens (one BOS)")
    divergence: bool = Field(default=True, description="KL divergence and top-1 agreement to the dense model")
    tasks: Patterns = Field(default=(), description="tasks of lm-eval by name, or FORM:FILE")
    limit: int | None = Field(default=None, ge=1, description="only the first so many samples of each task")
    batch_size: int = Field(default=16, ge=1, description="requests of a task that are computed together")
    num_fewshot: int | None = Field(default=None, ge=0, description="examples in a prompt; default: the task's")
    add_bos_token: bool | None = Field(default=None, description="whether prompts begin with BOS; default: tokenizer's")
    include_path: str | None = Field(default=None, description="a folder of task files of your own")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto", description="of activations and plain weights in tasks; auto: the checkpoint's"
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> Evaluate:
        if self.stride and self.window and self.stride > self.window:
            raise SettingError(f"stride {self.stride} skips tokens of window {self.window}", "stride <= window")
        return self


class Gate(Settings):
    """Whether the result is still as good as a baseline: the margins, and how sure the verdict must be."""

    baseline: str | None = Field(default=None, description="file of compress baseline; default: the dense model")
    margin: float = Field(default=0.01, gt=0, lt=1, description="how much accuracy may be lost: 0.01 is one point")
    perplexity_margin: float = Field(default=0.02, gt=0, description="how much perplexity may rise: 0.02 is 2 %")
    loglikelihood_margin: float | None = Field(
        default=None, gt=0, description="nats that right answers may lose; default: shown, not judged"
    )
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="rate of wrong verdicts, each way")
    power: float = Field(default=0.8, gt=0, lt=1, description="for the sample sizes that are stated")
    metrics: Patterns = Field(default=(), description="metrics to judge; default: of each kind a task's first")
    inconclusive: Literal["fail", "pass"] = Field(default="fail", description="what too few samples count as")
    resamples: int = Field(default=9999, ge=999, description="of the bootstrap")


class Track(Settings):
    """A tracker to send settings and figures to, once the output is there."""

    to: Literal["mlflow", "wandb", "trackio"] = Field(description="which one; install it beside compress")
    project: str = Field(default="compress", min_length=1, description="experiment or project")
    name: str | None = Field(default=None, min_length=1, description="of the run; default: the output's")
    store: str | None = Field(default=None, min_length=1, description="folder or URL; default: the tracker's own")


class Plan(Settings):
    """An ordered list of passes over one model and one calibration set."""

    model: Model
    calibration: Calibration | None = None
    run: Run
    passes: tuple[SerializeAsAny[Pass], ...] = Field(alias="pass", min_length=1)
    exports: tuple[Export, ...] = Field(default=(Export(),), alias="export", min_length=1, max_length=1)
    evaluate: Evaluate | None = None
    gate: Gate | None = None
    track: Track | None = None

    _source: Source | None = PrivateAttr(default=None)

    @field_validator("passes", mode="before")
    @classmethod
    def _from_tables(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            shown = "a table" if isinstance(value, dict) else repr(value)
            raise SettingError(f"must be a list of tables, not {shown}", "write [[pass]]")
        return tuple(item if isinstance(item, Pass) else pass_from_table(item) for item in value)

    @property
    def source(self) -> Source:
        """The text of the plan and where its keys stand; written out as TOML when the plan was built in Python."""
        return self._source or Source(None, self.to_toml())

    @property
    def folder(self) -> Path:
        """What relative paths are relative to: the plan file's folder, or the working directory."""
        return self.source.path.parent if self.source.path else Path()

    def refusal(self, index: int, error: SettingError) -> PlanError:
        """What a pass says of its settings, with the place in the plan."""
        return PlanError(str(error), where=self.source.where(("pass", index, *error.location)), fix=error.fix)

    def resolve(self, path: str) -> Path:
        """A path of the plan as one that can be opened."""
        return Path(os.path.normpath(self.folder / Path(path).expanduser()))

    def tables(self) -> dict[str, Any]:
        """The plan as TOML tables: what was set, under the plan's key names."""
        data = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        data["pass"] = [
            {"use": p.use()} | p.model_dump(mode="json", by_alias=True, exclude_unset=True) | _where(p)
            for p in self.passes
        ]
        return {key: _without_none(value) for key, value in data.items() if value is not None}

    def canonical(self) -> dict[str, Any]:
        """Every setting, defaults included, less those that change no byte of the output: the plan's identity."""
        data = self.model_dump(mode="json", by_alias=True, exclude={"run", "evaluate", "gate", "track"})
        data["run"] = {"refresh": self.run.refresh}
        data["pass"] = [{"use": p.use()} | p.model_dump(mode="json", by_alias=True) | _where(p) for p in self.passes]
        return data

    def to_toml(self) -> str:
        """The plan as a TOML file that builds the same plan."""
        import tomli_w

        return tomli_w.dumps(self.tables())


def _where(one: Pass) -> dict[str, Any]:
    tables = [table.model_dump(mode="json") | _spelled(table.overrides()) for table in one.where]
    return {"where": tables} if tables else {}


def _spelled(overrides: dict[str, Any]) -> dict[str, Any]:
    """Patterns as a plan file spells them; Python may have given the object."""
    return {key: str(value) for key, value in overrides.items() if isinstance(value, Pattern)}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def load_plan(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: the file cannot be read, is not TOML, or says something impossible.
    """
    return parse_plan(_text(Path(path)), Path(path))


def load_gate(path: Path) -> dict[str, Any]:
    """What a plan file states under `[gate]`: the rest, such as passes of one's own, need not be there any more.

    Raises:
        PlanError: the file cannot be read, is not TOML, or has something else there.
    """
    found = _tables(Source(path, _text(path))).get("gate", {})
    if not isinstance(found, dict):
        raise PlanError("gate is no table", where=str(path), fix="write [gate], or leave it out")
    return found


def parse_plan(text: str, path: Path | None = None) -> Plan:
    """The plan that a TOML text describes; `path` names it in messages and anchors its relative paths."""
    source = Source(path, text)
    return plan_from_tables(_tables(source), source)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        others = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise PlanError(f"no such plan{nearest(path.name, others)}", where=str(path), fix="give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan: {error}", where=str(path), fix="give a UTF-8 TOML file") from None


def _tables(source: Source) -> dict[str, Any]:
    try:
        return tomllib.loads(source.text)
    except (ValueError, RecursionError) as error:  # beside TOMLDecodeError: numbers too long, arrays too deep
        line = re.search(r"at line (\d+)", str(error))
        where = f"{source.name}:{line[1]}" if line else source.name
        raise PlanError(f"not valid TOML: {error}", where=where, fix="correct the syntax at that place") from None


def plan_from_tables(data: dict[str, Any], source: Source) -> Plan:
    """Validate TOML tables. Passes are built one by one, so that an error knows which class it is about."""
    data = dict(data)
    try:
        refuse_python_names(Plan, data)
    except SettingError as error:
        raise PlanError(str(error), where=source.where(error.location), fix=error.fix) from None
    for location, text in _strings(data):
        if "\0" in text:
            raise PlanError("holds a NUL character", where=source.where(location), fix="remove it")
        longest = max(map(len, text.encode(errors="replace").split(b"/")))
        if longest > LONGEST_NAME and (location[0] != "pass" or location[-1] == "source"):
            problem = f"has a part of {longest:,} bytes, longer than the name of any file"
            raise PlanError(problem, where=source.where(location), fix="correct it")
        if not PATHS.isdisjoint(location):
            try:
                Path(text).expanduser()
            except RuntimeError:
                problem = f'"{text}" is in the home of nobody'
                raise PlanError(problem, where=source.where(location), fix="correct the path") from None
    tables = data.get("pass", [])
    if isinstance(tables, list):
        built: list[Pass] = []
        for index, table in enumerate(tables):
            try:
                built.append(pass_from_table(table))
            except ValidationError as error:
                cls = find_pass(table["use"])
                raise _explain(error, cls, source, ("pass", index)) from None
            except SettingError as error:
                place = ("pass", index, *(error.location or ("use",))) if isinstance(table, dict) else ("pass", index)
                raise PlanError(str(error), where=source.where(place), fix=error.fix) from None
        data["pass"] = built
    try:
        plan = Plan(**data)
    except ValidationError as error:
        raise _explain(error, Plan, source, ()) from None
    plan._source = source
    return plan


def _strings(value: Any, location: Location = ()) -> Iterator[tuple[Location, str]]:
    """Every string of nested tables and where it stands."""
    if isinstance(value, str):
        yield location, value
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(item, (*location, key))


def _explain(error: ValidationError, cls: type[Settings], source: Source, prefix: Location) -> PlanError:
    """The first problem pydantic found, in the words of this project."""
    # A misspelt key is also a missing one: say the first.
    errors = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    # A list whose items are wrong is also said to be too short.
    errors = [e for e in errors if e["type"] != "too_short" or e["loc"] == errors[0]["loc"]]
    first = errors[0]
    location: Location = prefix + tuple(first["loc"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    cause = first.get("ctx", {}).get("error")
    owner = _owner(cls, tuple(first["loc"]))
    key = str(location[-1]) if location else ""
    if first["type"] == "extra_forbidden":
        names = key_names(owner)
        problem = f'unknown key "{key}"{nearest(key, names)}'
        fix = f"the keys of this table are {', '.join(names)}"
    elif first["type"] == "missing":
        table = location == (key,)
        problem, fix = f'"{key}" is missing', f"add the table [{key}]" if table else f"add {key} = ..."
    elif isinstance(cause, SettingError):
        problem, fix = str(cause), cause.fix
        location += cause.location
    elif location == ("pass",) and first["type"] == "too_short":
        problem, fix = "there is no pass", f"add [[pass]] with use = one of {', '.join(sorted(pass_classes()))}"
    elif location == ("export",) and first["type"] == "too_long":
        problem, fix = "this version writes one format", "keep one [[export]]"
    elif shape := _shape(first, cls, prefix):
        problem, fix = shape
    else:
        problem = f"{first['msg']}, not {first['input']!r}" if "input" in first else first["msg"]
        fix = _described(owner, key)
        if cause is not None:
            problem = f"{cause}, not {first['input']!r}"
    return PlanError(problem + more, where=source.where(location), fix=fix)


def _described(owner: type[Settings], key: str) -> str:
    field = owner.model_fields.get(_field_name(owner, key))
    return f"{key} is {field.description}" if field and field.description else "correct the value"


def _shape(error: ErrorDetails, cls: type[Settings], prefix: Location) -> tuple[str, str] | None:
    """Problem and fix of a table or a value that should be a list, or the other way round; None for other errors."""
    names = [part for part in error["loc"] if isinstance(part, str)]
    owner = _owner(cls, tuple(names))
    field = owner.model_fields.get(_field_name(owner, names[-1])) if names else None
    if field is None:
        return None
    place = ".".join([str(part) for part in prefix if isinstance(part, str)] + names)
    found = wrong_shape(error["type"], error["input"], field.annotation, place)
    return (found[0], found[1] or _described(owner, names[-1])) if found else None


def _owner(cls: type[Settings], location: Location) -> type[Settings]:
    """The model class in which the last key of a location stands."""
    for part in location[:-1]:
        field = cls.model_fields.get(_field_name(cls, str(part)))
        for candidate in _classes(field.annotation if field else None):
            cls = candidate
    return cls


def _classes(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _classes(inner)


def _field_name(cls: type[Settings], key: str) -> str:
    return next((name for name, field in cls.model_fields.items() if key in (name, field.alias)), key)
