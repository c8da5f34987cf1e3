"""compress eval against lm-eval's own command: are the numbers equal to the last digit, and what does it cost?

    python benchmarks/harness.py --assets ../shared/assets --limit 500

Both run as commands on the same directories, one task at a time, one after the other; results/harness.json keeps the
figures and the CPU seconds of both, which a busy machine changes less than the time on the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMS = ROOT / "compress" / "evals" / "tasks"
MODELS = ("reference", "stories260K", "babyllama-tok105")
TASKS = (
    ("minimal_pairs", "tasks/blimp/transitive.jsonl"),
    ("last_word", "tasks/lambada_openai.jsonl"),
    ("multiple_choice", "tasks/arc_easy.jsonl"),
    ("multiple_choice", "tasks/piqa.jsonl"),
    ("endings", "tasks/hellaswag.jsonl"),
    ("rolling_perplexity", "text/prose-test.txt"),
)


class Refused(Exception):
    """The command failed: lm-eval asserts that an answer fits the context, and compress says so."""


def run(command: list[str]) -> tuple[str, float]:
    """The standard output of a command, and its CPU seconds. Raises Refused."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise Refused(done.stderr.strip().splitlines()[-1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def theirs(model: Path, form: str, file: Path, limit: int) -> tuple[dict[str, float], float]:
    """The figures of lm-eval's command."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["run", "--model", "hf", "--model_args", f"pretrained={model},softmax_dtype=float32"]
        arguments += ["--include_path", str(FORMS), "--tasks", form, "--metadata", json.dumps({"file": str(file)})]
        arguments += ["--limit", str(limit), "--batch_size", "16", "--device", "cpu", "--output_path", folder]
        _, seconds = run([sys.executable, "-m", "lm_eval", *arguments])
        (written,) = Path(folder).rglob("results_*.json")
        found = json.loads(written.read_text())["results"][form]
    return {k.removesuffix(",none"): v for k, v in found.items() if k.endswith(",none") and "_stderr" not in k}, seconds


def ours(model: Path, form: str, file: Path, limit: int) -> tuple[dict[str, float], float]:
    """The figures of compress eval."""
    arguments = ["eval", str(model), "--tasks", f"{form}:{file}", "--limit", str(limit), "--no-cache", "--json"]
    text, seconds = run([sys.executable, "-m", "compress", *arguments, "--device", "cpu"])
    (line,) = json.loads(text)["tasks"]
    return {one["metric"]: one["compressed"]["value"] for one in line["metrics"]}, seconds


def main() -> None:
    """Compare on every model and task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500)
    given = parser.parse_args()
    rows = []
    for model in MODELS:
        for form, name in TASKS:
            inputs = (given.assets / "models" / model, form, given.assets / name, given.limit)
            try:
                (bare, bare_seconds), (found, seconds) = theirs(*inputs), ours(*inputs)
            except Refused as error:
                print(f"{model}, {form}:{Path(name).stem}: left out, {error}", flush=True)
                continue
            row = {"model": model, "task": f"{form}:{Path(name).stem}", "lm_eval": bare, "compress": found}
            rows.append({**row, "equal": bare == found, "lm_eval_seconds": bare_seconds, "compress_seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    both = [sum(row[f"{tool}_seconds"] for row in rows) for tool in ("lm_eval", "compress")]
    print(f"equal in {sum(row['equal'] for row in rows)} of {len(rows)}; seconds {both[0]:.1f} and {both[1]:.1f}")
    result = {"command": " ".join(["python benchmarks/harness.py", f"--limit {given.limit}"]), "rows": rows}
    (ROOT / "benchmarks" / "results" / "harness.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
