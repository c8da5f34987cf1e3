"""What compression costs and what repair gives back: one row a plan, on a real model and held-out text.

    python benchmarks/repair.py [--assets DIR] [--model NAME] [--only TEXT …] [--list]

Calibration and training: 512 windows of 256 tokens; perplexity: 64 windows of 256 tokens of other text. The reference
model is calibrated on prose-calibration and scored on prose-test, the two others on the two halves of tinystories.
Groups are 128 columns wide for the reference model, 32 for the others, and what divides 172 and 352 in their MLPs.

The rows are printed as a Markdown table. `--only` takes the row of this name, or else those whose names hold the text;
rows that the share of the gap is measured from are run with them. Bits per weight are those of all linears in blocks
and count codes, scales of both levels, masks and branches; weights without codes count as stored, zeros too.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import compress
from compress.passes import (
    AWQ,
    GPTQ,
    PEQA,
    PERP,
    RTN,
    EoRA,
    LQLoRA,
    Magnitude,
    Pass,
    SparseGPT,
    Wanda,
    Where,
)

if TYPE_CHECKING:
    from compress.report import Report

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setup:
    """What a model's shapes ask for."""

    hidden: int
    inner: int  # the width of the MLP
    group: int
    odd: int | None  # the group size of down_proj, where `group` does not divide its width
    normal_float: int | None  # likewise for groups of 64
    choices: tuple[int, ...]  # group sizes under a budget of bits
    few: tuple[str, ...]  # linears whose updates of rank 1 are, with the norms, less than 1 % of the parameters
    dtype: torch.dtype
    steps: int  # of a training
    more: int  # ranks trained beside a branch, in `few`


SETUPS = {
    "reference": Setup(256, 768, 128, None, None, (32, 64, 128), ("*",), torch.float16, 100, 2),
    "stories260K": Setup(64, 172, 32, 43, 43, (16, 32, 64, 43, 86), ("*.o_proj", "*.down_proj"), torch.float32, 200, 1),
    "babyllama-tok105": Setup(128, 352, 32, 88, 44, (16, 32, 64, 44, 88), ("*.mlp.*",), torch.float32, 200, 1),
}  # 172 = 4 · 43, 352 = 2⁵ · 11


@dataclass(frozen=True)
class Row:
    """A plan, and the row whose gap to the dense model it is to narrow."""

    passes: tuple[Pass, ...]
    base: str | None = None


