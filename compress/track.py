"""One hook for trackers: a run's settings and figures, once its output is there. Each is imported only when asked for.

What goes there is what report.json says; a tracker that fails costs a warning, never the output.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from compress.errors import PlanError
from compress.report import described

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from compress.plan import Plan, Track
    from compress.report import Report

PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb", "trackio": "trackio"}


def check_track(plan: Plan) -> None:
    """Raises PlanError where the tracker of the plan is not installed."""
    if plan.track and find_spec(plan.track.to) is None:
        fix = f"pip install {PACKAGES[plan.track.to]}"
        raise PlanError(f"{plan.track.to} is not installed", where=plan.source.where(("track", "to")), fix=fix)


def track(report: Report, settings: Track, folder: Path) -> None:
    """Send a report to the tracker of `settings`; its store, where it is a folder, is relative to `folder`.

    Raises whatever the tracker raises.
    """
    store = settings.store
    if store and "://" not in store:
        place = (folder / store).absolute()
        place.mkdir(parents=True, exist_ok=True)
        store = str(place)
    name = settings.name or report.output.path
    _TRACKERS[settings.to](settings.project, name, store, parameters(report), figures(report))


def parameters(report: Report) -> dict[str, str]:
    """What was done: model, passes, format, versions."""
    passes = {f"pass {step.index}": described(step) for step in report.passes}
    known = {"model": report.model.path, "output": report.output.path, "format": report.output.format}
    known |= {"compress": report.compress_version, "torch": report.environment.torch}
    known |= {"device": report.environment.device}
    return known | passes | ({"gate": report.gate.verdict} if report.gate else {})


def figures(report: Report) -> dict[str, float]:
    """What came of it, as far as it is finite: sizes in bytes, times in seconds, scores as report.json has them."""
    found: dict[str, float | None] = {
        "bytes": report.output.bytes,
        "bytes_dense": report.model.bytes,
        "linear_sparsity": report.output.linear_sparsity,
        "linear_bits": report.output.linear_bits,
        "peak_memory_bytes": report.peak_memory_bytes,
        "seconds": sum(report.phases.values()),
    }
    for line in report.evaluation:
        found |= {f"{line.text}/perplexity": line.compressed.perplexity}
        found |= {f"{line.text}/perplexity_dense": line.dense.perplexity} if line.dense else {}
        found |= {f"{line.text}/kl_mean": line.divergence.kl_mean} if line.divergence else {}
    for task in report.tasks:
        for one in task.metrics:
            found |= {f"{task.task}/{one.metric}": one.compressed.value}
            found |= {f"{task.task}/{one.metric}_dense": one.dense.value} if one.dense else {}
        found |= {f"{task.task}/kl_mean": task.divergence.kl_mean} if task.divergence else {}
    if report.gate:
        found["gate_passed"] = float(report.gate.passed)
    # Slashes make groups; of the rest trackers take no more than this.
    return {re.sub(r"[^\w./ -]", "_", name): float(value) for name, value in found.items() if value is not None}


def _mlflow(
    project: str, name: str, store: str | None, settings: Mapping[str, str], values: Mapping[str, float]
) -> None:
    import mlflow

    if store and "://" not in store:
        store = f"sqlite:///{store}/mlflow.db"  # MLflow has given up its stores of files
    client = mlflow.MlflowClient(tracking_uri=store)
    known = client.get_experiment_by_name(project)
    experiment = known.experiment_id if known else client.create_experiment(project)
    run = client.create_run(experiment, run_name=name).info.run_id
    for key, text in settings.items():
        client.log_param(run, key, text)
    for key, value in values.items():
        client.log_metric(run, key, value)
    client.set_terminated(run)


def _wandb(
    project: str, name: str, store: str | None, settings: Mapping[str, str], values: Mapping[str, float]
) -> None:
    import wandb

    run = wandb.init(project=project, name=name, dir=store, config=dict(settings))
    run.log(dict(values))
    run.finish()


def _trackio(
    project: str, name: str, store: str | None, settings: Mapping[str, str], values: Mapping[str, float]
) -> None:
    if store:
        os.environ["TRACKIO_DIR"] = store  # read when it is imported
    import trackio

    trackio.init(project=project, name=name, config=dict(settings))
    trackio.log(dict(values))
    trackio.finish()


_TRACKERS: dict[str, Callable[..., Any]] = {"mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio}
