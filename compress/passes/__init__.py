"""The methods, one file each. `from compress.passes import Wanda, SparseGPT`."""

from compress.passes.base import (
    Invariant,
    LinearPass,
    LinearState,
    Moments,
    Note,
    Pass,
    PruningPass,
    Statistics,
    Survey,
    Where,
)
from compress.passes.magnitude import Magnitude
from compress.passes.sparsegpt import SparseGPT
from compress.passes.wanda import Wanda

__all__ = [
    "Invariant",
    "LinearPass",
    "LinearState",
    "Magnitude",
    "Moments",
    "Note",
    "Pass",
    "PruningPass",
    "SparseGPT",
    "Statistics",
    "Survey",
    "Wanda",
    "Where",
]
