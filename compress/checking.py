"""What ``compress check`` finds out without reading a weight, and how it is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from compress.estimate import check_disk, choose_mode, disk_bytes, seconds
from compress.lock import compile_plan
from compress.outcome import refuse_foreign
from compress.report import figure, human_bytes, human_seconds, percent

if TYPE_CHECKING:
    from rich.console import Console

    from compress.plan import Plan
    from compress.report import EvaluationLine


def check_plan(plan: Plan) -> dict[str, Any]:
    """Compile the lock and estimate its cost. Raises PlanError for whatever would stop the run at its start."""
    lock = compile_plan(plan)
    mode = choose_mode(lock)
    there = refuse_foreign(plan.resolve(plan.run.output))
    check_disk(lock)
    taken = (
        ["the output is there already: its own plan is not run again, another plan needs --overwrite"] if there else []
    )
    passes = []
    for index, one in enumerate(plan.passes):
        linears = [(linear, dict(linear.passes)[index]) for linear in lock.linears if index in dict(linear.passes)]
        passes.append(
            {
                "pass": index,
                "use": one.use(),
                "sweep": next(n for n, sweep in enumerate(lock.sweeps) if index in sweep),
                "settings": one.settings(),
                "linears": len(linears),
                "weights": sum(linear.weights for linear, _ in linears),
                "overridden": sum(resolved.settings() != one.settings() for _, resolved in linears),
            }
        )
    return {
        "model": {
            "path": plan.model.path,
            "architecture": lock.config.model_type,
            "blocks": lock.blocks,
            "linears": len(lock.linears),
            "bytes": sum(lock.checkpoint.sizes.values()),
        },
        "passes": passes,
        "output_bytes": lock.output_bytes,
        "files": [{"name": shard.file, "bytes": shard.bytes} for shard in lock.shards],
        "disk_bytes": disk_bytes(lock),
        "memory": {"device": str(mode.device), "peak_bytes": mode.peak, "phases": mode.memory},
        "activations": "memory" if mode.keep else "disk",
        "pausing": mode.pause,
        "seconds": seconds(lock, mode),
        "warnings": [*lock.warnings, *taken],
        "lock": lock.to_json(),
    }


def print_check(found: dict[str, Any], console: Console) -> None:
    """The check as a table that fits 80 columns."""
    model = found["model"]
    console.print(
        f"{model['path']}: {model['architecture']}, {model['blocks']} blocks, {model['linears']} linears, "
        f"{human_bytes(model['bytes'])}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for column in ("pass", "use", "settings", "linears", "weights", "sweep"):
        table.add_column(column, justify="right" if column in ("linears", "weights", "sweep") else "left")
    for one in found["passes"]:
        settings = ", ".join(f"{k}={v}" for k, v in one["settings"].items() if v not in (None, False))
        settings += f"; {one['overridden']} linears have others" if one["overridden"] else ""
        weights = f"{one['weights'] / 1e6:.2f} M"
        table.add_row(str(one["pass"]), one["use"], settings, str(one["linears"]), weights, str(one["sweep"] + 1))
    console.print(table)
    where = "in memory" if found["activations"] == "memory" else "on disk"
    for name, value in (
        ("output", f"{human_bytes(found['output_bytes'])} ({found['output_bytes']:,} bytes, exactly)"),
        ("disk while running", human_bytes(found["disk_bytes"])),
        (
            "peak memory",
            f"{human_bytes(found['memory']['peak_bytes'])} on {found['memory']['device']}, activations {where}",
        ),
        ("time", f"about {human_seconds(found['seconds'])} for the sweeps"),
    ):
        console.print(f"{name:<19}{value}", highlight=False)
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def print_evaluation(lines: tuple[EvaluationLine, ...], console: Console) -> None:
    """Scores with the convention they were taken by."""
    for line in lines:
        console.print(f"{line.text}: {line.convention}", highlight=False, markup=False)
        table = Table(box=None, pad_edge=False)
        for column in ("", "perplexity", "bits/byte"):
            table.add_column(column, justify="right" if column else "left")
        for name, score in (("dense", line.dense), ("model", line.compressed)):
            if score:
                table.add_row(name, figure(score.perplexity), figure(score.bits_per_byte))
        console.print(table)
        if line.divergence:
            d = line.divergence
            console.print(
                f"KL(dense‖model) mean {figure(d.kl_mean)}, median {figure(d.kl_median)}, 99 % {figure(d.kl_p99)}; "
                f"same top token {percent(d.top1_agreement)}",
                highlight=False,
            )
