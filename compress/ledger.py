"""The ledger: what a pass did to a linear, in a line of the journal and of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.moments import Moments, Statistics
from compress.report import LedgerLine

if TYPE_CHECKING:
    from torch import Tensor

    from compress.lock import Linear
    from compress.passes.base import Note, Pass
    from compress.state import LinearState

NOTHING = Moments(0, Statistics.NONE)  # of the inputs, where a pass over the whole model has none at hand


def ledger_line(
    sweep: int,
    index: int,
    one: Pass,
    linear: Linear,
    state: LinearState,
    moments: Moments,
    before: float,
    note: Note,
    seconds: float,
) -> LedgerLine:
    """One linear through one pass.

    Args:
        sweep: its number in the lock.
        index: of the pass in the plan.
        one: the pass.
        linear: which.
        state: as the pass left it.
        moments: of its inputs.
        before: its `relative_error` until then.
        note: what the pass has to say.
        seconds: how long it took.
    """
    return LedgerLine(
        sweep=sweep,
        block=linear.block,
        linear=linear.name,
        pass_index=index,
        use=one.use(),
        out_features=linear.out_features,
        in_features=linear.in_features,
        sparsity=state.sparsity,
        bits=None if state.grid is None else state.grid.spec.bits,
        error_before=before,
        error_after=relative_error(moments, state),
        error_kind=("weight", "diagonal", "gram")[moments.statistics],
        tokens=moments.tokens,
        damping=note.get("damping"),
        dead_columns=note.get("dead_columns", 0),
        fallback=note.get("fallback"),
        detail=note.get("detail"),
        seconds=seconds,
    )


def relative_error(moments: Moments, state: LinearState) -> float:
    """‖(W − Ŵ) X‖² / ‖W X‖² by the moments at hand, ‖W − Ŵ‖² / ‖W‖² without any."""
    if state.weight is state.dense and state.low_rank is None:
        return 0.0
    return _size(moments, state.dense - state.effective()) / max(_size(moments, state.dense), 1e-30)


def _size(moments: Moments, matrix: Tensor) -> float:
    return moments.error(matrix) if moments.tokens else float(matrix.square().sum())


def pruned(ledger: list[LedgerLine]) -> float:
    """The share of the weights of a block's linears that is pruned after the last of its passes."""
    last = {line.linear: line for line in ledger}.values()
    sizes = [line.out_features * line.in_features for line in last]
    return sum(line.sparsity * size for line, size in zip(last, sizes, strict=True)) / max(1, sum(sizes))
