"""Structured pruning: what it costs in perplexity, and what it gains in speed with stock transformers.

    python benchmarks/structured.py quality [--assets DIR] [--model M] [--only TEXT …] [--windows N] [--seed S]
    python benchmarks/structured.py speed [--threads 1] [--json benchmarks/results/structured-speed.json]

quality: calibration and training as in repair.py, perplexity of twice as many windows. Each score in one shot, then
with the same training (LoRA of rank 16, merged, on all linears) behind it; LoRAPrune prunes while it trains and has no
step more. Learning rates were chosen on other text (see the lab log). "Heterogeneous": as many channels and heads in
all, spread over the blocks by the run.

speed: a Llama with random bfloat16 weights, cut by 25 % and 50 % of the parameters of its blocks. Greedy generation of
one sequence through `AutoModelForCausalLM`, dense and cut in turn, each in a process of its own; the best round counts.
What the removed FLOPs allow is the ratio of the FLOPs of a token: two for each weight of the blocks and of the head.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from repair import SETUPS, measure

from compress.passes import PERP, LoRAPrune, Pass, WidthPruning
from compress.passes.structured import rounded

HERE = Path(__file__).resolve().parent
MULTIPLES = {"reference": 32, "stories260K": 4, "babyllama-tok105": 16}
# The number of heads must divide the hidden size of a Llama, a power of two here: half of them, or none.
REMOVED: dict[str, dict[str, Any]] = {"20 %": {"channels": 0.2}, "50 %": {"channels": 0.5, "heads": 0.5}}
STEPS = {"reference": 60, "stories260K": 150, "babyllama-tok105": 150}
RATE = 3e-3  # of factors that begin at zero
RATES = {("reference", "20 %"): 5e-4, ("reference", "50 %"): 3e-3}  # of LoRAPrune's, where it is another one
SCORES = ("random", "magnitude", "wanda", "flap", "obs")
SPEED_PLAN = """\
[model]
path = "model"
[calibration]
source = "text.txt"
samples = 4
length = 128
[run]
output = "{output}"
[[pass]]
use = "width"
score = "magnitude"
{removed}
"""


def rows(model: str, steps: int | None = None, rate: float | None = None, seed: int = 0) -> dict[str, tuple[Pass, ...]]:
    """The plans, by name; `rate` of all trainings alike."""
    training: dict[str, Any] = {"rank": 16, "steps": steps or STEPS[model], "distill": 0.5}
    training |= {"patience": 99, "seed": seed}
    recover = PERP(train=("low_rank",), variant="lora-prune", learning_rate=rate or RATE, **training)
    found: dict[str, tuple[Pass, ...]] = {}
    for name, removed in REMOVED.items():
        removed = removed | {"multiple": MULTIPLES[model]}
        inner = SETUPS[model].inner
        left = rounded("channels", removed["channels"], inner, MULTIPLES[model])
        spread = removed | {"channels": 1 - left / inner, "heterogeneous": True}
        shots = {score: WidthPruning(score=score, **removed) for score in SCORES}
        shots["wanda, refitted"] = WidthPruning(score="wanda", update=True, **removed)
        shots |= {f"{score}, heterogeneous": WidthPruning(score=score, **spread) for score in ("wanda", "obs")}
        for score, one in shots.items():
            found[f"{name} {score}"] = (one,)
        for score, one in shots.items():
            if not one.heterogeneous:  # rank 16 would not fit the smallest block that there may be
                found[f"{name} {score}, trained"] = (one, recover)
        own = training | {"prune_every": 5, "learning_rate": rate or RATES.get((model, name), RATE)}
        found[f"{name} loraprune"] = (LoRAPrune(**removed, **own),)
        found[f"{name} loraprune, not refitted"] = (LoRAPrune(update=False, **removed, **own),)
        found[f"{name} loraprune, heterogeneous"] = (LoRAPrune(**spread, **own),)
    return found


def quality(arguments: argparse.Namespace) -> None:
    """Run the rows and print them."""
    known = rows(arguments.model, arguments.steps, arguments.rate, arguments.seed)
    named = [[text] if text in known else [name for name in known if text in name] for text in arguments.only or [""]]
    chosen = [name for name in known if any(name in some for some in named)]
    print("| model | removed, score | parameters | dense | perplexity | KL to dense | seconds |")
    print("|:--|:--|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(prefix="compress-structured-") as folder:
        for name in chosen:
            began = time.monotonic()
            report = measure(arguments.model, known[name], arguments.assets, Path(folder), arguments.windows)
            (line,) = report.evaluation
            assert line.dense
            assert line.divergence
            kept = report.output.parameters / report.model.parameters
            print(
                f"| {arguments.model} | {name} | {kept:.1%} | {line.dense.perplexity:.3f} "
                f"| {line.compressed.perplexity:.3f} | {line.divergence.kl_mean:.4f} "
                f"| {time.monotonic() - began:.0f} |",
                flush=True,
            )


def speed(arguments: argparse.Namespace) -> None:
    """Build, cut, and time."""
    if arguments.measure:
        print(json.dumps(generate(arguments.measure, arguments.tokens)))
        return
    with tempfile.TemporaryDirectory(prefix="compress-structured-") as name:
        folder = Path(name)
        command = [sys.executable, str(HERE / "memory_model.py"), "--output", str(folder / "model")]
        command += ["--hidden", "1536", "--intermediate", "6144", "--blocks", "8", "--vocab", "4096", "--heads", "16"]
        command += [
            "--kv-heads",
            "8",
            "--dtype",
            "bfloat16",
            "--tokenizer",
            str(HERE.parent / "examples" / "reference"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (folder / "text.txt").write_text("One day a small dog found a big red ball. " * 400, encoding="utf-8")
        for part in ("25", "50"):
            removed = f"channels = 0.{part}\nheads = 0.{part}"
            (folder / f"{part}.toml").write_text(SPEED_PLAN.format(output=part, removed=removed), encoding="utf-8")
            plan = [sys.executable, "-m", "compress", str(folder / f"{part}.toml")]
            subprocess.run(plan, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, list[dict[str, Any]]] = {"model": [], "25": [], "50": []}
        for _ in range(arguments.rounds):
            for kind, rounds in found.items():
                command = [sys.executable, __file__, "speed", "--threads", str(arguments.threads)]
                command += ["--tokens", str(arguments.tokens), "--measure", str(folder / kind)]
                rounds.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    best = {kind: max(rounds, key=lambda one: one["tokens_per_second"]) for kind, rounds in found.items()}
    dense = best["model"]
    result = {
        "command": "python benchmarks/structured.py speed",
        "threads": arguments.threads,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "best": best,
        "all_tokens_per_second": {kind: [one["tokens_per_second"] for one in rounds] for kind, rounds in found.items()},
        "cut": {
            kind: {
                "parameters": one["parameters"] / dense["parameters"],
                "bytes": one["bytes"] / dense["bytes"],
                "speed": one["tokens_per_second"] / dense["tokens_per_second"],
                "allowed_by_flops": dense["flops_per_token"] / one["flops_per_token"],
            }
            for kind, one in best.items()
            if kind != "model"
        },
    }
    for one in result["cut"].values():
        one["of_what_is_allowed"] = one["speed"] / one["allowed_by_flops"]
        one["gain_of_what_is_allowed"] = (one["speed"] - 1) / (one["allowed_by_flops"] - 1)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def generate(directory: Path, tokens: int) -> dict[str, Any]:
    """Tokens per second of greedy generation, and what the model has."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    parameters = sum(p.numel() for p in model.parameters())
    seconds = []
    with torch.inference_mode():
        ids, cache = torch.arange(16).unsqueeze(0), None
        for _ in range(tokens + 1):
            began = time.perf_counter()
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - began)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    return {
        "tokens_per_second": 1 / median(seconds[1:]),
        "parameters": parameters,
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "flops_per_token": 2 * (parameters - (0 if tied else embedding.numel())),
    }


def main() -> None:
    """Choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("quality")
    default_assets = os.environ.get("COMPRESS_ASSETS", HERE.parent.parent / "shared" / "assets")
    one.add_argument("--assets", type=Path, default=Path(default_assets))
    one.add_argument("--model", choices=sorted(SETUPS), default="reference")
    one.add_argument("--only", action="append", default=[], help="a row, or those whose names hold this; repeatable")
    one.add_argument("--windows", type=int, default=128, help="of 256 tokens, that are scored")
    one.add_argument("--steps", type=int, help="of all trainings, instead of the model's own number")
    one.add_argument("--rate", type=float, help="the learning rate of all trainings")
    one.add_argument("--seed", type=int, default=0, help="of all trainings")
    other = kinds.add_parser("speed")
    other.add_argument("--threads", type=int, default=1)
    other.add_argument("--tokens", type=int, default=24)
    other.add_argument("--rounds", type=int, default=3)
    other.add_argument("--json", type=Path)
    other.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(getattr(arguments, "threads", 1))
    (quality if arguments.kind == "quality" else speed)(arguments)


if __name__ == "__main__":
    main()
