"""What ``compress eval``, ``baseline`` and ``gate`` do with tasks, and how it is shown."""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from compress.errors import PlanError
from compress.plan import Evaluate, Gate
from compress.report import figure, percent, replace_text, signed

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from compress.evals.outcomes import Outcomes
    from compress.evals.results import Comparison, Figure, GateResult, TaskLine


LEAST_NAME = 13  # characters of the column of names, which holds "loglikelihood"
NO_BREAK = "\u00a0"


def settings_of(**options: Any) -> Evaluate:
    """`[evaluate]` from the options of a command. Raises PlanError for one that cannot be."""
    given = {key: value for key, value in options.items() if value is not None}
    texts = given.get("tasks", ())
    given["tasks"] = tuple(name for text in texts for name in text.split(",") if name)
    if texts and not given["tasks"]:
        raise PlanError("--tasks names no task", fix="give names of tasks, or leave it away")
    try:
        return Evaluate(**given)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> PlanError:
    first = error.errors()[0]
    return PlanError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", fix="correct the option")


def show_tasks(
    directory: Path,
    settings: Evaluate,
    dense: Path | None,
    device: torch.device,
    *,
    cache: bool,
    console: Console | None,
) -> dict[str, Any]:
    """Evaluate the tasks of `settings`, of the dense model too where one is given; print them.

    Returns:
        what JSON has of them: "tasks", and "groups", the aggregates of lm-eval's groups; nothing without tasks.
    """
    if not settings.tasks:
        return {}
    from compress.evals.divergence import token_lines
    from compress.evals.harness import run_tasks
    from compress.evals.lines import task_lines, unheeded

    found = run_tasks(directory, settings, device=device, cache=cache)
    before = run_tasks(dense, settings, device=device, cache=cache) if dense else None
    tokens = token_lines(directory, dense, settings, device=device, cache=cache) if dense else {}
    lines = task_lines(found, before, tokens)
    if console:
        print_tasks(lines, found.groups, console)
        warn(unheeded(found), console)
        console.print(
            f"lm-eval {found.harness}, batches of {found.batch_size}, dtype {found.dtype}",
            highlight=False,
            soft_wrap=True,
        )
    return {"tasks": [line.model_dump(mode="json") for line in lines], "groups": found.groups}


def print_tasks(lines: tuple[TaskLine, ...], groups: dict[str, dict[str, float | None]], console: Console) -> None:
    """Figures with their 95 % intervals."""
    compared = any(metric.dense for line in lines for metric in line.metrics)
    rows: dict[str, list[tuple[str, ...]]] = {}
    for line in lines:
        for one in line.metrics:
            before = [_value(one.dense) if one.dense else "-"] if compared else []
            figures = (*before, _value(one.compressed), _interval(one.compressed))
            rows.setdefault(f"{line.task} ({line.samples:,})", []).append((one.metric, *figures))
    for name, metrics in groups.items():
        for metric, value in metrics.items():
            blank = [""] if compared else []
            rows.setdefault(f"group {name}", []).append((metric, *blank, figure(value, "not finite"), "-"))
    _print_rows(("", *(["dense"] if compared else []), "value", "95 %"), rows, console)
    for line in lines:
        warn(warnings_of(line), console)
        if line.divergence:
            d = line.divergence
            console.print(
                f"{line.task}: KL(dense‖model) mean {figure(d.kl_mean)}, same top token {percent(d.top1_agreement)}",
                highlight=False,
                markup=False,
            )


def _print_rows(headings: tuple[str, ...], rows: dict[str, list[tuple[str, ...]]], console: Console) -> None:
    """Rows below the names of their tasks, which have lines of their own: a column would break them inside a word.

    Where the console is too narrow for the columns, each row is a name with its figures in words below it.
    """
    cells = [headings, *(row for some in rows.values() for row in some)]
    widths = [max(len(row[column]) for row in cells) for column in range(1, len(headings))]
    room = console.width - sum(width + 2 for width in widths) - 2
    longest = max(len(row[0]) for row in cells)
    if room < min(longest, LEAST_NAME):
        _print_words(headings, rows, console)
        return
    first = max(LEAST_NAME, min(room, longest))

    def show(name: str, figures: tuple[str, ...]) -> None:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(overflow="fold", min_width=first + 2)
        for _ in widths:
            table.add_column(justify="right", no_wrap=True)
        padded = [figure.rjust(width) for figure, width in zip(figures, widths, strict=True)]
        table.add_row(Text(f"  {name}"), *map(Text, padded))
        console.print(table)

    show("", headings[1:])
    for task, some in rows.items():
        console.print(Text(task, overflow="fold"))  # a name is no markup
        for name, *figures in some:
            if len(name) > first:  # on a line of its own, above its figures
                console.print(Text(f"  {name}", overflow="fold"))
            show(name if len(name) <= first else "", tuple(figures))


