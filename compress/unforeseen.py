"""Errors that nobody foresaw, in a pass of one's own or in compress: which pass on which layer they came from."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from compress.errors import RunError

if TYPE_CHECKING:
    from types import FrameType, TracebackType


def unforeseen(error: Exception) -> RunError:
    """The error as a failure of the run, with the pass that was at work where there is one."""
    use, place = _at_work(error.__traceback__)
    problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if ":" in use:
        fix = "correct the pass, then run the same command again: it resumes"
    else:
        fix = "this is a mistake in compress: report it, with the plan and the lines above"
    return RunError(problem, where=place or None, fix=fix)


def _at_work(trace: TracebackType | None) -> tuple[str, str]:
    """How a plan calls the pass, and it with its layer; empty where none was at work."""
    from compress.passes.base import Pass

    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    for frame in frames:  # the outermost one applies the pass; those within may look at other passes
        layer, one = _layer(frame), _local(frame, Pass)
        if one is not None and layer:
            return one.use(), f"{one.use()} on {layer}"
    for frame in reversed(frames):
        one = frame.f_locals.get("self")
        if isinstance(one, Pass):
            return one.use(), one.use()
    return "", ""


def _layer(frame: FrameType) -> str:
    from compress.barrier import WholeModel
    from compress.lock import Linear
    from compress.passes.base import BlockState
    from compress.state import LinearState

    if _local(frame, WholeModel):
        return "the whole model"
    block = _local(frame, BlockState)
    if block:
        return f"block {frame.f_locals['index']}" if "index" in frame.f_locals else "a block"
    linear = _local(frame, (Linear, LinearState))
    return str(linear.name) if linear else ""


def _local(frame: FrameType, kind: Any) -> Any:
    return next((value for value in frame.f_locals.values() if isinstance(value, kind)), None)
