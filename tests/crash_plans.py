"""Plans that between them have every kind of pass, barrier, stage and format; each runs in a fraction of a second."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tests.conftest import REFERENCE, tiny_directory

if TYPE_CHECKING:
    from pathlib import Path

HEAD = """\
[model]
path = "{model}"
[calibration]
source = "../text.txt"
samples = {samples}
length = {length}
[run]
output = "out"
refresh = "{refresh}"
"""
SPARSE = '[[pass]]\nuse = "sparsegpt"\npattern = "2:4"\n'
GPTQ = '[[pass]]\nuse = "gptq"\ngroup_size = 32\nscale_dtype = "float16"\n'
SHORT = "steps = 4\nevaluate_every = 2\nbatch_size = 2\n"


class CrashPlan(NamedTuple):
    """A plan, and the model it is for: a tiny one of so many blocks, or the embedded one."""

    passes: str
    samples: int = 8
    length: int = 16
    refresh: str = "block"
    blocks: int = 2
    embedded: bool = False

    def text(self) -> str:
        """The plan, for a directory beside model and text."""
        settings = {"samples": self.samples, "length": self.length, "refresh": self.refresh}
        return HEAD.format(model="../model", **settings) + self.passes

    def prepare(self, folder: Path) -> None:
        """Write model and text into a folder."""
        if self.embedded:
            (folder / "model").symlink_to(REFERENCE)
            shutil.copy(REFERENCE.parent / "prose.txt", folder / "text.txt")
            return
        settings: dict[str, Any] = {"blocks": self.blocks, "intermediate_size": 64, "dtype": torch.float16}
        tiny_directory(folder / "model", "llama", **settings)


PLANS: dict[str, CrashPlan] = {
    # A sweep of local passes on two batches, a survey before another.
    "sweeps": CrashPlan(
        SPARSE + GPTQ + '[[pass]]\nuse = "eora"\nrank = 3\n',
        samples=90,
        length=24,
        refresh="subset",
    ),
    "survey": CrashPlan(
        '[[pass]]\nuse = "sparsegpt"\nsparsity = 0.3\n'
        '[[pass]]\nuse = "magnitude"\nsparsity = 0.5\nscope = "global"\n'
        '[[pass]]\nuse = "wanda"\npattern = "2:4"\n',
        samples=90,
        length=24,
        refresh="subset",
    ),
    # Block passes: scaling, and a training of one block after another.
    "blocks": CrashPlan(
        SPARSE + f'[[pass]]\nuse = "perp"\nmode = "reconstruct"\ntrain = ["norms", "low_rank"]\nvariant = "masklora"\n'
        f"rank = 2\n{SHORT}" + '[[pass]]\nuse = "awq"\n' + GPTQ + '[[export]]\nformat = "compressed-tensors"\n',
        blocks=3,
    ),
    # Barriers between sweeps, parameters outside the blocks, ranks under a budget.
    "barriers": CrashPlan(
        SPARSE
        + f'[[pass]]\nuse = "perp"\ntrain = ["norms", "embeddings"]\n{SHORT}'
        + GPTQ
        + '[[pass]]\nuse = "eora"\nrank = 3\nbudget = 1200\n'
        + f'[[pass]]\nuse = "perp"\ntrain = ["norms", "low_rank"]\nholdout = 0.25\n{SHORT}',
    ),
    # Sets of scales.
    "scales": CrashPlan(
        GPTQ
        + f'[[pass]]\nuse = "peqa"\nname = "first"\n{SHORT}'
        + f'[[pass]]\nuse = "peqa"\nname = "second"\nsource = "../text.txt"\nseed = 1\n{SHORT}'
        + '[[export]]\nformat = "gptq"\n',
    ),
    # Fisher information, a survey that chooses grids.
    "fisher": CrashPlan(
        '[[pass]]\nuse = "wanda"\npattern = "2:4"\n'
        '[[pass]]\nuse = "lqlora"\nfisher = true\nbudget = 5.0\nrank = 2\niterations = 3\n',
    ),
    # Stages: two of structured pruning, a third of sparsity and quantization.
    "stages": CrashPlan(
        '[[pass]]\nuse = "width"\nchannels = 0.5\nmultiple = 32\n'
        '[[pass]]\nuse = "depth"\nblocks = 1\n' + SPARSE + GPTQ + '[[export]]\nformat = "packed"\n',
        blocks=3,
    ),
    "loraprune": CrashPlan(
        f'[[pass]]\nuse = "loraprune"\nchannels = 0.5\nmultiple = 16\nrank = 2\nprune_every = 1\nend = 0.75\n{SHORT}'
        + '[[pass]]\nuse = "wanda"\npattern = "2:4"\n',
    ),
    "reference": CrashPlan(SPARSE + GPTQ, samples=8, length=64, embedded=True),
}
