"""A gate as a test: what ``make demo`` wrote must be as good as the baselines in this folder say it was.

    pytest examples/ci

Copy it, and point OUTPUTS and BASELINES to your own. With ``--junitxml`` the figures are among the properties.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import compress

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
OUTPUTS = Path(os.environ.get("OUTPUTS", HERE.parents[1] / "out" / "demo"))
BASELINES = sorted((HERE / "baselines" / "demo").glob("*.json"))
# The demo calibrates on text that the model samples. Another processor rounds otherwise and samples other text: up to 6
# of 300 answers flip, so less than four points cannot be told. Perplexity tells 2 %.
SETTINGS = compress.Gate(margin=0.04, perplexity_margin=0.02)


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda path: path.stem)
def test_is_as_good_as_its_baseline(baseline: Path, record_property: Callable[[str, object], None]) -> None:
    result = compress.gate(OUTPUTS / baseline.stem, baseline, SETTINGS)
    for one in result.comparisons:
        record_property(f"{one.task}, {one.metric}", one.value)
    assert result.passed, [f"{one.task}, {one.metric}: {one.verdict}, {one.why}" for one in result.comparisons]
