"""What compressing a large Llama costs, step by step, from constants measured here.

    python benchmarks/scale.py [--device cpu] [--threads 2] [--network 3.0e9] [--json OUT]

Measures a matrix product, the sum of second moments, the three solvers on one layer, the disk and SHA-256, on the
device and disk at hand, and computes from them and the shapes of Llama 3 70B and 405B what 2:4 + 4 bits + EoRA needs on
1, 8 and 64 processes of that kind: memory, seconds and traffic of each step. `--network` is in bytes per second and
process; it is a given, not a measurement. The formulas are those of docs/scale.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from compress.calibration.moments import Moments, Statistics  # noqa: E402
from compress.distributed import Job, assign  # noqa: E402
from compress.passes import GPTQ, EoRA, LinearState, SparseGPT  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = 128 * 2048
RANK = 128
KRYLOV = 6  # products of the method with as many vectors as ranks; it stops after 10 to 14 blocks of half as many
PROCESSES = (1, 8, 64)


@dataclass(frozen=True)
class Shape:
    """A Llama: hidden, intermediate and key-value widths, blocks."""

    name: str
    hidden: int
    inner: int
    kv: int
    blocks: int

    @property
    def linears(self) -> list[tuple[int, int, int]]:
        """(subset, out, in) of a block's linears."""
        h, f, k = self.hidden, self.inner, self.kv
        return [(0, h, h), (0, k, h), (0, k, h), (1, h, h), (2, f, h), (2, f, h), (3, h, f)]

    @property
    def weights(self) -> int:
        """Of a block."""
        return sum(out * width for _, out, width in self.linears)

    @property
    def inputs(self) -> list[int]:
        """The widths whose second moments are summed."""
        return [self.hidden, self.hidden, self.hidden, self.inner]


SHAPES = (Shape("70B", 8192, 28672, 1024, 80), Shape("405B", 16384, 53248, 1024, 126))


def best(function: Callable[[], Any], device: torch.device, repeat: int = 3) -> float:
    """The least seconds of some runs."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def constants(device: torch.device, folder: Path) -> dict[str, float]:
    """What is measured: multiplications or bytes per second."""
    n = 2048
    x, w = torch.randn(4096, n, device=device), torch.randn(n, n, device=device) * 0.02
    found = {"product": 4096 * n * n / best(lambda: x @ w.T, device)}
    moments = Moments(n, Statistics.GRAM, device)
    found["moments"] = 4096 * n * n / best(lambda: moments.add(x), device)
    found["factor"] = n**3 / best(lambda: (moments._factors.clear(), moments.factor(0.01)), device)
    state = LinearState("layer", w, w, torch.bfloat16)

    def solve() -> None:
        state.mask = state.grid = state.low_rank = None
        state.weight = w
        for one in (SparseGPT(pattern="2:4"), GPTQ(bits=4, group_size=128), EoRA(rank=RANK)):
            one.apply(state, moments)
            moments.error(state.dense - state.effective())

    seconds = best(solve, device) - products(n, n) / found["product"]
    found["elements"] = n**2 / max(seconds, 1e-9)  # weights per second, for what is not a matrix product
    data, path = bytes(1 << 28), folder / "data"
    found["write"] = len(data) / best(lambda: _write(path, data), torch.device("cpu"), 2)
    found["hash"] = len(data) / best(lambda: hashlib.sha256(data).digest(), torch.device("cpu"), 2)
    return found


def products(out: int, width: int) -> float:
    """Multiplications of matrix products in the solvers and the errors after each, for one linear."""
    halves = 5  # of out · in²: updates of SparseGPT and GPTQ, and three errors, each on one triangle
    return halves / 2 * out * width**2 + KRYLOV * RANK * (2 * out * width + width**2)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def costs(shape: Shape, processes: int, rates: dict[str, float], network: float) -> dict[str, float]:
    """Of one block: seconds of each step, bytes that a process sends; and a process's memory in bytes."""
    share = TOKENS / processes
    squares = sum(width**2 for width in shape.inputs)
    jobs = [
        Job(
            subset,
            products(out, width) / rates["product"] + out * width / rates["elements"],
            width**3 / rates["factor"],
        )
        for subset, out, width in shape.linears
    ]
    owners = assign(jobs, processes)
    loads = []
    for rank in range(processes):
        mine = [job for job, owner in zip(jobs, owners, strict=True) if owner == rank]
        loads.append(sum({job.group: job.setup for job in mine}.values()) + sum(job.cost for job in mine))
    activations = share * shape.hidden * 4
    kept = shape.weights * (1 + 1 / 8 + 2 / 128) + sum(2 * RANK * (out + width) for _, out, width in shape.linears)
    # A ring sends each byte twice, less the own part; results go from their owner to all, in a tree's depth of steps.
    sent = 0.56 * 8 * squares * 2 * (processes - 1) / processes + (kept if processes > 1 else 0)
    largest = max(shape.inputs)
    heaviest = max(out * width for _, out, width in shape.linears)
    solving = 4 * 0.56 * squares + max(12 * largest**2, 8 * largest**2 + 32 * heaviest)
    return {
        "forward": 2 * share * shape.weights / rates["product"],
        "moments": share * squares / rates["moments"],
        "solve": max(loads),
        "disk": (2 * activations + kept) / rates["write"] + (activations + kept) / rates["hash"],
        "network": sent / network,
        "sent": sent,
        "memory": 4 * shape.weights + max(8 * 0.56 * squares, solving),
        "work_directory": 2 * activations + kept,
    }


def main() -> None:
    """Measure, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--network", type=float, default=3.0e9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(prefix="compress-scale-") as name:
        rates = constants(torch.device(given.device), Path(name))
    table = Table(title=f"{given.device}, {given.threads} threads; hours for all blocks", title_justify="left")
    steps = ("forward", "moments", "solve", "disk", "network")
    for heading in ("model", "processes", *steps, "all", "GB sent", "GiB memory"):
        table.add_column(heading, justify="right")
    rows = []
    for shape in SHAPES:
        for processes in PROCESSES:
            found = costs(shape, processes, rates, given.network)
            hours = {step: found[step] * shape.blocks / 3600 for step in steps}
            row = {"model": shape.name, "processes": processes, "block": found, "hours": hours}
            rows.append(row | {"all_hours": sum(hours.values())})
            cells = [f"{hours[step]:.2f}" for step in steps] + [f"{sum(hours.values()):.2f}"]
            cells += [f"{found['sent'] * shape.blocks / 1e9:.0f}", f"{found['memory'] / 2**30:.0f}"]
            table.add_row(shape.name, str(processes), *cells)
    Console(width=100).print(table)
    print(json.dumps({name: f"{rate:.3g}" for name, rate in rates.items()}))
    if given.json:
        result = {"command": "python benchmarks/scale.py " + " ".join(sys.argv[1:]), "rates": rates, "rows": rows}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
