"""From a finished sweep to a report: what identifies a run, what it measured, and the files that tell of it."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from compress import __version__
from compress.calibration.plan_source import source_digest
from compress.card import write_card
from compress.checkpoint import INDEX, MASKS
from compress.errors import CompressError, OutputError, PlanError
from compress.evals.commands import write_gate
from compress.evals.perplexity import evaluate
from compress.evals.planned import Measured, measure
from compress.hub import config_digest
from compress.memory import peak_memory
from compress.model_files import read_json
from compress.passes.eora import EoRA
from compress.report import (
    BlockLine,
    CalibrationInfo,
    Environment,
    EvaluationLine,
    LedgerLine,
    ModelInfo,
    OutputInfo,
    PassSummary,
    Report,
    VerifiedInfo,
    load_report,
    write_report,
)
from compress.state import unpack_bits
from compress.structure import CutTensors
from compress.track import track

if TYPE_CHECKING:
    from compress.distributed import World
    from compress.execution import Execution
    from compress.export.huggingface import FinalTensors
    from compress.lock import Lock


def plan_digest(lock: Lock) -> str:
    """SHA-256 of the settings that make the result of a stage."""
    return hashlib.sha256(json.dumps(lock.canonical(), sort_keys=True).encode()).hexdigest()


def identity(lock: Lock, world: World) -> dict[str, str]:
    """What a journal must agree on to be resumed, by the name a refusal gives it. Reads every weight once."""
    model = config_digest(lock.directory) + lock.checkpoint.digest() + lock.skeleton.digest()
    return {
        "plan": plan_digest(lock),
        "model": hashlib.sha256(model.encode()).hexdigest(),
        "data": source_digest(lock),
        "version": f"compress {__version__}, torch {torch.__version__}, transformers {version('transformers')}",
        "device": world.device.type,
        "number of processes": str(world.size),
    }


def emitted_lock(lock: Lock, known: dict[str, str]) -> dict[str, Any]:
    """The lock as it is written beside the weights: with what it was made of, so that a change of that is seen.

    `known`: the identity of the first stage.
    """
    earlier = {"stages": [one.to_json() for one in lock.stages[:-1]]} if lock.before else {}
    return lock.to_json() | earlier | {"made_of": {"model": known["model"], "data": known["data"]}}


def finished_report(lock: Lock, known: dict[str, str], output: Path, *, overwrite: bool) -> Report | None:
    """The report of an output that this very plan has written; refuses any other content."""
    if not refuse_foreign(output) or overwrite:
        return None
    found, wanted = read_json(output / "lock.json"), emitted_lock(lock, known)
    if lock.before:  # what later stages read is known as a sketch only
        found, wanted = (
            {key: one.get(key) for key in ("compress_version", "plan", "made_of")} for one in (found, wanted)
        )
    if found == wanted:
        return load_report(output)
    fix = "choose another output, or replace it with --overwrite"
    raise OutputError("holds the result of another plan", where=str(output), fix=fix)


def finished_stage(lock: Lock, known: dict[str, str], output: Path) -> Report | None:
    """The report of a stage that was run to its end; one of another plan, or a damaged one, is removed."""
    if not output.is_dir():
        return None
    if _made_here(output) and read_json(output / "lock.json") == emitted_lock(lock, known):
        with suppress(PlanError):
            return load_report(output)
    shutil.rmtree(output)
    return None


def refuse_foreign(output: Path) -> bool:
    """Whether an output of compress is there already. Raises OutputError for anything else that is not empty."""
    if output.is_symlink():
        raise OutputError("is a link", where=str(output), fix="give the directory that it leads to")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not _made_here(output):
        raise OutputError("exists and is not an output of compress", where=str(output), fix="choose another output")
    return True


def _made_here(output: Path) -> bool:
    """Whether a directory is a whole output of compress, which --overwrite may replace."""
    try:
        lock = read_json(output / "lock.json")
    except CompressError:
        return False
    return "compress_version" in lock and "linears" in lock and (output / "report.json").is_file()


def assemble(run: Execution, verified: VerifiedInfo, tensors: FinalTensors | CutTensors) -> Report:
    """Count, evaluate the staged directory, and put together the report; that of the stages before is taken in."""
    lock, work, before = tensors.lock, run.work, run.before
    sweeps = sum(len(one.sweeps) for one in lock.stages[:-1])
    ledger = [LedgerLine(**line) for entry in work.entries("block") for line in entry["ledger"]]
    for entry in work.entries("ranks"):
        ledger = [_cut(line, entry, lock) for line in ledger]
    ledger = [line.model_copy(update={"sweep": line.sweep + sweeps}) for line in ledger]
    blocks = [BlockLine(**entry["line"]) for entry in work.entries("block")]
    blocks = [line.model_copy(update={"sweep": line.sweep + sweeps}) for line in blocks]
    source, nonzero, sparsity = _counts(lock, tensors)
    parameters = source
    if isinstance(tensors, CutTensors):
        slots = [slot for shard in lock.shards for slot in shard.slots if tensors.knows(slot.name)]
        nonzero = parameters = sum(math.prod(slot.shape) for slot in slots)
    added = sum(linear.rank * (linear.out_features + linear.in_features) for linear in lock.linears)
    evaluation = _evaluate(run)
    measured = _measure(run)
    run.progress.end_phase()
    plan, settings = lock.plan, lock.plan.calibration
    model = ModelInfo(
        path=plan.model.path,
        architecture=type(lock.skeleton.model).__name__,
        parameters=source,
        bytes=sum(lock.checkpoint.sizes.values()),
    )
    phases = dict(run.progress.phases)
    return Report(
        compress_version=__version__,
        model=before.model if before else model,
        output=OutputInfo(
            path=work.output.name,
            bytes=_written(work.staging),
            parameters=parameters + added,
            nonzero_parameters=nonzero + added,
            linear_sparsity=sparsity,
            format=lock.form.name,
            adapter=lock.adapter is not None,
            heterogeneous=lock.heterogeneous,
            linear_bits=_linear_bits(lock),
        ),
        environment=environment(run.mode.device),
        calibration=CalibrationInfo(
            source=settings.source,
            samples=len(run.tokens.ids),
            length=run.tokens.ids.shape[1],
            tokens=run.tokens.tokens,
            digest=run.tokens.digest,
        )
        if settings and run.tokens
        else None,
        passes=(*(before.passes if before else ()), *(_summary(lock, index, ledger) for index in lock.stage)),
        linears=(*(before.linears if before else ()), *ledger),
        blocks=(*(before.blocks if before else ()), *blocks),
        evaluation=evaluation,
        tasks=measured.lines,
        tasks_info=measured.info,
        gate=measured.gate,
        phases=phases,
        peak_memory_bytes=max(peak_memory(run.mode.device), before.peak_memory_bytes if before else 0),
        estimated_memory_bytes=max(run.mode.peak, before.estimated_memory_bytes if before else 0),
        resumed=run.resumed + (before.resumed if before else 0),
        warnings=lock.warnings,
        plan_toml=plan.source.text,
        verified=verified,
    )


def environment(device: torch.device) -> Environment:
    """What the run ran on."""
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        platform=f"{platform.system()} {platform.machine()}",
    )


def publish_report(run: Execution, report: Report) -> None:
    """Write report and model card into the staged directory."""
    write_report(report, run.work.staging)
    if report.gate:
        write_gate(report.gate, run.work.staging)
    model = run.lock.plan.model
    local = run.lock.plan.resolve(model.path).is_dir()  # only its name is the reader's business
    write_card(
        report,
        run.work.staging,
        f"./{Path(model.path).name}" if local else model.path,
        _license(run.lock.root.directory),
    )


def tell_tracker(run: Execution, report: Report) -> None:
    """Send the report of a published output to the plan's tracker."""
    plan = run.lock.plan
    if not plan.track or not run.lock.ends:
        return
    try:
        track(report, plan.track, plan.folder)
    except Exception as error:  # a tracker raises what it likes, and the output is there
        run.progress.say(f"warning: {plan.track.to} did not take the results: {error}", style="yellow")


