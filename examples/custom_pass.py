"""A pass of your own: prune by ``|W_ij| · ‖X_j‖^power``. At power 0 this is magnitude pruning, at 1 it is Wanda.

Run it from a plan with ``use = "custom_pass:PowerPruning"`` and ``PYTHONPATH=examples``; see docs/passes.md.
"""

from typing import ClassVar

from pydantic import Field

from compress.passes import LinearState, Moments, Note, PruningPass, Statistics
from compress.state import lowest, lowest_in_groups, pruned_count


class PowerPruning(PruningPass):
    """Prune by |W| times a power of the input norm; weights compete within each output row."""

    power: float = Field(default=0.5, ge=0, description="exponent of the input norm")

    statistics: ClassVar[Statistics] = Statistics.NORMS

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Prune the lowest scores of each row, or of each group of a pattern."""
        scores = linear.effective().abs() * moments.norms**self.power  # (out, in)
        if linear.mask is not None:  # what an earlier pass pruned counts, and goes first
            scores = scores.masked_fill(~linear.mask, -1.0)
        if self.pattern is not None:
            linear.prune(lowest_in_groups(scores, self.pattern))
        else:
            linear.prune(lowest(scores, pruned_count(self.sparsity, linear.in_features)))
        return {"dead_columns": int((moments.norms == 0).sum())}
