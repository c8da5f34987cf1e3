"""What compression costs and what repair gives back: one row a plan, on a real model and held-out text.

    python benchmarks/repair.py [--assets DIR] [--model reference|stories260K|babyllama-tok105] [--only TEXT]

Calibration and training: 128 windows of 256 tokens; perplexity: 64 other windows of 256 tokens. The reference model is
calibrated on prose-calibration and scored on prose-test, the two others on the two halves of tinystories. Groups are
128 columns wide for the reference model, 32 for the others, and what divides 172 and 352 in their MLPs. The rows are
printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import compress
from compress.passes import AWQ, GPTQ, PEQA, PERP, EoRA, Pass, SparseGPT, Where

HERE = Path(__file__).resolve().parent
GROUPS = {
    "reference": (128, ()),
    "stories260K": (32, (43,)),
    "babyllama-tok105": (32, (88,)),
}  # 172 = 4 · 43, 352 = 4 · 88
WIDTHS = {"reference": (256, 768), "stories260K": (64, 172), "babyllama-tok105": (128, 352)}


def plans(model: str) -> dict[str, tuple[Pass, ...]]:
    """The rows."""
    group, odd = GROUPS[model]
    hidden, inner = WIDTHS[model]
    down = tuple(Where(match="*.down_proj", group_size=size) for size in odd)
    gptq4, gptq3 = (GPTQ(bits=bits, group_size=group, where=down) for bits in (4, 3))
    prune, refit = SparseGPT(pattern="2:4"), SparseGPT(pattern="2:4", least_squares=True)
    eora = EoRA(rank=hidden // 8, where=(Where(match="*.down_proj", rank=inner // 8),))
    perp = PERP(train=("norms",), steps=100, distill=1.0)
    return {
        "GPTQ 4 bits": (gptq4,),
        "AWQ, GPTQ 4 bits": (AWQ(), gptq4),
        "GPTQ 3 bits": (gptq3,),
        "GPTQ 3 bits, PEQA": (gptq3, PEQA(steps=100, distill=1.0)),
        "2:4": (prune,),
        "2:4, GPTQ 4 bits": (prune, gptq4),
        "2:4, GPTQ 4 bits, EoRA": (prune, gptq4, eora),
        "2:4, GPTQ 4 bits, EoRA, PERP norms": (prune, gptq4, eora, perp),
        "2:4 re-fit, GPTQ 4 bits": (refit, gptq4),
        "2:4 re-fit, GPTQ 4 bits, EoRA": (refit, gptq4, eora),
        "2:4 re-fit, GPTQ 4 bits, EoRA, PERP norms": (refit, gptq4, eora, perp),
    }


def texts(assets: Path, model: str, folder: Path) -> tuple[Path, Path]:
    """Calibration and evaluation text."""
    if model == "reference":
        return assets / "text" / "prose-calibration.txt", assets / "text" / "prose-test.txt"
    whole = (assets / "text" / "tinystories.txt").read_text(encoding="utf-8")
    half = whole.find("\n\n", len(whole) // 2)
    first, second = folder / "first.txt", folder / "second.txt"
    first.write_text(whole[:half], encoding="utf-8")
    second.write_text(whole[half:], encoding="utf-8")
    return first, second


def main() -> None:
    """Run the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_assets = os.environ.get("COMPRESS_ASSETS", HERE.parent.parent / "shared" / "assets")
    parser.add_argument("--assets", type=Path, default=Path(default_assets))
    parser.add_argument("--model", choices=sorted(GROUPS), default="reference")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    arguments = parser.parse_args()
    print("| model | plan | perplexity | of the gap | KL to dense | bits per weight |")
    print("|:--|:--|--:|--:|--:|--:|")
    gaps: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="compress-repair-") as name:
        calibration, held_out = texts(arguments.assets, arguments.model, Path(name))
        for row, passes in plans(arguments.model).items():
            if arguments.only not in row:
                continue
            plan = compress.Plan(
                model=compress.Model(path=str(arguments.assets / "models" / arguments.model)),
                calibration=compress.Calibration(
                    source=str(calibration), samples=128, length=256, selection="first", special_tokens=False
                ),
                run=compress.Run(output=str(Path(name, "out"))),
                passes=passes,
                exports=(compress.Export(format="compressed-tensors"),),
                evaluate=compress.Evaluate(perplexity=(str(held_out),), window=256, windows=64, special_tokens=False),
            )
            report = compress.run(plan, restart=True, overwrite=True)
            (line,) = report.evaluation
            assert line.dense is not None
            gap = line.compressed.perplexity - line.dense.perplexity
            base = next((gaps[other] for other in reversed(gaps) if row.startswith(f"{other}, ")), None)
            gaps[row] = gap
            recovered = "" if base is None else f"{1 - gap / base:.0%} of that above"
            kl = line.divergence.kl_mean if line.divergence else 0.0
            print(
                f"| {arguments.model} ({line.dense.perplexity:.3f}) | {row} | {line.compressed.perplexity:.3f} "
                f"| {recovered} | {kl:.4f} | {report.output.linear_bits:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
