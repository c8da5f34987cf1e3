"""Pruning and quantizing, ours and llm-compressor's, on the same model, tokens and threads, in one go.

    python benchmarks/compare.py [--peer PYTHON] [--assets DIR] [--threads 1] [--repeat 3] [--only TEXT]

`--peer` (or COMPRESS_PEER_PYTHON) is the interpreter of an environment that has llm-compressor; without it only ours
is measured. Every measurement is a process of its own, the two tools take turns, and the best time and the least
memory of each are compared. Calibration: the first 128 x 256 tokens; perplexity: the first 64 windows of 256 tokens,
scored for both by the same evaluator. The time of both is that of the compression alone, without imports, tokenizing
and saving; the memory is the peak of the process up to there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
# What is done, as steps of the method and its target: N:M or a sparsity, bits in groups of 128, or a rank.
# No RTN: what llm-compressor saves uncompressed after it are the weights before rounding.
CASES = {
    "Wanda 50 %": ["wanda:0.5"],
    "Wanda 2:4": ["wanda:2:4"],
    "SparseGPT 50 %": ["sparsegpt:0.5"],
    "SparseGPT 2:4": ["sparsegpt:2:4"],
    "GPTQ 4 bits": ["gptq:4"],
    "GPTQ 3 bits": ["gptq:3"],
    "SparseGPT 2:4 + GPTQ 4 bits": ["sparsegpt:2:4", "gptq:4"],
    "SparseGPT 2:4 + GPTQ 4 bits + EoRA": ["sparsegpt:2:4", "gptq:4", "eora:32"],  # it has no counterpart
}
# Ways to run ours that have no counterpart: refresh, and other settings of the passes.
OURS = {
    "compress": {},
    "compress, refresh subset": {"refresh": "subset"},
    "compress, activation order": {"gptq": {"order": "activation"}},
    "compress, least squares": {"sparsegpt": {"least_squares": True}},
    "compress, jointly": {"joint": True},
}
PEER = "llm-compressor"


def applies(way: str, steps: list[str]) -> bool:
    """Whether a way to run ours differs from the plain one for these steps."""
    methods = [step.partition(":")[0] for step in steps]
    if way == "compress, jointly":
        return methods == ["sparsegpt", "gptq"]
    if way == "compress, least squares":
        return methods == ["sparsegpt", "gptq"]
    return all(method not in ("sparsegpt", "gptq") or method in methods for method in OURS[way])


def passes(steps: list[str], way: dict) -> tuple:
    """The passes of a case."""
    from compress.passes import GPTQ, RTN, EoRA, SparseGPT, Wanda

    methods = {"wanda": Wanda, "sparsegpt": SparseGPT, "rtn": RTN, "gptq": GPTQ, "eora": EoRA}
    if way.get("joint"):
        return (SparseGPT(pattern=steps[0].partition(":")[2], bits=int(steps[1].partition(":")[2])),)
    made = []
    for step in steps:
        method, _, target = step.partition(":")
        keys = {"rtn": "bits", "gptq": "bits", "eora": "rank"}
        key = keys.get(method, "pattern" if ":" in target else "sparsity")
        value = target if key == "pattern" else float(target) if key == "sparsity" else int(target)
        made.append(methods[method](**{key: value}, **way.get(method, {})))
    return tuple(made)


def ours(arguments: argparse.Namespace) -> None:
    """One measurement of ours; prints a JSON line."""
    import compress

    way = OURS[arguments.one]
    plan = compress.Plan(
        model=compress.Model(path=str(arguments.model)),
        calibration=compress.Calibration(
            source=str(arguments.text), samples=128, length=256, selection="first", special_tokens=False
        ),
        run=compress.Run(output=str(arguments.output), threads=arguments.threads, refresh=way.get("refresh", "block")),
        passes=passes(arguments.steps.split(","), way),
    )
    report = compress.run(plan)
    peak = max(block.peak_memory_bytes for block in report.blocks) / 2**20
    line = {"seconds": report.phases["sweep"], "peak_rss_mib": peak, "zeros": report.output.linear_sparsity}
    print(json.dumps(line))


def measure(tool: str, steps: list[str], arguments: argparse.Namespace, output: Path) -> dict:
    """Run one tool in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    common = ["--model", str(arguments.model), "--text", str(arguments.text), "--steps", ",".join(steps)]
    common += ["--threads", str(arguments.threads), "--output", str(output)]
    if tool == PEER:
        command = [arguments.peer, str(HERE / "llmcompressor_run.py"), *common]
    else:
        command = [sys.executable, __file__, "--one", tool, *common]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def perplexity(directory: Path, arguments: argparse.Namespace) -> float:
    """The score of an emitted directory, the same for both tools."""
    from compress.evals.perplexity import evaluate
    from compress.plan import Evaluate

    text = str(arguments.assets / "text" / "prose-test.txt")
    settings = Evaluate(perplexity=(text,), window=256, windows=64, special_tokens=False)
    return evaluate(directory, settings)[0].compressed.perplexity


