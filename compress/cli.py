"""The command line. ``compress plan.toml`` runs or resumes a plan; the other words read, check and measure.

Exit codes: 0 done, 1 gate failed, 2 the plan is wrong, 3 the run failed, 130 interrupted (the journal is kept).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from compress import __version__
from compress.errors import CompressError, PlanError, RunError, nearest

if TYPE_CHECKING:
    from types import FrameType


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

app = App(
    name="compress",
    help="Compress a language model by a plan: prune it, prove what was written, measure it.\n\n"
    "compress PLAN.toml runs the plan, or resumes it.",
    version=__version__,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,  # `main` says what becomes of the run
)
out = Console()
COMMANDS = ("check", "explain", "eval", "baseline", "gate", "report", "swap-scales", "schema")


class GateFailed(Exception):
    """The verdict of a gate, once it is shown; no error."""


Json = Annotated[bool, Parameter(name="--json", help="print JSON")]


@app.default
def run_plan(plan: Path, /, *, restart: bool = False, overwrite: bool = False) -> None:
    """Carry out a plan, or resume it where it was stopped.

    Parameters
    ----------
    plan
        The plan, a TOML file.
    restart
        Drop the journal of an unfinished run on the same output.
    overwrite
        Replace an output that an earlier run of compress wrote.
    """
    from compress.pipeline import run
    from compress.plan import load_plan
    from compress.progress import Progress
    from compress.report import print_summary

    loaded = load_plan(plan)
    report = run(loaded, progress=None if _follows() else Progress(out), restart=restart, overwrite=overwrite)
    if _follows():
        return
    print_summary(report, out)
    if report.gate:
        from compress.evals.commands import print_gate

        print_gate(report.gate, out)
    _print_line(f"output {loaded.resolve(loaded.run.output)}")
    _print_line(f"report {loaded.resolve(loaded.run.output) / 'report.html'}")
    if report.gate and not report.gate.passed:
        raise GateFailed


@app.command
def check(plan: Path, /, *, as_json: Json = False) -> None:
    """Compile a plan and print what it would do and cost, without reading a weight."""
    from compress.checking import check_plan, print_check
    from compress.plan import load_plan

    found = check_plan(load_plan(plan))
    if as_json:
        _print_json(found)
    else:
        print_check(found, out)


@app.command
def explain(plan: Path, layer: str, /, *, device: str = "auto", dtype: str = "auto", as_json: Json = False) -> None:
    """Show each setting of one layer, and the line of the plan that gave it; or, of an output, which kernel it gets.

    Parameters
    ----------
    plan
        The plan, or the directory of an output.
    layer
        The name of a linear.
    device
        With a directory: where `compress.load` would run it.
    dtype
        With a directory: of activations; "auto" is the checkpoint's.
    """
    if plan.is_dir():
        _explain_kernel(plan, layer, device, dtype, as_json=as_json)
        return
    from compress.checking import explain as explain_layer
    from compress.lock import compile_plan
    from compress.plan import load_plan

    found = explain_layer(compile_plan(load_plan(plan)), layer)
    if as_json:
        _print_json(found)
        return
    rows_columns = " × ".join(map(str, found["shape"]))
    _print_line(f"{found['name']}  {rows_columns}  {found['dtype']}  block {found['block']}")
    _print_line(f"inputs shared with {', '.join(found['inputs_shared_with'])}")
    for one in found["passes"]:
        skipped = f"  skipped: {one['skipped']}" if "skipped" in one else ""
        _print_line(f"\npass[{one['pass']}] {one['use']}{skipped}")
        rows = [(given["key"], json.dumps(given["value"]), given["from"]) for given in one.get("settings", ())]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        for key, value, origin in rows:  # no table: it would break the path of a plan over lines
            _print_line(f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")


def _explain_kernel(directory: Path, layer: str, device: str, dtype: str, *, as_json: bool) -> None:
    from compress.runtime import explain as explain_kernel

    found = explain_kernel(directory, layer, device=device, dtype=dtype)
    if as_json:
        _print_json(found)
        return
    _print_line(f"{found['name']}  {' × '.join(map(str, found['shape']))}  {found['dtype']}")
    grid = found["grid"]
    rows = [("sparsity", found["sparsity"]), *((grid or {"grid": None}).items()), ("rank", found["rank"])]
    rows += [("runs on", f"{found['device']} in {found['runs_in']}"), ("kernel", found["kernel"]), ("", found["why"])]
    for key, value in rows:
        _print_line(f"  {key:<12}  {value if isinstance(value, str) else json.dumps(value)}")


Tasks = Annotated[tuple[str, ...], Parameter(name="--tasks", consume_multiple=True)]


@app.command(name="eval")
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
    chosen = _device(device)
    lines = []
    if text:
        from compress.evals.perplexity import evaluate as measure

        lines = [*measure(directory, settings, dense=dense, device=chosen)]
    scores = show_tasks(directory, settings, dense, chosen, cache=cache, console=None if as_json else out)
    if as_json:
        measured = [line.model_dump(mode="json") for line in lines]
        _print_json({"texts": measured, "tasks": scores} if tasks else measured)
    elif lines:
        from compress.checking import print_evaluation

        print_evaluation(tuple(lines), out)


@app.command
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
    from compress.evals.commands import print_tasks, settings_of, write_baseline
    from compress.evals.lines import task_lines

    if not directory.is_dir():
        raise PlanError("no such directory", where=str(directory), fix="give a model")
    options = {"limit": limit, "batch_size": batch_size, "num_fewshot": num_fewshot, "dtype": dtype}
    settings = settings_of(tasks=tasks, include_path=include_path, **options)
    found = write_baseline(directory, settings, out_, _device(device), cache=cache, console=out)
    print_tasks(task_lines(found), found.groups, out)
    _print_line(f"baseline {out_}")


@app.command
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
        Metrics to judge; default: of each kind a task's first.
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
    settings, chosen, folder = gate_of(directory, options), _device(device), out_ or directory
    if not directory.is_dir():
        raise PlanError("no such directory", where=str(directory), fix="give the output of a run")
    if not folder.is_dir():
        raise PlanError("no such folder", where=str(folder), fix="make it, or leave --out away")
    shown = None if as_json else out
    result = run_gate(directory, baseline, settings, dense=dense, device=chosen, cache=cache, console=shown)
    write_gate(result, folder)
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        print_gate(result, out)
        _print_line(f"result {folder / 'gate.json'}, {folder / 'gate.xml'}")
    if github or os.environ.get("GITHUB_ACTIONS") == "true":
        _tell_github(result)
    if not result.passed:
        raise GateFailed


def _tell_github(result: Any) -> None:
    from compress.evals.ci import summary, workflow_commands

    sys.stdout.write("\n".join(workflow_commands(result)) + "\n")
    target = os.environ.get("GITHUB_STEP_SUMMARY")
    if target:
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(summary(result))


@app.command
def report(directory: Path, /, *, as_json: Json = False) -> None:
    """Print the report of an output directory again."""
    from compress.report import load_report, print_summary

    found = load_report(directory)
    if as_json:
        _print_json(found.model_dump(mode="json"))
    else:
        print_summary(found, out)
        _print_line(f"report {directory / 'report.html'}")


@app.command(name="swap-scales")
def swap_scales(directory: Path, name: str | None = None, /) -> None:
    """Put a named set of scales into the weights of an output; without a name, list the sets.

    Parameters
    ----------
    directory
        The output of a plan whose peqa passes have a name, in the format gptq or compressed-tensors.
    name
        The set. Codes stay, and so do the reports: they tell of the set that the run ended with.
    """
    from compress.swap_scales import ScaledOutput

    output = ScaledOutput(directory)
    if name is None:
        active = output.active()
        for one in output.sets:
            _print_line(f"{one}  active" if one in active else one)
        return
    found = output.swap(name)
    size = f"{found.bytes:,} bytes of scales of {found.linears} linears"
    if not found.files:
        _print_line(f"{directory} has the scales {name} already ({size}); nothing was written")
        return
    was = f", no longer {' or '.join(found.before)}" if found.before else ""
    _print_line(f"{directory} now has the scales {name}{was}: {size}, in {', '.join(found.files)}")


@app.command
def schema() -> None:
    """Print the JSON Schema of a plan, for editors."""
    from compress.schema import json_schema

    _print_json(json_schema())


def _device(device: str) -> Any:
    from compress.runtime import check_device

    return check_device(device, "--device")


def _follows() -> bool:
    """Whether this is one of several processes and not the first, which speaks for all."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def _print_line(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)  # names may hold [brackets]


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    errors = Console(stderr=True)
    previous = signal.signal(signal.SIGTERM, _terminated)
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        word = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        hint = "" if Path(word).suffix else nearest(word, COMMANDS)
        errors.print(f"error: {error}{hint}", style="red", highlight=False, markup=False, soft_wrap=True)
        errors.print("fix: see compress --help", highlight=False, markup=False)
        return 2
    except GateFailed:
        return 1
    except CompressError as error:
        if _follows():
            return error.exit_code
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        errors.print("interrupted; what was finished is in the journal, the same command resumes it", style="red")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:
        problem = RunError(str(error) or type(error).__name__, fix="free the resource and run the same command again")
        errors.print(f"error: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
        return problem.exit_code
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0
