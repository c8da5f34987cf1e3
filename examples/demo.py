"""``make demo``: the embedded model pruned 2:4 by three methods, offline, from text it samples itself.

Each method is one plan; the three differ in one table. The evaluation text, prose.txt, is a handful of famous
public-domain openings: short, so the figures are for comparing rows, not for quoting.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

import compress
from compress.passes import Magnitude, Pass, SparseGPT, Wanda
from compress.progress import Progress
from compress.report import human_seconds

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out" / "demo"
METHODS: dict[str, Pass] = {
    "magnitude": Magnitude(pattern="2:4"),
    "wanda": Wanda(pattern="2:4"),
    "sparsegpt": SparseGPT(pattern="2:4"),
}


def plan(name: str, method: Pass) -> compress.Plan:
    """One method on the embedded model."""
    return compress.Plan(
        model=compress.Model(path=str(HERE / "reference")),
        calibration=compress.Calibration(source="self", samples=128, length=256),
        run=compress.Run(output=str(OUT / name)),
        passes=(method,),
        evaluate=compress.Evaluate(perplexity=(str(HERE / "prose.txt"),), window=128),
    )


def main() -> None:
    """Run the three plans and show them side by side."""
    console = Console()
    shutil.rmtree(OUT, ignore_errors=True)
    reports = {}
    for name, method in METHODS.items():
        console.rule(f"{name} 2:4", align="left")
        reports[name] = compress.run(plan(name, method), progress=Progress(console))
    table = Table(title="\nembedded reference model, 4.2 M parameters, 2:4", title_justify="left")
    table.add_column("")
    for heading in ("perplexity", "bits/byte", "KL to dense", "same top token", "zeros", "time"):
        table.add_column(heading, justify="right")
    dense = reports["sparsegpt"].evaluation[0].dense
    table.add_row("dense", f"{dense.perplexity:.1f}", f"{dense.bits_per_byte:.3f}", "", "", "", "")
    for name, report in reports.items():
        line = report.evaluation[0]
        score, divergence = line.compressed, line.divergence
        table.add_row(
            name,
            f"{score.perplexity:.1f}",
            f"{score.bits_per_byte:.3f}",
            f"{divergence.kl_mean:.3f}",
            f"{divergence.top1_agreement:.1%}",
            f"{report.output.linear_sparsity:.0%}",
            human_seconds(report.phases["sweep"]),
        )
    console.print(table)
    console.print(f"prose.txt, {reports['wanda'].evaluation[0].convention}", highlight=False)
    relative = OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT
    console.print(f"checkpoint  {relative / 'sparsegpt'}\nreport      {relative / 'sparsegpt' / 'report.html'}")


if __name__ == "__main__":
    main()
