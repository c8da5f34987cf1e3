"""The report of a run: report.json (the models below are its schema), report.html and the closing terminal table.

docs/report.md explains every field. Sizes are bytes, durations seconds, shares lie in 0..1. A measured number that is
not finite becomes null, so that report.json stays valid JSON and a ruined model still gets its report.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined
from pydantic import BeforeValidator, Field, JsonValue, ValidationError
from pydantic_core import from_json, to_jsonable_python
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from compress.errors import PlanError
from compress.evals.results import Divergence, GateResult, Measured, TaskLine, TasksInfo
from compress.model_files import check_file
from compress.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

SCHEMA_VERSION = 1
PassSettings = Annotated[dict[str, JsonValue], BeforeValidator(to_jsonable_python)]  # takes tuples, paths and enums
ErrorKind = Literal["gram", "diagonal", "weight"]  # the statistic behind an error: all of XᵀX, its diagonal, or none


class ModelInfo(Settings):  # the dense model as it was read
    path: str
    architecture: str
    parameters: int
    bytes: int


class OutputInfo(Settings):  # what was written; path is the directory's name only, so that a report can be shared
    path: str
    bytes: int
    parameters: int
    nonzero_parameters: int
    linear_sparsity: float
    format: str = "huggingface"  # as in [[export]]
    adapter: bool = False  # whether there are low-rank branches beside the weights
    heterogeneous: bool = False  # whether blocks have different widths
    linear_bits: float | None = None  # stored per weight of the block linears: codes, scales, zero-points, masks


class Environment(Settings):  # what the run ran on
    python: str
    torch: str
    transformers: str
    device: str
    threads: int
    platform: str


class CalibrationInfo(Settings):  # digest is the hash of the tokens and the token mask
    source: str
    samples: int
    length: int
    tokens: int
    digest: str


class PassSummary(Settings):  # relative_error is the mean over the pass's linears, after it
    index: int
    use: str
    settings: PassSettings
    linears: int
    seconds: float
    relative_error: Measured = None
    error_kind: ErrorKind | None = None
    sparsity: float


class LedgerLine(Settings):
    """One linear through one pass. Errors are ‖(W−Ŵ)X‖² / ‖WX‖² against the dense weight."""

    sweep: int
    block: int | None  # None: outside the blocks, as lm_head
    linear: str
    pass_index: int
    use: str
    out_features: int
    in_features: int
    sparsity: float
    bits: int | None = None  # of its codes, where it has any
    error_before: Measured = None
    error_after: Measured = None
    error_kind: ErrorKind
    tokens: int
    damping: float | None = None
    dead_columns: int = 0
    fallback: str | None = None
    detail: str | None = None  # what else the pass says of its choice
    seconds: float


class BlockLine(Settings):  # one decoder block of one sweep
    sweep: int
    index: int
    seconds: float
    peak_memory_bytes: int


class TextScore(Settings):  # nll is in nats per target; None: not finite
    perplexity: Measured
    bits_per_byte: Measured = None
    nll: Measured


class EvaluationLine(Settings):
    """One text, the convention it was scored by, and the scores. ``tokens`` counts the targets."""

    text: str
    window: int
    stride: int
    windows: int
    tokens: int
    dense: TextScore | None = None
    compressed: TextScore
    divergence: Divergence | None = None

    @property
    def convention(self) -> str:
        """How the perplexity was taken: two perplexities compare only when this agrees."""
        window = f"window {self.window:,}, stride {self.stride:,}, {self.windows:,} windows"
        return f"{window}, {self.tokens:,} targets, one tokenizer call"


class VerifiedInfo(Settings):  # read back from disk and compared bit for bit
    tensors: int
    bytes: int


class Report(Settings):
    """All that is known about one run."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1)
    compress_version: str
    model: ModelInfo
    output: OutputInfo
    environment: Environment
    calibration: CalibrationInfo | None = None
    passes: tuple[PassSummary, ...] = ()
    linears: tuple[LedgerLine, ...] = ()
    blocks: tuple[BlockLine, ...] = ()
    evaluation: tuple[EvaluationLine, ...] = ()
    tasks: tuple[TaskLine, ...] = ()
    tasks_info: TasksInfo | None = None
    gate: GateResult | None = None
    phases: dict[str, float] = Field(default_factory=dict)
    peak_memory_bytes: int
    estimated_memory_bytes: int
    resumed: int = 0
    warnings: tuple[str, ...] = ()
    plan_toml: str
    verified: VerifiedInfo