def rows(model: str) -> dict[str, Row]:
    """The rows, by name."""
    setup = SETUPS[model]
    down = () if setup.odd is None else (Where(match="*.down_proj", group_size=setup.odd),)
    rtn4, rtn3 = (RTN(bits=bits, group_size=setup.group, where=down) for bits in (4, 3))
    gptq4, gptq3 = (GPTQ(bits=bits, group_size=setup.group, where=down) for bits in (4, 3))
    sparse, refit = SparseGPT(pattern="2:4"), SparseGPT(pattern="2:4", least_squares=True)
    eighth, inner = setup.hidden // 8, setup.inner // 8
    eora, svd = (
        EoRA(rank=eighth, norm=norm, where=(Where(match="*.down_proj", rank=inner),))
        for norm in ("activation", "weight")
    )
    eora_hidden, svd_hidden = (EoRA(rank=eighth, norm=norm) for norm in ("activation", "weight"))
    training = {"steps": setup.steps, "learning_rate": 1e-2, "distill": 1.0}
    norms = PERP(train=("norms",), **training)
    merged = {
        variant: PERP(train=("norms", "low_rank"), variant=variant, rank=1, match=setup.few, **training)
        for variant in ("lora-prune", "masklora", "scalelora")
    }
    lora = PERP(train=("norms", "low_rank"), rank=1, match=setup.few, **training)
    long = {"steps": 8 * setup.steps, "learning_rate": 5e-3, "schedule": "cosine", "patience": 8}
    beside = {"train": ("norms", "low_rank"), "extend": True, "rank": setup.more, "match": setup.few}
    extend = PERP(**beside, distill=1.0, **long)
    mixed = PERP(**beside, distill=0.5, learning_rate=1e-2, steps=150)
    peqa = PEQA(learning_rate=2e-3)
    return {
        "RTN 4 bits": Row((rtn4,)),
        "GPTQ 4 bits": Row((gptq4,), "RTN 4 bits"),
        "AWQ, RTN 4 bits": Row((AWQ(), rtn4), "RTN 4 bits"),
        "AWQ, GPTQ 4 bits": Row((AWQ(), gptq4), "GPTQ 4 bits"),
        "RTN 3 bits": Row((rtn3,)),
        "GPTQ 3 bits": Row((gptq3,), "RTN 3 bits"),
        "GPTQ 3 bits, PEQA": Row((gptq3, peqa), "GPTQ 3 bits"),
        "GPTQ 3 bits, EoRA": Row((gptq3, eora), "GPTQ 3 bits"),
        "magnitude 2:4": Row((Magnitude(pattern="2:4"),)),
        "Wanda 2:4": Row((Wanda(pattern="2:4"),)),
        "SparseGPT 2:4": Row((sparse,)),
        "re-fit 2:4": Row((refit,), "SparseGPT 2:4"),
        "2:4, 4 bits": Row((sparse, gptq4)),
        "2:4, 4 bits, EoRA": Row((sparse, gptq4, eora), "2:4, 4 bits"),
        "re-fit 2:4, 4 bits": Row((refit, gptq4)),
        "re-fit 2:4, 4 bits, SVD hidden/8": Row((refit, gptq4, svd_hidden), "re-fit 2:4, 4 bits"),
        "re-fit 2:4, 4 bits, EoRA hidden/8": Row((refit, gptq4, eora_hidden), "re-fit 2:4, 4 bits"),
        "re-fit 2:4, 4 bits, SVD": Row((refit, gptq4, svd), "re-fit 2:4, 4 bits"),
        "re-fit 2:4, 4 bits, EoRA": Row((refit, gptq4, eora), "re-fit 2:4, 4 bits"),
        "NF3": Row((normal_float(setup),)),
        "NF3, Fisher": Row((normal_float(setup, fisher=True, clip="mse"),), "NF3"),
        "LQ-LoRA 2.75 bits": Row((lqlora(setup),), "NF3"),
        "LQ-LoRA 3.127 bits": Row((lqlora(setup, 3.127),), "NF3"),
        "re-fit 2:4, 4 bits, EoRA, PERP norms": Row((refit, gptq4, eora, norms), "re-fit 2:4, 4 bits, EoRA"),
        "re-fit 2:4, 4 bits, EoRA, PERP extend": Row((refit, gptq4, eora, extend), "re-fit 2:4, 4 bits, EoRA"),
        "re-fit 2:4, 4 bits, EoRA, PERP extend, distill 0.5": Row(
            (refit, gptq4, eora, mixed), "re-fit 2:4, 4 bits, EoRA"
        ),
        "re-fit 2:4, 4 bits, PERP lora": Row((refit, gptq4, lora), "re-fit 2:4, 4 bits"),
        "re-fit 2:4, PERP norms": Row((refit, norms), "re-fit 2:4"),
        "re-fit 2:4, PERP masklora": Row((refit, merged["masklora"]), "re-fit 2:4"),
        "re-fit 2:4, PERP lora-prune": Row((refit, merged["lora-prune"]), "re-fit 2:4"),
        "re-fit 2:4, PERP scalelora": Row((refit, merged["scalelora"]), "re-fit 2:4"),
        "re-fit 2:4, PERP masklora, 4 bits": Row((refit, merged["masklora"], gptq4), "re-fit 2:4, 4 bits"),
        "re-fit 2:4, PERP masklora, 4 bits, EoRA": Row(
            (refit, merged["masklora"], gptq4, eora), "re-fit 2:4, 4 bits, EoRA"
        ),
    }


def normal_float(setup: Setup, **settings: object) -> LQLoRA:
    """NormalFloat of 3 bits in groups of 64, or a little less in down_proj; without a branch."""
    odd = setup.normal_float
    where = () if odd is None else (Where(match="*.down_proj", group_size=odd),)
    return LQLoRA(bits=3, group_size=64, rank=0, where=where, **settings)


def lqlora(setup: Setup, budget: float = 2.75) -> LQLoRA:
    """LQ-LoRA under a budget of bits per weight that counts branches."""
    return LQLoRA(
        budget=budget,
        fisher=True,
        clip="mse",
        choices_group=setup.choices,
        choices_rank=(0, 1, 2),
        choices_scale_bits=(4, 8),
        choices_bits=(2, 3, 4),
    )


