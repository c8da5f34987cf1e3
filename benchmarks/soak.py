"""Fifty different plans, one after the other in one process: what is left behind?

    python benchmarks/soak.py [--plans 50] [--json OUT]

Each plan is of another model, passes, export or settings. Afterwards the process must hold as much memory as before,
have as many threads and open files, and there may be no file but the outputs. The first ten plans warm up: libraries
are imported, allocators grow. A straight line is fitted to what the process holds after each of the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import compress  # noqa: E402
from compress.memory import resident_memory, trim  # noqa: E402
from compress.passes import (  # noqa: E402
    AWQ,
    GPTQ,
    PEQA,
    PERP,
    RTN,
    DepthPruning,
    EoRA,
    LoRAPrune,
    LQLoRA,
    Magnitude,
    SparseGPT,
    Wanda,
    WidthPruning,
)

WARM_UP = 10
TRAINED = {"steps": 4, "batch_size": 2, "evaluate_every": 2}


def chains(number: int) -> tuple[tuple, str]:
    """The passes of a plan and its export format; all differ, in a setting at least."""
    sparsity = 0.3 + 0.4 * (number % 10) / 10
    grid = GPTQ(bits=(3, 4, 8)[number % 3], group_size=(32, 64)[number % 2])
    made = [
        ((Magnitude(sparsity=sparsity),), "huggingface"),
        ((Wanda(pattern="2:4"), RTN(bits=4, group_size=32, clip=("mse", "minmax")[number % 2])), "packed"),
        ((SparseGPT(sparsity=sparsity), grid, EoRA(rank=2 + number % 7)), "compressed-tensors"),
        ((SparseGPT(pattern="2:4"), PERP(train=("norms", "low_rank"), rank=1 + number % 4, **TRAINED)), "huggingface"),
        ((AWQ(points=2 + number % 9), GPTQ(bits=4, group_size=64)), "gptq"),
        ((GPTQ(bits=4, group_size=32), PEQA(**TRAINED, seed=number)), "packed"),
        ((WidthPruning(channels=0.25, multiple=64, seed=number), SparseGPT(pattern="2:4"), grid), "packed"),
        ((DepthPruning(blocks=1), Wanda(sparsity=sparsity)), "huggingface"),
        ((LQLoRA(budget=3.0 + 0.1 * (number % 9), rank=8),), "huggingface"),
        ((LoRAPrune(channels=0.25, multiple=64, rank=1 + number % 8, **TRAINED),), "huggingface"),
    ]
    return made[number % len(made)]


def main() -> None:
    """Run, look, fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    examples = HERE.parent / "examples"
    held, counts = [], []
    with tempfile.TemporaryDirectory(prefix="compress-soak-") as name:
        folder = Path(name)
        tempfile.tempdir = str(folder / "temporary")
        Path(tempfile.tempdir).mkdir()
        order = random.Random(0).sample(range(given.plans), given.plans)
        for number in order:
            passes, kind = chains(number)
            plan = compress.Plan(
                model=compress.Model(path=str(examples / "reference")),
                calibration=compress.Calibration(source=str(examples / "prose.txt"), samples=8 + number, length=32),
                run=compress.Run(output=str(folder / "output"), refresh=("block", "subset")[number % 2]),
                passes=passes,
                exports=(compress.Export(format=kind),),
            )
            compress.run(plan)
            shutil.rmtree(folder / "output")
            left = sorted(path.name for path in folder.rglob("*"))
            if left != ["temporary"]:
                raise SystemExit(f"plan {number} left {left}")
            gc.collect()
            trim(1 << 62)
            held.append(resident_memory() / 2**20)
            counts.append((threading.active_count(), sum(1 for _ in Path("/proc/self/fd").iterdir())))
            threads, files = counts[-1]
            print(
                f"{len(held):>3}  {held[-1]:8.1f} MiB  {threads} threads  {files} files  {passes[0].use()}", flush=True
            )
    slope = float(np.polyfit(range(len(held) - WARM_UP), held[WARM_UP:], 1)[0]) if len(held) > WARM_UP + 1 else None
    result = {
        "command": "python benchmarks/soak.py",
        "plans": given.plans,
        "held_mib": held,
        "threads_and_files": counts,
        "slope_mib_per_plan": slope,
    }
    print(f"{slope} MiB a plan after the first {WARM_UP}; threads and files {counts[WARM_UP:][:1]} to {counts[-1]}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
