"""The words of the command that measure: ``eval``, ``baseline`` and ``gate``; and what all words print with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from compress.errors import PlanError


class Output(Console):
    """A console that falls silent once nobody reads it, where rich's would end the command: a run's result is files."""

    def on_broken_pipe(self) -> None:
        """Go on without it."""
        self.quiet = True
        fall_silent(self.file)


def fall_silent(stream: IO[str]) -> None:
    """What is still written to a stream that nobody reads is dropped, also what it holds when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


out = Output()
Json = Annotated[bool, Parameter(name="--json", help="print JSON")]


class GateFailed(Exception):
    """The verdict of a gate, once it is shown; no error."""


Tasks = Annotated[tuple[str, ...], Parameter(name="--tasks", consume_multiple=True)]


def evaluate(
    directory: Path,
    /,
    *,
    text: tuple[str, ...] = (),
    tasks: Tasks = (),
    window: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    dense: Path | None = None,
    special_tokens: Annotated[bool, Parameter(negative="--no-special-tokens")] = True,
    limit: int | None = None,
    batch_size: int = 16,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    cache: Annotated[bool, Parameter(negative="--no-cache")] = True,
    as_json: Json = False,
) -> None:
    """Measure a model directory: perplexity of texts, divergence to the dense model, tasks of lm-eval.

    Parameters
    ----------
    directory
        An emitted directory, or any model in safetensors.
    text
        A text file or a hub dataset; can be given several times.
    tasks
        Tasks of lm-eval by name, task files, or FORM:FILE; several, also separated by commas.
    window
        Tokens per window; default: the model's context, 2048 at most.
    stride
        Tokens between windows; default: the window.
    windows
        Only the first so many.
    dense
        The model that it came from, to compare with.
    limit
        Only the first so many samples of each task.
    batch_size
        Requests of a task that are computed together.
    num_fewshot
        Examples in a prompt; default: the task's.
    include_path
        A folder of task files of your own.
    dtype
        Of activations and plain weights in tasks; "auto" is the checkpoint's.
    cache
        Whether results of tasks are kept and used again.
    """
    from compress.evals.commands import settings_of, show_tasks

    if not directory.is_dir():
        raise PlanError("no such directory", where=str(directory), fix="give the output of a run")
    if not text and not tasks:
        raise PlanError("there is nothing to measure", where="eval", fix="give --text FILE or --tasks TASK")
    options = {"limit": limit, "batch_size": batch_size, "num_fewshot": num_fewshot, "dtype": dtype}
    settings = settings_of(
        perplexity=text, window=window, stride=stride, windows=windows, special_tokens=special_tokens,
        tasks=tasks, include_path=include_path, **options,
    )  # fmt: skip
    chosen = device_of(device)
    lines = []
    if text:
        from compress.evals.perplexity import evaluate as measure

        lines = [*measure(directory, settings, dense=dense, device=chosen)]
    scores = show_tasks(directory, settings, dense, chosen, cache=cache, console=None if as_json else out)
    if as_json:
        measured = [line.model_dump(mode="json") for line in lines]
        print_json({"texts": measured, **scores} if tasks else measured)
    elif lines:
        from compress.checking import print_evaluation

        print_evaluation(tuple(lines), out)


def baseline(
    directory: Path,
    /,
    *,
    tasks: Tasks,
    out_: Annotated[Path, Parameter(name="--out")],
    limit: int | None = None,
    batch_size: int = 16,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    cache: Annotated[bool, Parameter(negative="--no-cache")] = True,
) -> None:
    """Evaluate tasks and store the outcome of every sample, for compress gate.

    Parameters
    ----------
    directory
        The model to be as good as: the dense one, or an output that was found good.
    tasks
        Tasks of lm-eval by name, task files, or FORM:FILE; several, also separated by commas.
    out_
        The file to write, JSON; the samples go into a .parquet file beside it.
    limit
        Only the first so many samples of each task.
    batch_size
        Requests of a task that are computed together.
    num_fewshot
        Examples in a prompt; default: the task's.
    include_path
        A folder of task files of your own.
    dtype
        Of activations and plain weights; "auto" is the checkpoint's.
    cache
        Whether results of tasks are kept and used again.
    """
    from compress.evals.commands import print_tasks, settings_of, warn, write_baseline
    from compress.evals.lines import task_lines, unheeded

    if not directory.is_dir():
        raise PlanError("no such directory", where=str(directory), fix="give a model")
    options = {"limit": limit, "batch_size": batch_size, "num_fewshot": num_fewshot, "dtype": dtype}
    settings = settings_of(tasks=tasks, include_path=include_path, **options)
    found = write_baseline(directory, settings, out_, device_of(device), cache=cache, console=out)
    print_tasks(task_lines(found), found.groups, out)
    warn(unheeded(found), out)
    print_line(f"baseline {out_}")