def _print_words(headings: tuple[str, ...], rows: dict[str, list[tuple[str, ...]]], console: Console) -> None:
    """Rows as words, "loss 0.12 %, margin 1.00 %"; a line breaks between figures, not within one."""
    for task, some in rows.items():
        console.print(Text(task, overflow="fold"))
        for name, *figures in some:
            console.print(Text(f"  {name}", overflow="fold"))
            words = [f"{heading} {one}" for heading, one in zip(headings[1:], figures, strict=True) if one.strip("-")]
            text = ", ".join(words).replace(" ", NO_BREAK).replace(f",{NO_BREAK}", ", ")
            lines = wrap(text, console.width, initial_indent=" " * 4, subsequent_indent=" " * 4)
            console.print(Text("\n".join(lines).replace(NO_BREAK, " "), overflow="fold"))


def warn(warnings: list[str], console: Console) -> None:
    """Print each on a line of its own."""
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def warnings_of(line: TaskLine) -> list[str]:
    """What makes the figures of a task doubtful."""
    found = []
    if line.not_finite:
        count = f"{line.not_finite:,} of {line.samples:,} samples"
        found.append(f"{line.task}: {count} have log-likelihoods that are not finite; its figures mean nothing")
    if line.ties:
        found.append(f"{line.task}: {line.ties:,} of {line.samples:,} answers are ties, decided by their order")
    return found


def _value(one: Figure) -> str:
    return figure(one.value, "not finite")


def _interval(one: Figure) -> str:
    return "-" if one.low is None or one.high is None else f"{figure(one.low)} to {figure(one.high)}"


def write_baseline(
    directory: Path, settings: Evaluate, out: Path, device: torch.device, *, cache: bool, console: Console | None
) -> Outcomes:
    """Evaluate, and store every sample's outcome in `out` and in a parquet file beside it.

    Paths of tasks are stored relative to `out`, so that both can be committed together with the files of samples.

    Raises:
        PlanError: `out` cannot be written, or a log-likelihood is not finite: such a model is no baseline.
    """
    from compress.evals.harness import not_finite, run_tasks

    if out.suffix != ".json":
        raise PlanError("the baseline must be a .json file", where=str(out), fix=f"--out {out.with_suffix('.json')}")
    if not out.resolve().parent.is_dir():
        raise PlanError("no such folder", where=str(out.parent), fix="make it first")
    found = run_tasks(directory, settings, device=device, cache=cache, say=_said(console))
    broken = [task.name for task in found.tasks if not_finite(found.samples[task.name])]
    if broken:
        fix = "repair the model; a gate against it would mean nothing"
        raise PlanError(f"log-likelihoods of {', '.join(broken)} are not finite", where=str(directory), fix=fix)
    tasks = tuple(task.model_copy(update={"spec": _moved(task.spec, Path(), out.parent)}) for task in found.tasks)
    stored = found.model_copy(update={"tasks": tasks, "include_path": _relative(settings.include_path, out.parent)})
    stored.with_samples(found.samples).save(out)
    return found


def _said(console: Console | None) -> Any:
    return (lambda text: console.print(text, highlight=False, markup=False)) if console else None


def _moved(spec: str, old: Path, new: Path) -> str:
    """A task as it is named from another folder."""
    form, colon, file = spec.partition(":")
    if not colon:
        return _relative(str(Path(spec).expanduser()), new) or spec if spec.endswith((".yaml", ".yml")) else spec
    return f"{form}:{_relative(file, new)}" if (old / file).exists() else spec


def _relative(path: str | None, folder: Path) -> str | None:
    return None if path is None else Path(os.path.relpath(path, folder.resolve())).as_posix()


def settings_for(baseline: Outcomes) -> Evaluate:
    """The conditions under which a baseline was taken."""
    return Evaluate(
        tasks=tuple(dict.fromkeys(task.spec for task in baseline.tasks)),
        limit=baseline.limit,
        batch_size=baseline.batch_size,
        num_fewshot=baseline.num_fewshot,
        add_bos_token=baseline.add_bos_token,
        include_path=baseline.include_path,
        dtype=baseline.dtype,
    )