def _license(directory: Path) -> str | None:
    """The license that the source's own card declares."""
    from huggingface_hub import ModelCard

    path = directory / "README.md"
    if not path.is_file():
        return None
    try:
        declared = ModelCard.load(path).data.get("license")
    except Exception:  # of YAML, of the hub's classes: a card that cannot be read declares none
        return None
    return declared if isinstance(declared, str) and re.fullmatch(r"[\w.+-]{1,64}", declared, re.ASCII) else None


def _counts(lock: Lock, tensors: FinalTensors | CutTensors) -> tuple[int, int, float]:
    """Parameters, those that masks leave, and the pruned share of the weights in block linears."""
    stored = set(lock.skeleton.stored.values())
    parameters = sum(int(torch.Size(lock.checkpoint.tensors[name].shape).numel()) for name in stored)
    pruned = 0
    for linear in lock.linears:
        packed = tensors.mask(linear)
        if packed is not None:
            pruned += linear.weights - int(unpack_bits(packed, linear.in_features).sum())
    return parameters, parameters - pruned, pruned / sum(linear.weights for linear in lock.linears)


def _cut(line: LedgerLine, entry: dict[str, Any], lock: Lock) -> LedgerLine:
    """A line of branches that a budget has cut since: with the error of the ranks that are left."""
    one = lock.plan.passes[line.pass_index]
    if line.sweep != entry["sweep"] or not isinstance(one, EoRA) or one.budget is None:
        return line
    name = line.linear
    return line.model_copy(update={"error_after": entry["errors"][name], "detail": f"rank {entry['ranks'][name]}"})


