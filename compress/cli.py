"""The command line. ``compress plan.toml`` runs or resumes a plan; the other words read, check and measure.

Exit codes: 0 done, 1 gate failed, 2 the plan is wrong, 3 the run failed, 130 interrupted (the journal is kept).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError, Parameter

from compress import __version__
from compress.cli_measure import GateFailed, Json, Output, baseline, evaluate, gate, out, print_json, print_line
from compress.errors import CompressError, PlanError, RunError, nearest
from compress.unforeseen import unforeseen

if TYPE_CHECKING:
    from types import FrameType


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

app = App(
    name="compress",
    help="Compress a language model by a plan: prune it, prove what was written, measure it.\n\n"
    "compress PLAN.toml runs the plan, or resumes it.",
    version=__version__,
    console=out,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,  # `main` says what becomes of the run
)
COMMANDS = ("check", "explain", "eval", "baseline", "gate", "report", "swap-scales", "schema")


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

    if not plan.suffix and (hint := nearest(plan.name, COMMANDS)) and not plan.exists():
        raise PlanError(f"no such plan or command{hint}", where=str(plan), fix="see compress --help")
    loaded = load_plan(plan)
    report = run(loaded, progress=None if _follows() else Progress(out), restart=restart, overwrite=overwrite)
    if _follows():
        return
    print_summary(report, out)
    if report.gate:
        from compress.evals.commands import print_gate

        print_gate(report.gate, out)
    print_line(f"output {loaded.resolve(loaded.run.output)}")
    print_line(f"report {loaded.resolve(loaded.run.output) / 'report.html'}")
    if report.gate and not report.gate.passed:
        raise GateFailed


@app.command
def check(plan: Path, /, *, as_json: Json = False) -> None:
    """Compile a plan and print what it would do and cost, without reading a weight."""
    from compress.checking import check_plan, print_check
    from compress.plan import load_plan

    found = check_plan(load_plan(plan))
    if as_json:
        print_json(found)
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
    from compress.compiling import compile_plan
    from compress.plan import load_plan

    found = explain_layer(compile_plan(load_plan(plan)), layer)
    if as_json:
        print_json(found)
        return
    rows_columns = " × ".join(map(str, found["shape"]))
    print_line(f"{found['name']}  {rows_columns}  {found['dtype']}  block {found['block']}")
    if found["undecided"]:
        print_line(f"{' and '.join(found['undecided'])} as before structured pruning: not known before the run")
    print_line(f"inputs shared with {', '.join(found['inputs_shared_with'])}")
    for one in found["passes"]:
        skipped = f"  skipped: {one['skipped']}" if "skipped" in one else ""
        print_line(f"\npass[{one['pass']}] {one['use']}{skipped}")
        rows = [(given["key"], json.dumps(given["value"]), given["from"]) for given in one.get("settings", ())]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        for key, value, origin in rows:  # no table: it would break the path of a plan over lines
            print_line(f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {origin}")


def _explain_kernel(directory: Path, layer: str, device: str, dtype: str, *, as_json: bool) -> None:
    from compress.runtime import explain as explain_kernel

    found = explain_kernel(directory, layer, device=device, dtype=dtype)
    if as_json:
        print_json(found)
        return
    print_line(f"{found['name']}  {' × '.join(map(str, found['shape']))}  {found['dtype']}")
    grid = found["grid"]
    rows = [("sparsity", found["sparsity"]), *((grid or {"grid": None}).items()), ("rank", found["rank"])]
    rows += [("runs on", f"{found['device']} in {found['runs_in']}"), ("kernel", found["kernel"]), ("", found["why"])]
    for key, value in rows:
        print_line(f"  {key:<12}  {value if isinstance(value, str) else json.dumps(value)}")


app.command(evaluate, name="eval")
app.command(baseline)
app.command(gate)


@app.command
def report(directory: Path, /, *, as_json: Json = False) -> None:
    """Print the report of an output directory again."""
    from compress.report import load_report, print_summary

    found = load_report(directory)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_summary(found, out)
        print_line(f"report {directory / 'report.html'}")


@app.command(name="swap-scales")
def swap_scales(directory: Path, name: str | None = None, /) -> None:
    """Put a named set of scales into the weights of an output; without a name, list the sets.

    Parameters
    ----------
    directory
        The output of a plan whose peqa passes have a name, in the format gptq, compressed-tensors or packed.
    name
        The set. Codes stay, and so do the reports: they tell of the set that the run ended with.
    """
    from compress.swap_scales import ScaledOutput

    output = ScaledOutput(directory)
    if name is None:
        active = output.active()
        for one in output.sets:
            print_line(f"{one}  active" if one in active else one)
        return
    found = output.swap(name)
    size = f"{found.bytes:,} bytes of scales of {found.linears} linears"
    if not found.files:
        print_line(f"{directory} has the scales {name} already ({size}); nothing was written")
        return
    was = f", no longer {' or '.join(found.before)}" if found.before else ""
    print_line(f"{directory} now has the scales {name}{was}: {size}, in {', '.join(found.files)}")


@app.command
def schema() -> None:
    """Print the JSON Schema of a plan, for editors."""
    from compress.schema import json_schema

    print_json(json_schema())


def _follows() -> bool:
    """Whether this is one of several processes and not the first, which speaks for all."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


def _carry_out(arguments: list[str] | None) -> None:
    """Run the command. A signal ends it with KeyboardInterrupt, whatever a library has made of that on its way."""
    stopped = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    heeded = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) is not signal.SIG_IGN]
    previous = {one: signal.signal(one, stop) for one in heeded}
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except Exception:
        if stopped:  # torch, asked for a shape just then, says that it could not determine it
            raise KeyboardInterrupt from None
        raise
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def main(arguments: list[str] | None = None) -> int:
    """The command's entry point; returns its exit code."""
    errors = Output(stderr=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a run must not end for a × that the terminal has not
    try:
        _carry_out(arguments)
    except CycloptsError as error:
        word = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        hint = "" if Path(word).suffix or word in COMMANDS else nearest(word, COMMANDS)
        errors.print(
            f"error: {str(error).rstrip('.')}{hint}", style="red", highlight=False, markup=False, soft_wrap=True
        )
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
    except (OSError, MemoryError) as error:
        problem = RunError(str(error) or type(error).__name__, fix="free the resource and run the same command again")
        errors.print(f"error: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
        return problem.exit_code
    except Exception as error:
        errors.print("".join(traceback.format_exception(error)), highlight=False, markup=False, soft_wrap=True)
        problem = unforeseen(error)
        errors.print(f"error: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
        return problem.exit_code
    return 0
