"""The methods, one file each. `from compress.passes import Wanda, SparseGPT`."""

from compress.passes.awq import AWQ
from compress.passes.base import (
    BlockPass,
    BlockState,
    Invariant,
    LinearPass,
    LinearState,
    ModelPass,
    Moments,
    Note,
    Pass,
    Statistics,
    Survey,
    Where,
)
from compress.passes.depth import DepthPruning
from compress.passes.eora import EoRA
from compress.passes.gptq import GPTQ
from compress.passes.loraprune import LoRAPrune
from compress.passes.lqlora import LQLoRA
from compress.passes.magnitude import Magnitude
from compress.passes.peqa import PEQA
from compress.passes.perp import PERP
from compress.passes.pruning import PruningPass
from compress.passes.quantizing import GridSettings, QuantizingPass
from compress.passes.rtn import RTN
from compress.passes.sparsegpt import SparseGPT
from compress.passes.structured import Structured
from compress.passes.wanda import Wanda
from compress.passes.width import WidthPruning

__all__ = [
    "AWQ",
    "GPTQ",
    "PEQA",
    "PERP",
    "RTN",
    "BlockPass",
    "BlockState",
    "DepthPruning",
    "EoRA",
    "GridSettings",
    "Invariant",
    "LQLoRA",
    "LinearPass",
    "LinearState",
    "LoRAPrune",
    "Magnitude",
    "ModelPass",
    "Moments",
    "Note",
    "Pass",
    "PruningPass",
    "QuantizingPass",
    "SparseGPT",
    "Statistics",
    "Structured",
    "Survey",
    "Wanda",
    "Where",
    "WidthPruning",
]
