"""``make demo``: the embedded model pruned 2:4, quantized and repaired, offline, from text it samples itself.

Each row is one plan; a later one adds a pass to the one before. The evaluation text, prose.txt, is a handful of famous
public-domain openings: short, so the figures are for comparing rows, not for quoting.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

import compress
from compress.passes import GPTQ, PERP, EoRA, Magnitude, Pass, SparseGPT, Wanda, Where
from compress.progress import Progress
from compress.report import human_bytes, human_seconds

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "demo"
# An eighth of each linear's inputs: the reference model is 256 wide, its MLP 768.
BRANCH = EoRA(rank=32, where=(Where(match="*.down_proj", rank=96),))
PLANS: dict[str, tuple[Pass, ...]] = {
    "magnitude 2:4": (Magnitude(pattern="2:4"),),
    "wanda 2:4": (Wanda(pattern="2:4"),),
    "sparsegpt 2:4": (SparseGPT(pattern="2:4"),),
    "  + gptq 4 bits": (SparseGPT(pattern="2:4"), GPTQ(bits=4)),
    "  + eora": (SparseGPT(pattern="2:4"), GPTQ(bits=4), BRANCH),
    "  + perp": (
        SparseGPT(pattern="2:4"),
        GPTQ(bits=4),
        BRANCH,
        PERP(train=("norms",), steps=30, evaluate_every=10, distill=1.0),
    ),
}


def folder(passes: tuple[Pass, ...]) -> Path:
    """Where a row's checkpoint goes."""
    return OUT / "-".join(one.use() for one in passes)


def plan(passes: tuple[Pass, ...]) -> compress.Plan:
    """One row: passes on the embedded model; codes are written as codes."""
    quantized = any(one.grid() for one in passes)
    return compress.Plan(
        model=compress.Model(path=str(HERE / "reference")),
        calibration=compress.Calibration(source="self", samples=128, length=256),
        run=compress.Run(output=str(folder(passes))),
        passes=passes,
        exports=(compress.Export(format="compressed-tensors" if quantized else "huggingface"),),
        evaluate=compress.Evaluate(perplexity=(str(HERE / "prose.txt"),), window=128),
    )


def main() -> None:
    """Run the plans and show them side by side."""
    console = Console()
    shutil.rmtree(OUT, ignore_errors=True)
    reports = {}
    for name, passes in PLANS.items():
        console.rule(" → ".join(one.use() for one in passes), align="left")
        reports[name] = compress.run(plan(passes), progress=Progress(console))
    title = "\nembedded reference model, 4.2 M parameters"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("perplexity", "KL to dense", "same top", "pruned", "size", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    first = next(iter(reports.values()))
    dense = first.evaluation[0].dense
    table.add_row("dense", f"{dense.perplexity:.1f}", "", "", "", human_bytes(first.model.bytes), "")
    for name, report in reports.items():
        line = report.evaluation[0]
        score, divergence = line.compressed, line.divergence
        table.add_row(
            name,
            f"{score.perplexity:.1f}",
            f"{divergence.kl_mean:.3f}",
            f"{divergence.top1_agreement:.1%}",
            f"{report.output.linear_sparsity:.0%}",
            human_bytes(report.output.bytes),
            human_seconds(report.phases["sweep"]),
        )
    console.print(table)
    console.print(f"prose.txt, {first.evaluation[0].convention}", highlight=False)
    last = folder(passes)
    relative = last.relative_to(Path.cwd()) if last.is_relative_to(Path.cwd()) else last
    console.print(f"checkpoint  {relative}\nreport      {relative / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    main()
