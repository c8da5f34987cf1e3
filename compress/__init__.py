"""compress: prune, quantize, repair and prove language models, from one plan.

The Python API is the plan's own objects::

    import compress
    from compress.passes import SparseGPT

    plan = compress.Plan(
        model=compress.Model(path="examples/reference"),
        calibration=compress.Calibration(source="self", samples=128, length=256),
        run=compress.Run(output="out/reference"),
        passes=[SparseGPT(pattern="2:4")],
    )
    report = compress.run(plan)
    model = compress.load("out/reference")  # a transformers model
    assert compress.gate("out/reference", "baseline.json", compress.Gate(margin=0.01)).passed

It also tells transformers of the packed format: see `compress.registration`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.registration import register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from compress.checking import check_plan as check
    from compress.errors import CompressError, ModelError, OutputError, PlanError, RunError
    from compress.evals.commands import run_gate as gate
    from compress.pipeline import run
    from compress.plan import Calibration, Evaluate, Export, Gate, Model, Plan, Run, Track, load_plan
    from compress.report import Report, load_report
    from compress.runtime import load

_HOME = {
    "check": ("compress.checking", "check_plan"),
    "gate": ("compress.evals.commands", "run_gate"),
    "run": ("compress.pipeline", "run"),
} | {
    name: (module, name)
    for module, names in {
        "compress.errors": ("CompressError", "ModelError", "OutputError", "PlanError", "RunError"),
        "compress.plan": ("Calibration", "Evaluate", "Export", "Gate", "Model", "Plan", "Run", "Track", "load_plan"),
        "compress.report": ("Report", "load_report"),
        "compress.runtime": ("load",),
    }.items()
    for name in names
}
__all__ = [
    "Calibration",
    "CompressError",
    "Evaluate",
    "Export",
    "Gate",
    "Model",
    "ModelError",
    "OutputError",
    "Plan",
    "PlanError",
    "Report",
    "Run",
    "RunError",
    "Track",
    "check",
    "gate",
    "load",
    "load_plan",
    "load_report",
    "run",
]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds, `compress --help` should not."""
    if name in _HOME:
        from importlib import import_module

        module, attribute = _HOME[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