def run_gate(
    directory: Path | str,
    baseline: Path | str,
    settings: Gate | None = None,
    *,
    dense: Path | str | None = None,
    device: torch.device | str = "auto",
    cache: bool = True,
    console: Console | None = None,
) -> GateResult:
    """Evaluate a directory as a baseline was evaluated, and compare.

    Args:
        directory: an output of compress, or any model in safetensors.
        baseline: a file of ``compress baseline``.
        settings: margins and levels; default: `[gate]` of the plan beside the output.
        dense: the dense model, for divergence token by token.
        device: where to compute; "auto" is CUDA where there is one.
        cache: use results that are known, and keep those that are not.
        console: takes a line for each task.

    Raises:
        PlanError: the baseline cannot be read, or the two do not compare.
    """
    from compress.evals.divergence import token_lines
    from compress.evals.gate import compare
    from compress.evals.harness import need_harness, run_tasks
    from compress.evals.outcomes import Outcomes
    from compress.runtime import check_device

    need_harness()
    directory, baseline, chosen = Path(directory), Path(baseline), check_device(device, "device")
    known = Outcomes.load(baseline)
    same = settings_for(known)
    check_early(known, baseline, directory)
    options: dict[str, Any] = {"folder": baseline.parent, "device": chosen, "cache": cache}
    found = run_tasks(directory, same, say=_said(console), **options)
    tokens = token_lines(directory, Path(dense), same, **options) if dense else {}
    settings = settings or gate_of(directory, {})
    return compare(found, known, settings, name=str(baseline), tokens=tuple(tokens.values()))


def check_early(baseline: Outcomes, path: Path, directory: Path | None, *, trust_remote_code: bool = False) -> None:
    """Refuse a baseline of another version of the harness before anything is evaluated, or of another tokenizer.

    Args:
        baseline: what was read.
        path: names it.
        directory: has the tokenizer; None: it is not there yet.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        PlanError: it is one.
        ModelError: the directory has no tokenizer that can be loaded.
    """
    from importlib.metadata import version

    from compress.calibration.tokenizer import load_tokenizer
    from compress.evals.harness import tokenizer_hash
    from compress.evals.pairing import check_tokenizer

    now = version("lm_eval")
    if baseline.harness != now:
        fix = f"pip install lm_eval=={baseline.harness}, or write the baseline again"
        raise PlanError(f"the baseline has lm-eval {baseline.harness}, not {now}", where=str(path), fix=fix)
    if directory:
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        check_tokenizer(tokenizer_hash(tokenizer), baseline, str(path))


def gate_of(directory: Path, options: dict[str, Any]) -> Gate:
    """`[gate]` of the plan that lies beside an output, and what a command's options change in it.

    Raises:
        PlanError: an option cannot be.
    """
    from compress.plan import load_gate

    plan = directory / "plan.toml"
    stated = load_gate(plan) if plan.is_file() else {}
    given = {key: value for key, value in options.items() if value is not None and value != ()}
    try:
        return Gate(**(stated | given))
    except ValidationError as error:
        raise _refusal(error) from None


def write_gate(result: GateResult, folder: Path) -> None:
    """Write gate.json and gate.xml (JUnit)."""
    from compress.evals.ci import junit

    replace_text(folder / "gate.json", result.model_dump_json(indent=2) + "\n")
    replace_text(folder / "gate.xml", junit(result))


def print_gate(result: GateResult, console: Console) -> None:
    """The comparisons as a table, and the verdict."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for one in result.comparisons:
        rows.setdefault(one.task, []).append((one.metric, one.verdict or "-", *cells(one)))
    _print_rows(("", "verdict", "loss", "at most", "margin", "baseline", "value"), rows, console)
    for line in remarks(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    style = {"pass": "green", "fail": "red", "inconclusive": "yellow"}[result.verdict]
    allowed = "" if result.passed == (result.verdict == "pass") else ", which the plan allows"
    console.print(f"gate: {result.verdict}{allowed}", style=style, highlight=False)


def cells(one: Comparison) -> tuple[str, str, str, str, str]:
    """Loss, its upper bound and margin, baseline and value, in the units of the metric."""
    show = figure if one.kind in ("loglikelihood", "score") else signed
    values = (figure(one.baseline, "not finite"), figure(one.value, "not finite"))
    margin = "-" if one.margin is None else show(one.margin)
    return (show(one.loss), show(one.high), margin, *values)


def remarks(result: GateResult) -> list[str]:
    """What to know beside the table: reasons, flips, divergence, notes."""
    lines = [f"{one.task}, {one.metric}: {one.why}" for one in result.comparisons if one.why and one.verdict]
    for one in result.comparisons:
        if one.flips:
            changed = f", {one.flips.answers:,} other answers" if one.flips.answers is not None else ""
            kl = f", KL of answers {figure(one.answer_kl)}" if one.answer_kl is not None else ""
            count = f"{one.flips.worse:,} worse and {one.flips.better:,} better of {one.samples:,}"
            lines.append(f"{one.task}, {one.metric}: {count}{changed}{kl}")
    for token in result.tokens:
        d = token.divergence
        lines.append(f"{token.task}: KL to dense {figure(d.kl_mean)}, same top token {percent(d.top1_agreement)}")
    return [*lines, *(f"note: {note}" for note in result.notes)]