def write_report(report: Report, directory: Path | str) -> None:
    """Write report.json and report.html into `directory`, each replaced whole or left as it was."""
    settings: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    templates = Templates(loader=FileSystemLoader(Path(__file__).parent), extensions=["jinja2.ext.do"], **settings)
    words = (
        figure,
        human_bytes,
        human_seconds,
        percent,
        described,
        comparison,
        notices,
        _kinds,
        _decades,
        _steps,
        signed,
    )
    templates.globals.update({word.__name__.lstrip("_"): word for word in words}, log10=math.log10)
    # The page comes last: whatever happens to it, the numbers are safe.
    replace_text(Path(directory) / "report.json", report.model_dump_json(indent=2) + "\n")
    replace_text(Path(directory) / "report.html", templates.get_template("report.html.jinja").render(report=report))


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` through a temporary file beside it: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_report(directory: Path | str) -> Report:
    """Read the report of an output directory; PlanError when there is none that this version understands."""
    path, fix = Path(directory) / "report.json", "give an output directory of compress, or run the plan again"
    check_file(path, Path(directory))
    try:
        content = from_json(path.read_bytes(), allow_inf_nan=False)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            fix = "install the newer compress that wrote it"
            raise ValueError(f"it has schema version {version}, and this compress reads up to {SCHEMA_VERSION}")
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise PlanError(f"{key}: {first['msg']}", where=str(path), fix=fix) from error
    except (OSError, ValueError) as error:
        raise PlanError(f"the report cannot be read: {error}", where=str(path), fix=fix) from error


def print_summary(report: Report, console: Console) -> None:
    """Print the closing tables; lines fit the console, and names cannot carry markup or control codes."""

    def plain(text: str) -> Text:
        shown = "".join(char if char.isprintable() else "?" for char in text.replace("\n", " "))
        return Text(shown.encode(console.encoding, "replace").decode(console.encoding))

    def table(first: str, *others: str) -> Table:
        columns = (Column(first, overflow="fold"), *(Column(name, justify="right", overflow="fold") for name in others))
        return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, show_edge=False)

    console.print(plain(f"{report.model.path}  ->  {report.output.path}"), style="bold", end="\n\n")
    sizes, steps = table("", "before", "after", "change"), table("pass", "linears", "pruned", "relative error", "time")
    for row in comparison(report):
        sizes.add_row(*map(plain, row))
    for step in report.passes:
        error = f"{figure(step.relative_error)} {step.error_kind or ''}".rstrip()
        cells = (f"{step.linears:,}", percent(step.sparsity), error, human_seconds(step.seconds))
        steps.add_row(*map(plain, (f"{step.index} {described(step)}", *cells)))
    for grid in (sizes, steps) if report.passes else (sizes,):
        console.print(grid)
        console.print()
    for notice in notices(report):
        console.print(plain(notice))
    for warning in report.warnings:
        console.print(plain(f"warning: {warning}"), style="yellow")


def comparison(report: Report) -> list[tuple[str, str, str, str]]:
    """Rows (what, before, after, change) for the terminal, the page and the card; "-" where there is nothing."""
    model, output = report.model, report.output
    rows = [
        ("weights on disk", human_bytes(model.bytes), human_bytes(output.bytes), change(model.bytes, output.bytes)),
        ("parameters", f"{model.parameters:,}", f"{output.parameters:,}", change(model.parameters, output.parameters)),
        ("  of these not pruned", "-", f"{output.nonzero_parameters:,}", "-"),
        ("pruned in linears", "-", percent(output.linear_sparsity), "-"),
    ]
    if output.linear_bits is not None:
        rows.append(("bits per weight in linears", "-", figure(output.linear_bits), "-"))
    for line in report.evaluation:
        dense, score, divergence = line.dense, line.compressed, line.divergence
        old, new = dense.perplexity if dense else None, score.perplexity
        before = figure(old, "not finite" if dense else "-")
        rows.append((f"perplexity, {line.text}", before, figure(new, "not finite"), change(old, new)))
        if score.bits_per_byte is not None:
            old, new = dense.bits_per_byte if dense else None, score.bits_per_byte
            rows.append((f"bits per byte, {line.text}", figure(old), figure(new), change(old, new)))
        if divergence:
            rows.append((f"KL to dense, {line.text}", "-", figure(divergence.kl_mean, "not finite"), "-"))
            rows.append((f"same top token, {line.text}", "-", percent(divergence.top1_agreement), "-"))
    for task in report.tasks:
        for metric in task.metrics:
            old, new = metric.dense.value if metric.dense else None, metric.compressed.value
            before = figure(old, "not finite" if metric.dense else "-")
            rows.append((f"{metric.metric}, {task.task}", before, figure(new, "not finite"), change(old, new)))
        if task.flips:
            flipped = f"{task.flips.worse:,} worse, {task.flips.better:,} better"
            rows.append((f"flips of {task.samples:,}, {task.task}", "-", flipped, "-"))
        if task.divergence:
            rows.append((f"KL to dense, {task.task}", "-", figure(task.divergence.kl_mean, "not finite"), "-"))
            rows.append((f"same top token, {task.task}", "-", percent(task.divergence.top1_agreement), "-"))
    return rows


def notices(report: Report) -> list[str]:
    """What was proven, what it cost, and whatever did not go the plain way."""
    verified, peak, estimate = report.verified, report.peak_memory_bytes, report.estimated_memory_bytes
    memory = f"peak memory {human_bytes(peak)} (estimated {human_bytes(estimate)})"
    lines = [
        f"verified: {verified.tensors:,} tensors ({human_bytes(verified.bytes)}) read back, equal bit for bit",
        f"time {human_seconds(sum(report.phases.values()))}, {memory}",
    ]
    if report.resumed:
        lines.append(f"resumed {report.resumed:,} {'time' if report.resumed == 1 else 'times'}")
    for name, count in Counter(line.fallback for line in report.linears if line.fallback).items():
        lines.append(f"fallback: {name}, {count:,} {'linear' if count == 1 else 'linears'}")
    return lines


def described(step: PassSummary) -> str:
    """The method and the settings that define it, as "gptq (bits 4, group size 128, asymmetric)"."""
    given = step.settings
    known = ("name", "pattern", "sparsity", "count", "blocks", "bits", "group_size", "rank", "budget")
    shown = [f"{key.replace('_', ' ')} {given[key]}" for key in known if given.get(key) is not None]
    shown += [f"{key} {given[key]}" for key in ("heads", "channels", "hidden") if given.get(key)]  # 0: none go
    shown += ["heterogeneous"] if given.get("heterogeneous") is True else []
    shown += ["asymmetric"] if given.get("symmetric") is False else []
    return f"{step.use} ({', '.join(shown)})" if shown else step.use


def human_bytes(count: float) -> str:
    """Bytes in binary units, as "1.15 GiB"."""
    power = sum(count >= 1024**power for power in (1, 2, 3, 4))
    return f"{count / 1024**power:.2f} {' KMGT'[power]}iB" if power else f"{count:,.0f} B"


def human_seconds(seconds: float) -> str:
    """A duration with the two units that matter."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]:02} s" if minutes[0] < 60 else f"{hours[0]} h {hours[1]:02} min"


def figure(value: float | None, missing: str = "-") -> str:
    """A measurement: three decimals from 1, three digits below it, scientific below 0.001 and from a million."""
    if value is None or value == 0:
        return missing if value is None else "0"
    return f"{value:,.3f}" if 1 <= abs(value) < 1e6 else f"{value:#.3g}" if 0.001 <= abs(value) < 1 else f"{value:.2e}"


def percent(share: float | None) -> str:
    """A share as "50.00 %"; rounding never claims all or nothing."""
    if share is None:
        return "-"
    return "< 0.01 %" if 0 < share < 5e-5 else "> 99.99 %" if 0.99995 <= share < 1 else f"{100 * share:.2f} %"


def signed(share: float | None) -> str:
    """A share as "-0.12 %", to two digits whatever its sign; scientific from a million: what is broken has any size."""
    if share is None:
        return "-"
    text = f"{100 * share:,.2f} %" if abs(share) < 1e4 else f"{100 * share:.2e} %"
    return text[1:] if text == "-0.00 %" else text


def change(before: float | None, after: float | None) -> str:
    """The relative change as "-46.51 %" or "+19.63 %"."""
    if not before or after is None:
        return "-"
    text = signed(after / before - 1)
    return text if text.startswith("-") or text == "0.00 %" else f"+{text}"


def _kinds(report: Report) -> dict[str, list[LedgerLine]]:
    """The ledger by place in the block, as "self_attn.q_proj" or "mlp.experts.*.up_proj", in model order."""
    kinds: dict[str, list[LedgerLine]] = {}
    for line in report.linears:
        parts, block = line.linear.split("."), str(line.block)
        place = ("*" if part.isdigit() else part for part in parts[parts.index(block) + 1 if block in parts else 0 :])
        kinds.setdefault(".".join(place), []).append(line)
    return kinds


def _decades(values: Iterable[float | None]) -> list[float]:
    """Gridlines 1, 2, 5 of each decade that enclose the positive `values`; whole decades when those are many."""
    shown = [value for value in values if value and value > 0] or [1.0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    # A decade to spare on both sides: log10 may round across a power of ten.
    lines = [digit * 10.0**power for power in range(low - 1, high + 2) for digit in (1, 2, 5)]
    floor = max(line for line in lines if line <= min(shown))
    ceiling = min(line for line in lines if line >= max(shown) and line > floor)
    lines, stride = [line for line in lines if floor <= line <= ceiling], 1 + (high - low) // 6
    return lines if len(lines) <= 6 else [10.0**power for power in range(low, high + stride, stride)]


def _steps(values: Iterable[float]) -> list[float]:
    """At most six gridlines from 0 to the first round number above all `values`."""
    top = max((value for value in values if value > 1e-9), default=1.0)
    unit = 10.0 ** math.floor(math.log10(top / 5))
    step = next((unit * digit for digit in (1, 2, 5) if unit * digit * 5 >= top), unit * 10)
    return [step * number for number in range(math.ceil(top / step) + 1)]
