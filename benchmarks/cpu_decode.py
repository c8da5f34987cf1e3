"""Tokens per second of batch-1 decoding on a CPU, and the memory of the weights: packed against dense, in one run.

    python benchmarks/cpu_decode.py [--threads 1] [--pattern 2:4] [--json benchmarks/results/cpu_decode.json]

Builds a Llama with random bfloat16 weights (width 2048, MLP 5632), has compress quantize it to 4 bits in groups of 128
and write it packed, and measures the plain model in float32 and bfloat16 and the packed one, each in a process of its
own, in turn, `--rounds` times; the best round counts. A round reads a prompt of 16 tokens and times the greedy tokens
after it, one by one; its figure is the median. Weights are all parameters and buffers, each storage once; the resident
memory of the process is beside it. Then, in one process, linears of one MLP matrix by the number of rows: the packed
operator, decoding, and bfloat16, which is where the crossovers in compress/kernels/cpu.py come from.

Run it on a quiet machine: a busy neighbour takes bandwidth, and so takes most from the dense models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from compress.grid import Grid, GridSpec
from compress.kernels import cpu
from compress.kernels.pack import Layout, pack_part

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
PLAN = """\
[model]
path = "model"
[run]
output = "packed"
{pruning}
[[pass]]
use = "rtn"
bits = 4
[[export]]
format = "packed"
"""
PRUNING = """
[[pass]]
use = "magnitude"
pattern = "{pattern}"
"""
KINDS = ("float32", "bfloat16", "packed")
ROWS = (1, 4, 16, 32, 64, 96, 128, 256)


def main() -> None:
    """Build, compress, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--pattern", help="prune first, as in 2:4")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        kind, directory = arguments.measure
        print(json.dumps(measure(kind, Path(directory), arguments.tokens)))
        return
    with tempfile.TemporaryDirectory(prefix="compress-decode-") as name:
        folder = Path(name)
        build(folder, arguments)
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.rounds):
            for kind in KINDS:
                one = folder / ("packed" if kind == "packed" else "model")
                command = [sys.executable, __file__, "--threads", str(arguments.threads), "--measure", kind, str(one)]
                command += ["--tokens", str(arguments.tokens)]
                found[kind].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    result = summary(found, arguments)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def build(folder: Path, arguments: argparse.Namespace) -> None:
    """The random model, and what compress makes of it."""
    command = [sys.executable, str(HERE / "memory_model.py"), "--output", str(folder / "model")]
    for option in ("hidden", "intermediate", "blocks", "vocab"):
        command += [f"--{option}", str(getattr(arguments, option))]
    command += ["--heads", "16", "--kv-heads", "8", "--dtype", "bfloat16"]
    command += ["--tokenizer", str(HERE.parent / "examples" / "reference")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pruning = PRUNING.format(pattern=arguments.pattern) if arguments.pattern else ""
    (folder / "plan.toml").write_text(PLAN.format(pruning=pruning), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "compress", str(folder / "plan.toml")], check=True, stdout=subprocess.DEVNULL)


def measure(kind: str, directory: Path, tokens: int) -> dict[str, Any]:
    """Seconds per token, and memory, of one model in this process."""
    import compress

    model: Any = compress.load(directory, device="cpu", dtype="bfloat16" if kind == "packed" else kind)
    tensors = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    seconds = []
    with torch.inference_mode():
        ids, cache = torch.arange(16).unsqueeze(0), None
        for _ in range(tokens + 1):
            began = time.perf_counter()
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - began)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    kernels = sorted({one["kernel"] for one in model.compress_kernels.values()})
    return {
        "tokens_per_second": 1 / median(seconds[1:]),
        "prompt_seconds": seconds[0],
        "weights_mib": sum(weights.values()) / 2**20,
        "resident_mib": resident / 2**20,
        "kernels": kernels,
    }


def summary(found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """The best round of each, and the ratios."""
    best = {kind: max(rounds, key=lambda one: one["tokens_per_second"]) for kind, rounds in found.items()}
    speed = {kind: one["tokens_per_second"] for kind, one in best.items()}
    return {
        "command": "python benchmarks/cpu_decode.py",
        "threads": arguments.threads,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "model": {key: getattr(arguments, key) for key in ("hidden", "intermediate", "blocks", "vocab", "pattern")},
        "best": best,
        "all_tokens_per_second": {kind: [one["tokens_per_second"] for one in rounds] for kind, rounds in found.items()},
        "speed_over_bfloat16": speed["packed"] / speed["bfloat16"],
        "speed_over_float32": speed["packed"] / speed["float32"],
        "weights_over_bfloat16": best["packed"]["weights_mib"] / best["bfloat16"]["weights_mib"],
        "milliseconds_by_rows": crossover(arguments.intermediate, arguments.hidden),
    }


def crossover(out: int, width: int) -> list[dict[str, Any]]:
    """Of one linear and each number of rows: by the operator, decoded, and by a dense weight in bfloat16."""
    lines = []
    for spec, kernel in ((GridSpec(4, 128), cpu.Int4), (GridSpec(8, 128), cpu.Int4), (GridSpec(8, -1), cpu.Int8)):
        codes = torch.randint(0, spec.largest + 1, (out, width), dtype=torch.uint8)
        scale = torch.rand(out, spec.groups(width)).add(0.1).bfloat16()
        grid = Grid(spec, scale, torch.full_like(scale, spec.middle, dtype=torch.uint8), codes)
        layout = Layout(out, width, torch.bfloat16, spec)
        parts = {suffix: pack_part(layout, suffix, grid, None, None) for suffix in layout.tensors()}
        packed, dense = kernel(layout, parts, torch.bfloat16), grid.dequantize(torch.bfloat16).bfloat16()
        limit = "INT8_ROWS" if kernel is cpu.Int8 else "INT4_ROWS"
        usual = getattr(cpu, limit)
        for rows in ROWS:
            x, line = torch.randn(rows, width).bfloat16(), {"bits": spec.bits, "groups": spec.group_size, "rows": rows}
            for name, at_most in (("operator", rows), ("decoded", 0)):
                setattr(cpu, limit, at_most)
                line[name] = fastest(partial(packed, x))
            line["bfloat16"] = fastest(partial(torch.nn.functional.linear, x, dense))
            lines.append(line)
        setattr(cpu, limit, usual)
    return lines


def fastest(call: Callable[[], object]) -> float:
    """Milliseconds of the fastest of the calls that fit in a third of a second, and of three at least."""
    best, calls, end = float("inf"), 0, time.perf_counter() + 0.3
    with torch.inference_mode():
        while calls < 3 or time.perf_counter() < end:
            began = time.perf_counter()
            call()
            best, calls = min(best, time.perf_counter() - began), calls + 1
    return 1e3 * best


if __name__ == "__main__":
    main()
