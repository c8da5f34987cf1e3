"""What ``compress check`` finds out without reading a weight, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from compress.compiling import compile_plan
from compress.errors import PlanError, nearest
from compress.estimate import check_disk, choose_mode, disk_bytes, seconds
from compress.outcome import refuse_foreign
from compress.passes.base import matches
from compress.report import figure, human_bytes, human_seconds, percent
from compress.structure import width_named

if TYPE_CHECKING:
    from rich.console import Console

    from compress.lock import Linear, Lock
    from compress.plan import Plan
    from compress.report import EvaluationLine


def check_plan(plan: Plan) -> dict[str, Any]:
    """Compile the lock and estimate its cost. Raises PlanError for whatever would stop the run at its start."""
    lock = compile_plan(plan)
    stages, modes = lock.stages, [choose_mode(stage) for stage in lock.stages]
    heaviest = max(modes, key=lambda mode: mode.peak)
    there = refuse_foreign(plan.resolve(plan.run.output))
    check_disk(lock)
    taken = (
        ["the output is there already: its own plan is not run again, another plan needs --overwrite"] if there else []
    )
    passes = []
    for index, one in enumerate(plan.passes):
        stage = lock.stage_of(index)
        fields = {key: field for key, field in type(one).model_fields.items() if key in one.settings()}
        linears = [(linear, dict(linear.passes)[index]) for linear in stage.linears if index in dict(linear.passes)]
        passes.append(
            {
                "pass": index,
                "use": one.use(),
                "sweep": stage.sweep_of(index) + sum(len(before.sweeps) for before in stage.stages[:-1]),
                "settings": one.settings(),
                "defaults": [key for key, field in fields.items() if getattr(one, key) == field.get_default()],
                "linears": len(linears),
                "weights": sum(linear.weights for linear, _ in linears),
                "overridden": sum(resolved.settings() != one.settings() for _, resolved in linears),
                "left": stage.left.shown() if stage.left and index == stage.stage[-1] else None,
            }
        )
    return {
        "model": {
            "path": plan.model.path,
            "architecture": lock.root.config.model_type,
            "blocks": lock.root.blocks,
            "linears": len(lock.root.linears),
            "bytes": sum(lock.root.checkpoint.sizes.values()),
            "sizes": asdict(lock.root.sizes),
        },
        "passes": passes,
        "output_bytes": lock.output_bytes,
        "output_bytes_exact": not (lock.undecided or lock.spread),
        "files": [{"name": shard.file, "bytes": shard.bytes} for shard in lock.shards],
        "disk_bytes": disk_bytes(lock),
        "memory": {"device": str(heaviest.device), "peak_bytes": heaviest.peak, "phases": heaviest.memory},
        "activations": "memory" if heaviest.keep else "disk",
        "pausing": heaviest.pause,
        "seconds": sum(seconds(stage, mode) for stage, mode in zip(stages, modes, strict=True)),
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
        settings = ", ".join(_shown_settings(one["settings"], one["defaults"]))
        settings += f"; {one['overridden']} linears have others" if one["overridden"] else ""
        weights = f"{one['weights'] / 1e6:.2f} M"
        table.add_row(str(one["pass"]), one["use"], settings, str(one["linears"]), weights, str(one["sweep"] + 1))
    console.print(table)
    for one in found["passes"]:
        if one["left"]:
            sizes = ", ".join(_size(name, size) for name, size in one["left"].items())
            console.print(f"left by {one['use']:<11}{sizes}", highlight=False, markup=False)
    spread = any(isinstance(size, dict) for one in found["passes"] for size in (one["left"] or {}).values())
    how = "exactly" if found["output_bytes_exact"] else "about" if spread else "at most"
    where = "in memory" if found["activations"] == "memory" else "on disk"
    for name, value in (
        ("output", f"{human_bytes(found['output_bytes'])} ({found['output_bytes']:,} bytes, {how})"),
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


def _shown_settings(settings: dict[str, Any], defaults: list[str]) -> list[str]:
    """Settings, without those that by default are off."""
    shown = {key: value for key, value in settings.items() if value not in (None, False, []) or key not in defaults}
    return [f"{k}={str(v).lower() if v is None or isinstance(v, bool) else v}" for k, v in shown.items()]


def _size(name: str, size: int | dict[str, int]) -> str:
    return f"{name} {size['total']} in all" if isinstance(size, dict) else f"{name} {size}"


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


def explain(lock: Lock, name: str) -> dict[str, Any]:
    """Each setting of one layer, and the line of the plan that gave it. Raises PlanError for an unknown layer.

    Where blocks will differ and the run finds how, its shape is that before, and `undecided` says what of it is open.
    """
    found = {linear.name: (stage, linear) for stage in lock.stages for linear in stage.linears}  # the last that has it
    names = list(found)
    if name not in names:
        fix = f"layers are named like {names[0]}"
        raise PlanError(f'no linear "{name}"{nearest(name, names)}', where=lock.plan.source.name, fix=fix)
    stage, linear = found[name]
    passes = []
    for index, one in enumerate(lock.plan.passes):
        line = lock.plan.source.line(("pass", index))
        entry: dict[str, Any] = {"pass": index, "use": one.use(), "line": line}
        there = next((other for other in lock.stage_of(index).linears if other.name == name), None)
        resolved = dict(there.passes).get(index) if there else None
        if there is None:
            entry["skipped"] = "the smaller model has no layer of this name"
        elif resolved is None:
            named = one.targets(name)
            entry["skipped"] = (
                "an except pattern matches"
                if matches(name, one.except_)
                else "it works on other linears of the block"
                if named
                else "no match pattern matches"
            )
        else:
            given = resolved.settings().items()
            entry["settings"] = [_given(lock.plan, index, key, value, name) for key, value in given]
        passes.append(entry)
    known, undecided = _known_shape(lock, name)
    return {
        "name": linear.name,
        "tensor": linear.stored,
        "block": linear.block,
        "inputs_shared_with": [other.name for other in stage.in_block(linear.block) if other.subset == linear.subset],
        "shape": [known.out_features, known.in_features],
        "undecided": undecided,
        "dtype": linear.dtype,
        "format": lock.form.name,
        "tensors": [slot.name for slot in lock.form.slots(linear)] if stage is lock else [],
        "passes": passes,
    }


def _known_shape(lock: Lock, name: str) -> tuple[Linear, list[str]]:
    """A linear as the last stage has it that knows its shape before the run, and which of its features are open."""
    there = [(stage, linear) for stage in lock.stages for linear in stage.linears if linear.name == name]
    for stage, linear in there:
        inside = name.removeprefix(stage.skeleton.prefix(linear.block))
        widths = [width_named(stage.architecture, one) for one in (stage.left.different if stage.left else ())]
        sides = {
            "out_features": any(inside in width.rows for width in widths),
            "in_features": any(inside in width.columns for width in widths),
        }
        if any(sides.values()):
            return linear, [side for side, is_open in sides.items() if is_open]
    return there[-1][1], []


def _given(plan: Plan, index: int, key: str, value: Any, name: str) -> dict[str, Any]:
    """Where a setting of a layer comes from: the last `where` that matches, the pass's table, or the default."""
    one = plan.passes[index]
    location: tuple[str | int, ...] | None = ("pass", index, key) if key in one.model_fields_set else None
    for number, table in enumerate(one.where):
        if matches(name, table.match) and key in table.overrides():
            location = ("pass", index, "where", number, key)
    source = "default" if location is None else plan.source.where(location).split(": ")[0]
    return {"key": key, "value": value, "from": source}
