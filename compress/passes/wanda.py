"""Wanda: prune by weight times activation norm (Sun et al. 2023, arXiv 2306.11695).

Score ``S_ij = |W_ij| · ‖X_j‖₂`` with X (in, tokens); weights compete within each output row (section 3 of the
paper), or within groups of M consecutive columns for N:M. Nothing is updated. For a diagonal ``H = X Xᵀ``, removing
the set M of a row costs ``Σ_{j∈M} W_ij² H_jj``, so the lowest scores are the exact optimum.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.passes.base import LinearState, Moments, Note, Statistics
from compress.passes.magnitude import choose
from compress.passes.pruning import PruningPass


class Wanda(PruningPass):
    """Prune by |W| · ‖X‖. A column without any input has score 0 and goes first."""

    scope: Literal["row", "layer"] = Field(default="row", description="within what weights compete")

    statistics: ClassVar[Statistics] = Statistics.NORMS

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Prune the lowest scores of each row, layer or group."""
        norms = moments.norms
        linear.prune(choose(linear, linear.weight.abs() * norms, self))
        return {"dead_columns": int((norms == 0).sum())}