def main() -> None:
    """Compare, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_assets = os.environ.get("COMPRESS_ASSETS", HERE.parent.parent / "shared" / "assets")
    parser.add_argument("--assets", type=Path, default=Path(default_assets))
    parser.add_argument("--peer", default=os.environ.get("COMPRESS_PEER_PYTHON"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "compare.json")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--ways", nargs="+", choices=OURS, default=list(OURS), help="to run ours")
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "reference")
    parser.add_argument("--text", type=Path)
    for hidden in ("--steps", "--output", "--one"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.text = arguments.text or arguments.assets / "text" / "prose-calibration.txt"
    if arguments.one:
        ours(arguments)
        return
    if not arguments.text.exists():
        raise SystemExit(f"no calibration text at {arguments.text}; give --assets or --text")
    rows = []
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as folder:
        for case, steps in CASES.items():
            if arguments.only not in case:
                continue
            tools = [way for way in arguments.ways if applies(way, steps)]
            tools += [PEER] if arguments.peer and not any(step.startswith("eora") for step in steps) else []
            runs: dict[str, list[dict]] = {tool: [] for tool in tools}
            outputs = {tool: Path(folder, str(number)) for number, tool in enumerate(tools)}
            for _ in range(arguments.repeat):
                for tool in tools:
                    runs[tool].append(measure(tool, steps, arguments, outputs[tool]))
            for tool in tools:
                rows.append(
                    {
                        "case": case,
                        "tool": tool,
                        "perplexity": perplexity(outputs[tool], arguments),
                        "seconds": min(run["seconds"] for run in runs[tool]),
                        "peak_rss_mib": min(run["peak_rss_mib"] for run in runs[tool]),
                        "zeros": runs[tool][0]["zeros"],
                        "broken_groups": runs[tool][0].get("broken_groups"),
                        "all_seconds": [round(run["seconds"], 2) for run in runs[tool]],
                        "all_peak_rss_mib": [round(run["peak_rss_mib"]) for run in runs[tool]],
                    }
                )
    show(rows, arguments)
    if arguments.json:
        result = {
            "command": "python benchmarks/compare.py " + " ".join(sys.argv[1:]),
            "threads": arguments.threads,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(rows: list[dict], arguments: argparse.Namespace) -> None:
    """The comparison as a table."""
    table = Table(title=f"{arguments.threads} thread(s), best of {arguments.repeat}", title_justify="left")
    for heading in ("case", "tool", "perplexity", "seconds", "speed-up", "peak MiB"):
        table.add_column(heading, justify="left" if heading in ("case", "tool") else "right")
    peers = {row["case"]: row["seconds"] for row in rows if row["tool"] == PEER}
    for row in rows:
        speedup = f"{peers[row['case']] / row['seconds']:.2f}" if row["case"] in peers else "-"
        cells = (f"{row['perplexity']:.3f}", f"{row['seconds']:.2f}", speedup, f"{row['peak_rss_mib']:.0f}")
        table.add_row(row["case"], row["tool"], *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