def _written(directory: Path) -> int:
    """Bytes of the weights as they lie in a directory: every safetensors file, and the index."""
    files = [*directory.rglob("*.safetensors"), *directory.glob(INDEX)]
    return sum(path.stat().st_size for path in files)


def _linear_bits(lock: Lock) -> float:
    """Stored bits per weight of the linears in blocks, with all that belongs to them."""
    slots = list(lock.adapter.slots) if lock.adapter else []
    slots += [slot for linear in lock.linears for slot in lock.form.slots(linear)]
    slots += [slot for shard in lock.shards if shard.file == MASKS for slot in shard.slots]
    return 8 * sum(slot.bytes for slot in slots) / sum(linear.weights for linear in lock.linears)


def _summary(lock: Lock, index: int, ledger: list[LedgerLine]) -> PassSummary:
    one = lock.plan.passes[index]
    lines = [line for line in ledger if line.pass_index == index]
    kinds = {line.error_kind for line in lines}
    weights = sum(line.out_features * line.in_features for line in lines)
    pruned = sum(line.sparsity * line.out_features * line.in_features for line in lines)
    return PassSummary(
        index=index,
        use=one.use(),
        settings=one.settings(),
        linears=len(lines),
        seconds=sum(line.seconds for line in lines),
        relative_error=fmean(line.error_after for line in lines if line.error_after is not None),
        error_kind=kinds.pop() if len(kinds) == 1 else None,
        sparsity=pruned / weights,
    )


def _evaluate(run: Execution) -> tuple[EvaluationLine, ...]:
    """Score the staged directory, and the dense model beside it."""
    plan = run.lock.plan
    if plan.evaluate is None or not plan.evaluate.perplexity or not run.lock.ends:
        return ()
    run.progress.phase("evaluate", "evaluate")
    return evaluate(
        run.work.staging,
        plan.evaluate,
        dense=run.lock.root.directory,
        folder=plan.folder,
        device=run.mode.device,
        keep=run.mode.keep,
        trust_remote_code=plan.model.trust_remote_code,
    )


def _measure(run: Execution) -> Measured:
    """Evaluate the plan's tasks on the staged directory and on the dense model, and hold the gate."""
    plan = run.lock.plan
    if not run.lock.ends or not (plan.gate or (plan.evaluate and plan.evaluate.tasks)):
        return Measured()
    run.progress.phase("tasks", "tasks")
    name, say = run.work.output.name, run.progress.say
    return measure(plan, run.work.staging, run.lock.root.directory, name=name, device=run.mode.device, say=say)
