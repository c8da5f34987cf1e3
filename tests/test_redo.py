"""The way to what a disk has damaged is the way that the run took, bit for bit; see also `tests.test_resume`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.conftest import tiny_directory
from tests.models import FAMILIES
from tests.test_resume import PLAN, assert_finished, flip, interrupt, run, watched

if TYPE_CHECKING:
    from pathlib import Path

FAST = ("gpt2", "gemma3_text")  # a transposed weight, and masks that differ between blocks


@pytest.mark.parametrize("refresh", ["block", "subset"])
@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_the_way_to_a_damaged_block_is_the_same_in_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, refresh: str
) -> None:
    """With branches, codes and masks in the blocks before: only the damaged one is compressed again."""
    tiny_directory(tmp_path / "model", family, blocks=3, dtype=torch.bfloat16)
    steps = '[[pass]]\nuse = "sparsegpt"\npattern = "2:4"\n[[pass]]\nuse = "gptq"\ngroup_size = 16\n'
    head = PLAN.partition("[[pass]]")[0].replace('"subset"', f'"{refresh}"').replace("90", "9")
    (tmp_path / "plan.toml").write_text(head + steps + '[[pass]]\nuse = "eora"\nrank = 3\n')
    run(tmp_path)
    (tmp_path / "out").rename(tmp_path / "reference")
    work = interrupt(tmp_path, monkeypatch, 0, 2)
    flip(work / "block-0-00001.safetensors", 300)
    flip(work / "activations-0-00002-0.bin", 300)
    blocks = watched(monkeypatch)
    run(tmp_path)
    assert blocks == [(0, 1), (0, 2)]
    assert_finished(tmp_path)


def test_a_block_of_blocks_that_differ_is_pruned_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sweep knows what each block keeps also where it only makes up for what was damaged."""
    tiny_directory(tmp_path / "model", "llama", blocks=3)
    head = PLAN.partition("[[pass]]")[0].replace("90", "9")
    width = '[[pass]]\nuse = "width"\nchannels = 0.25\nmultiple = 8\nheterogeneous = true\nscore = "wanda"\n'
    (tmp_path / "plan.toml").write_text(head + width, encoding="utf-8")
    run(tmp_path)
    (tmp_path / "out").rename(tmp_path / "reference")
    flip(interrupt(tmp_path, monkeypatch, 1, 2) / "block-1-00000.safetensors", 300)
    blocks = watched(monkeypatch)
    run(tmp_path)
    assert blocks == [(1, 0), (1, 2)]
    assert_finished(tmp_path)