CHOSEN = re.compile(
    r"nf(?P<bits>\d+), group (?P<group_size>\d+), scales of (?P<scale_bits>\d+) bits, rank (?P<rank>\d+)"
)


def bits_per_weight(report: Report, passes: tuple[Pass, ...], dtype: torch.dtype) -> float:
    """Bits of all linears in blocks; NormalFloat codes, which are written as values, by what the codes would take."""
    lqlora = next((one for one in passes if isinstance(one, LQLoRA)), None)
    if lqlora is None:
        assert report.output.linear_bits is not None
        return report.output.linear_bits
    bits = weights = 0
    for line in report.linears:
        found = CHOSEN.match(line.detail or "")
        assert found is not None
        chosen = {"budget": None} | {key: int(value) for key, value in found.groupdict().items()}
        one = lqlora.with_settings(chosen)
        bits += one.storage_bits(line.out_features, line.in_features, dtype)
        weights += line.out_features * line.in_features
    return bits / weights


def layer_error(report: Report) -> str:
    """What the last pass over linears left of their outputs, on the calibration text; empty where not measured so."""
    left = [one for one in report.passes if one.use not in ("perp", "peqa")][-1]
    return f"{left.relative_error:.4f}" if left.error_kind == "gram" else ""


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


def measure(model: str, passes: tuple[Pass, ...], assets: Path, folder: Path, windows: int = 64) -> Report:
    """Run one plan."""
    calibration, held_out = texts(assets, model, folder)
    codes = any(one.grid() for one in passes) and not any(isinstance(one, LQLoRA) for one in passes)
    plan = compress.Plan(
        model=compress.Model(path=str(assets / "models" / model)),
        calibration=compress.Calibration(source=str(calibration), samples=512, length=256, special_tokens=False),
        run=compress.Run(output=str(folder / "out"), device="cpu", threads=1),
        passes=passes,
        exports=(compress.Export(format="compressed-tensors" if codes else "huggingface"),),
        evaluate=compress.Evaluate(perplexity=(str(held_out),), window=256, windows=windows, special_tokens=False),
    )
    return compress.run(plan, restart=True, overwrite=True)


def wanted(known: dict[str, Row], only: list[str]) -> list[str]:
    """The rows to run, in the order of the table, with those they are compared with."""
    chosen = {
        name
        for text in only or [""]
        for name in ([text] if text in known else [other for other in known if text in other])
    }
    while bases := {base for name in chosen if (base := known[name].base)} - chosen:
        chosen |= bases
    return [name for name in known if name in chosen]


def main() -> None:
    """Run the rows and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_assets = os.environ.get("COMPRESS_ASSETS", HERE.parent.parent / "shared" / "assets")
    parser.add_argument("--assets", type=Path, default=Path(default_assets))
    parser.add_argument("--model", choices=sorted(SETUPS), default="reference")
    parser.add_argument("--only", action="append", default=[], help="a row, or those whose names hold this; repeatable")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    arguments = parser.parse_args()
    known = rows(arguments.model)
    chosen = wanted(known, arguments.only)
    if not chosen:
        parser.error("no such row; --list shows them")
    if arguments.list:
        print("\n".join(chosen))
        return
    print("| model | plan | bits | dense | perplexity | KL to dense | of the gap | of | layer error | seconds |")
    print("|:--|:--|--:|--:|--:|--:|--:|:--|--:|--:|")
    gaps: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="compress-repair-") as folder:
        for name in chosen:
            row, began = known[name], time.monotonic()
            report = measure(arguments.model, row.passes, arguments.assets, Path(folder))
            (line,) = report.evaluation
            assert line.dense is not None
            assert line.divergence is not None
            dense, after = line.dense.perplexity, line.compressed.perplexity
            assert dense is not None
            assert after is not None
            gaps[name] = after - dense
            share = "" if row.base is None else f"{1 - gaps[name] / gaps[row.base]:.0%}"
            bits = bits_per_weight(report, row.passes, SETUPS[arguments.model].dtype)
            print(
                f"| {arguments.model} | {name} | {bits:.3f} | {dense:.3f} "
                f"| {after:.3f} | {line.divergence.kl_mean:.4f} | {share} | {row.base or ''} "
                f"| {layer_error(report)} | {time.monotonic() - began:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
