"""Wanda and SparseGPT, ours and llm-compressor's, on the same model, tokens and threads, in one go.

    python benchmarks/prune.py [--peer PYTHON] [--assets DIR] [--threads 1] [--repeat 3]

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
CASES = [("wanda", None), ("wanda", "2:4"), ("sparsegpt", None), ("sparsegpt", "2:4")]


def ours(arguments: argparse.Namespace) -> None:
    """One measurement of ours; prints a JSON line."""
    import compress
    from compress.passes import SparseGPT, Wanda

    target = {"pattern": arguments.pattern} if arguments.pattern else {"sparsity": 0.5}
    method = {"wanda": Wanda, "sparsegpt": SparseGPT}[arguments.method](**target)
    plan = compress.Plan(
        model=compress.Model(path=str(arguments.model)),
        calibration=compress.Calibration(
            source=str(arguments.text), samples=128, length=256, selection="first", special_tokens=False
        ),
        run=compress.Run(output=str(arguments.output), threads=arguments.threads, refresh=arguments.refresh),
        passes=(method,),
    )
    report = compress.run(plan)
    peak = max(block.peak_memory_bytes for block in report.blocks) / 2**20
    print(json.dumps({"seconds": report.phases["sweep"], "peak_rss_mib": peak, "zeros": report.output.linear_sparsity}))


def measure(tool: str, method: str, pattern: str | None, arguments: argparse.Namespace, output: Path) -> dict:
    """Run one tool in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    common = ["--model", str(arguments.model), "--text", str(arguments.text), "--method", method]
    common += ["--threads", str(arguments.threads), "--output", str(output)]
    if tool == "llm-compressor":
        command = [arguments.peer, str(HERE / "llmcompressor_prune.py"), *common, "--pattern", pattern or "none"]
    else:
        command = [sys.executable, __file__, "--one", *common, "--refresh", tool.split()[-1]]
        command += ["--pattern", pattern] if pattern else []
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
    parser.add_argument("--json", type=Path, default=HERE / "results" / "prune.json")
    parser.add_argument("--model", type=Path, default=HERE.parent / "examples" / "reference")
    parser.add_argument("--text", type=Path)
    for hidden in ("--method", "--pattern", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--refresh", default="block", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.text = arguments.text or arguments.assets / "text" / "prose-calibration.txt"
    if arguments.one:
        ours(arguments)
        return
    if not arguments.text.exists():
        raise SystemExit(f"no calibration text at {arguments.text}; give --assets or --text")
    tools = ["compress block", "compress subset"] + (["llm-compressor"] if arguments.peer else [])
    rows = []
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as folder:
        for method, pattern in CASES:
            runs: dict[str, list[dict]] = {tool: [] for tool in tools}
            for _ in range(arguments.repeat):
                for tool in tools:
                    runs[tool].append(measure(tool, method, pattern, arguments, Path(folder, tool.replace(" ", "-"))))
            for tool in tools:
                rows.append(
                    {
                        "case": f"{method} {pattern or '50 %'}",
                        "tool": tool,
                        "perplexity": perplexity(Path(folder, tool.replace(" ", "-")), arguments),
                        "seconds": min(run["seconds"] for run in runs[tool]),
                        "peak_rss_mib": min(run["peak_rss_mib"] for run in runs[tool]),
                        "all_seconds": [round(run["seconds"], 2) for run in runs[tool]],
                        "all_peak_rss_mib": [round(run["peak_rss_mib"]) for run in runs[tool]],
                    }
                )
    show(rows, arguments)
    if arguments.json:
        result = {"command": "python benchmarks/prune.py", "threads": arguments.threads, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(rows: list[dict], arguments: argparse.Namespace) -> None:
    """The comparison as a table."""
    table = Table(title=f"{arguments.threads} thread(s), best of {arguments.repeat}", title_justify="left")
    for heading in ("case", "tool", "perplexity", "seconds", "speed-up", "peak MiB"):
        table.add_column(heading, justify="left" if heading in ("case", "tool") else "right")
    peers = {row["case"]: row["seconds"] for row in rows if row["tool"] == "llm-compressor"}
    for row in rows:
        speedup = f"{peers[row['case']] / row['seconds']:.2f}" if row["case"] in peers else "-"
        cells = (f"{row['perplexity']:.3f}", f"{row['seconds']:.2f}", speedup, f"{row['peak_rss_mib']:.0f}")
        table.add_row(row["case"], row["tool"], *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
