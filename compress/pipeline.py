"""A run: check, then every stage by an execution of its own, by one process or several; resumable at every point.

Read `run` first, then `compress.execution`, which carries out a stage. Everything that is decided before a weight is
read is in `compress.compiling`; everything that survives a kill is in `compress.journal`.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.compiling import compile_plan, compile_stage
from compress.distributed import World
from compress.errors import OutputError, PlanError, RunError
from compress.estimate import Mode, check_disk, choose_mode
from compress.execution import Execution
from compress.journal import Workspace, directory_checksums, work_directory
from compress.outcome import finished_report, finished_stage, identity, plan_digest
from compress.progress import Progress
from compress.report import Report, load_report

if TYPE_CHECKING:
    from pathlib import Path

    from compress.lock import Lock
    from compress.plan import Plan


def run(plan: Plan, *, progress: Progress | None = None, restart: bool = False, overwrite: bool = False) -> Report:
    """Carry out a plan, or resume it where a run of the same plan was stopped.

    Args:
        plan: what to do.
        progress: where to show it; silent by default.
        restart: drop the journal of an unfinished run on the same output.
        overwrite: replace an output that an earlier run of compress wrote.

    Returns:
        the report; it, the plan and the lock lie beside the weights in the output directory.

    Raises:
        PlanError: the plan cannot be carried out; nothing was written.
        RunError: the run failed; its journal is kept and the same call resumes it.
    """
    progress = progress or Progress()
    progress.phase("check")
    lock = compile_plan(plan)
    world = World(choose_mode(lock).device)
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")  # decision D5: no TF32 in statistics
        with torch.no_grad(), world.watching():
            return _follow(lock, world) if world.rank else _lead(lock, world, progress, restart, overwrite)
    finally:
        with suppress(RunError):  # who is gone need not be sent home
            world.announce(None)
        progress.end_phase()
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _lead(lock: Lock, world: World, progress: Progress, restart: bool, overwrite: bool) -> Report:
    """The run of the first process, or of the only one."""
    output = lock.plan.resolve(lock.plan.run.output)
    origin = identity(lock.root, world)
    finished = finished_report(lock, origin, output, overwrite=overwrite)
    if finished:
        if work_directory(output).is_dir():  # a kill between the last two steps left it
            Workspace(output).remove()
        progress.say(f"{output} already holds the result of this plan; compress eval measures it anew")
        return finished
    check_disk(lock)
    _check_samples(lock, world)
    workspace = Workspace(output)
    try:
        if restart:
            workspace.forget()
        return _lead_stages(lock, world, progress, origin, workspace)
    except OutputError:
        raise  # the journal found there is another run's
    except PlanError:
        workspace.discard_without_blocks()  # so that the mended plan finds no journal of the wrong one
        raise
    except OSError as error:
        raise RunError(
            f"{error.strerror or error}: {error.filename or output}",
            where=str(output),
            fix="free some space or mend the disk, then run the same command: it resumes",
        ) from error
    finally:
        workspace.close()


def _check_samples(lock: Lock, world: World) -> None:
    """Every process needs a sample. Raises PlanError."""
    settings = lock.plan.calibration
    if settings and lock.calibrated and settings.samples < world.size:
        raise PlanError(
            f"{settings.samples} calibration samples cannot be shared by {world.size} processes",
            where=lock.plan.source.where(("calibration", "samples")),
            fix=f"calibrate on more samples, or start at most {settings.samples} processes",
        )


def _lead_stages(lock: Lock, world: World, progress: Progress, origin: dict[str, str], workspace: Workspace) -> Report:
    """All stages; what one leaves is the model of the next, and lies in the work directory until the output is there.

    Args:
        lock: the last stage; of those before it, what is known without their result.
        world: the processes.
        progress: where to show it.
        origin: the identity of the first stage.
        workspace: of the output, held from the first stage to the last.
    """
    if not lock.before:
        return Execution(lock, _mode(lock, world), workspace, progress, origin, world, origin).carry_out()
    workspace.identify(origin | {"plan": plan_digest(lock)}, lock.canonical())
    report: Report | None = None
    at: Lock | None = None
    for number, planned in enumerate(lock.stages):
        stage = compile_stage(lock.plan, planned.stage, at, _made(workspace.output, number - 1)) if at else planned
        known = identity(stage, world) if at else origin
        names = ", ".join(lock.plan.passes[index].use() for index in stage.stage)
        progress.say(f"stage {number + 1} of {len(lock.stages)}: {names}")
        if stage.ends:
            break
        place = _made(workspace.output, number)
        _drop_damaged(workspace, number, progress)
        finished = finished_stage(stage, origin, place)
        if finished is None:
            own = Workspace(place)
            try:
                run = Execution(stage, _mode(stage, world), own, progress, known, world, origin, report)
                finished = run.carry_out(partial(_note_made, workspace, number))
            except PlanError:
                own.discard_without_blocks()
                raise
            finally:
                own.close()
        report, at = finished, stage
        world.announce(None)
    return Execution(stage, _mode(stage, world), workspace, progress, known, world, origin, report).carry_out()


def _note_made(workspace: Workspace, number: int, directory: Path) -> None:
    """Have the journal vouch for what a stage is about to leave."""
    workspace.append({"kind": "made", "stage": number, "files": directory_checksums(directory)})


def _drop_damaged(workspace: Workspace, number: int, progress: Progress) -> None:
    """Remove what a stage has left if it is not what the journal has noted: the stage starts over."""
    place, noted = _made(workspace.output, number), workspace.entries("made", stage=number)
    if place.is_dir() and not (noted and directory_checksums(place) == noted[-1]["files"]):
        progress.say(f"  the model that stage {number + 1} left is damaged; the stage starts over")
        shutil.rmtree(place)


def _made(output: Path, number: int) -> Path:
    """Where a stage that is not the last leaves its model, until the output is there."""
    return work_directory(output) / f"stage-{number}"


def _mode(lock: Lock, world: World) -> Mode:
    return replace(choose_mode(lock), device=world.device)


def _follow(lock: Lock, world: World) -> Report:
    """The run of another process: it takes part where the first one calls it."""
    output = lock.plan.resolve(lock.plan.run.output)
    at: Lock | None = None
    place = output
    for number, planned in enumerate(lock.stages):
        stage = compile_stage(lock.plan, planned.stage, at, place) if at else planned
        place = output if stage.ends else _made(output, number)
        work, mode = Workspace(place, following=True), _mode(stage, world)
        run = Execution(stage, mode, work, Progress(), {}, world, {})
        stage.skeleton.to(mode.device, mode.dtype)
        while (sweep := world.hear()) is not None:
            work.reread()
            torch.set_num_threads(work.entries("threads")[0]["threads"])
            run.take_part(sweep)
        if not (place / "report.json").is_file():
            break
        at = stage
    if not (output / "report.json").is_file():
        raise RunError("the first process of the run failed", where=f"process {world.rank}", fix="see its message")
    return load_report(output)
