"""Activations that go through a file."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import torch

from compress.errors import RunError
from compress.flows import Activations

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_come_back_bit_for_bit(tmp_path: Path, keep: bool, dtype: torch.dtype) -> None:
    shapes = [(3, 5, 8), (3, 5, 8), (1, 5, 8)]
    written = [torch.randn(shape).to(dtype) for shape in shapes]
    flow = Activations(tmp_path / "a", shapes, dtype, keep=keep)
    for batch, hidden in enumerate(written):
        flow.put(batch, hidden)
    flow.close()
    reread = Activations(tmp_path / "a", shapes, dtype, keep=False)
    for source in (flow, reread):
        for batch in (2, 0, 1, 1):
            assert torch.equal(source.get(batch, CPU), written[batch])
    assert torch.equal(flow.get(1, CPU, last=True), written[1])
    assert flow._held[1] is None
    assert flow.entry["sha256"] == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_truncated_activations_are_refused(tmp_path: Path) -> None:
    shapes = [(2, 3, 4)]
    (tmp_path / "a").write_bytes(b"\0" * 95)
    with pytest.raises(RunError, match="batch 0 is truncated"):
        Activations(tmp_path / "a", shapes, torch.float32, keep=False).get(0, CPU)
