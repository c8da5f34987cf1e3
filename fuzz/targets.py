"""The table of targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fuzz.directories import Adapter, CompressedTensors, Config, Gptq, Header, Index, Packed
from fuzz.texts import Baseline, PlanFile, ReportFile, Rows, Tokenizer

if TYPE_CHECKING:
    from fuzz.target import Target

TARGETS: dict[str, type[Target]] = {
    one.name: one
    for one in (
        PlanFile,
        Header,
        Index,
        Config,
        Tokenizer,
        Packed,
        Gptq,
        CompressedTensors,
        Adapter,
        Rows,
        Baseline,
        ReportFile,
    )
}