def gate(
    directory: Path,
    /,
    *,
    baseline: Path,
    margin: float | None = None,
    perplexity_margin: float | None = None,
    loglikelihood_margin: float | None = None,
    alpha: float | None = None,
    power: float | None = None,
    metrics: tuple[str, ...] = (),
    inconclusive: str | None = None,
    dense: Path | None = None,
    out_: Annotated[Path | None, Parameter(name="--out")] = None,
    github: bool = False,
    device: str = "auto",
    cache: Annotated[bool, Parameter(negative="--no-cache")] = True,
    as_json: Json = False,
) -> None:
    """Compare a directory with a baseline, sample by sample. Exit code 1 where it is worse, or too little is known.

    Margins and levels are those of [gate] in the plan.toml beside the output; an option changes one.

    Parameters
    ----------
    directory
        An emitted directory, or any model in safetensors.
    baseline
        A file of compress baseline; its tasks and conditions are those of the gate.
    margin
        How much accuracy may be lost: 0.01 is one point.
    perplexity_margin
        How much perplexity may rise: 0.02 is 2 %.
    loglikelihood_margin
        Nats that right answers may lose; default: shown, not judged.
    alpha
        Rate of wrong verdicts, each way.
    power
        For the sample sizes that are stated.
    metrics
        A metric to judge, as compress eval names it; can be given several times. Default: of each kind a task's first.
    inconclusive
        What too few samples count as: "fail" or "pass".
    dense
        The dense model, for divergence token by token.
    out_
        Folder of gate.json and gate.xml (JUnit); default: the directory.
    github
        Print GitHub's annotations, and write its step summary; by itself in its workflows.
    cache
        Whether results of tasks are kept and used again.
    """
    from compress.evals.commands import gate_of, print_gate, run_gate, write_gate

    options: dict[str, Any] = {"margin": margin, "perplexity_margin": perplexity_margin, "alpha": alpha, "power": power}
    options |= {"loglikelihood_margin": loglikelihood_margin, "metrics": metrics, "inconclusive": inconclusive}
    settings, chosen, folder = gate_of(directory, options), device_of(device), out_ or directory
    if not directory.is_dir():
        raise PlanError("no such directory", where=str(directory), fix="give the output of a run")
    if not folder.is_dir():
        raise PlanError("no such folder", where=str(folder), fix="make it, or leave --out away")
    shown = None if as_json else out
    result = run_gate(directory, baseline, settings, dense=dense, device=chosen, cache=cache, console=shown)
    write_gate(result, folder)
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print_gate(result, out)
        print_line(f"result {folder / 'gate.json'}, {folder / 'gate.xml'}")
    if github or os.environ.get("GITHUB_ACTIONS") == "true":
        _tell_github(result, sys.stderr if as_json else sys.stdout)
    if not result.passed:
        raise GateFailed


def _tell_github(result: Any, stream: Any) -> None:
    from compress.evals.ci import summary, workflow_commands

    _write(stream, "\n".join(workflow_commands(result)) + "\n")
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if target:
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(summary(result))


def device_of(device: str) -> Any:
    """The device of an option. Raises PlanError."""
    from compress.runtime import check_device

    return check_device(device, "--device")


def print_line(text: str) -> None:
    """One line, as it is: names may hold [brackets]."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """JSON on the standard output, with escapes where that is not UTF-8."""
    plain = (sys.stdout.encoding or "").lower() == "utf-8"
    _write(sys.stdout, json.dumps(value, indent=2, ensure_ascii=not plain) + "\n")


def _write(stream: IO[str], text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        fall_silent(stream)
