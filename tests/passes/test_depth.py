"""Dropping blocks: which ones, against plain transformers models with those blocks taken out by hand."""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import compress
from compress.architecture import architecture_for
from compress.calibration.plan_source import make_tokens
from compress.compiling import compile_plan
from compress.errors import PlanError
from compress.passes import DepthPruning, Wanda
from compress.passes.depth import chosen_by_angle
from tests.conftest import tiny_directory
from tests.models import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

BLOCKS = 4


def plan_of(folder: Path, *passes: Any) -> compress.Plan:
    return compress.Plan(
        model=compress.Model(path=str(folder / "model")),
        calibration=compress.Calibration(source=str(folder / "text.txt"), samples=6, length=16),
        run=compress.Run(output=str(folder / "out")),
        passes=passes,
    )


def without(model: nn.Module, family: str, gone: list[int]) -> nn.Module:
    """A copy that lacks some blocks; what a configuration says of each block goes, too."""
    model = copy.deepcopy(model)
    blocks = model.get_submodule(architecture_for(family).blocks)
    assert isinstance(blocks, nn.ModuleList)
    left = [number for number in range(len(blocks)) if number not in gone]
    parent, _, leaf = architecture_for(family).blocks.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList([blocks[number] for number in left]))
    config: Any = model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in left]
    config.num_hidden_layers = len(left)
    return model


def loss_of(model: nn.Module, ids: Tensor, mask: Tensor) -> float:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.double()
    real = mask[:, 1:]
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return float(-log_p[real].mean())


def stream_of(model: nn.Module, family: str, ids: Tensor) -> list[Tensor]:
    """What every block gets, and what the last one gives."""
    states: list[Tensor] = []
    blocks = model.get_submodule(architecture_for(family).blocks)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks.children()]
    last = list(blocks.children())[-1]
    hooks.append(
        last.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [state.double() for state in states]


def by_hand(model: nn.Module, family: str, score: str, ids: Tensor, mask: Tensor, count: int) -> list[int]:
    """The papers' choices by brute force."""
    if score == "perplexity":
        gone: list[int] = []
        for _ in range(count):
            left = [n for n in range(BLOCKS) if n not in gone]
            gone.append(min(left, key=lambda n: loss_of(without(model, family, [*gone, n]), ids, mask)))
        return sorted(gone)
    x = stream_of(model, family, ids)

    def cosine(a: int, b: int) -> Tensor:
        one, other = x[a][mask], x[b][mask]
        return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))

    if score == "angular":
        angles = [float(cosine(n, n + count).arccos().mean()) / math.pi for n in range(BLOCKS - count + 1)]
        first = angles.index(min(angles))
        return list(range(first, first + count))
    influences = [1 - float(cosine(n, n + 1).mean()) for n in range(BLOCKS)]
    return sorted(sorted(range(BLOCKS), key=lambda n: influences[n])[:count])


@pytest.mark.parametrize("score", ["angular", "influence", "perplexity"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_the_paper_are_dropped(score: str, family: str, tmp_path: Path) -> None:
    """And stock transformers loads a model that is the old one without them."""
    tiny_directory(tmp_path / "model", family, tied=True, blocks=BLOCKS)
    plan = plan_of(tmp_path, DepthPruning(blocks=2, score=score, batch_size=4))
    lock = compile_plan(plan)
    tokens = make_tokens(lock, torch.device("cpu"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    gone = by_hand(dense, family, score, tokens.ids, tokens.mask, 2)
    report = compress.run(plan)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert model.config.num_hidden_layers == BLOCKS - 2
    with torch.no_grad():
        wanted, found = (m(tokens.ids[:2], use_cache=False).logits for m in (without(dense, family, gone), model))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    others = [set(pair) for pair in itertools.combinations(range(BLOCKS), 2) if sorted(pair) != gone]
    with torch.no_grad():
        other = without(dense, family, sorted(others[0]))(tokens.ids[:2], use_cache=False).logits
    assert not torch.allclose(found, other, atol=1e-3)
    assert sum(p.numel() for p in model.parameters()) == report.output.parameters
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == lock.output_bytes


@pytest.mark.parametrize(("score", "apart"), [("angular", 2), ("influence", 1)])
def test_only_what_the_score_compares_is_compared(
    score: str, apart: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One comparison for each place, not for each pair of places."""
    tiny_directory(tmp_path / "model", "llama", blocks=BLOCKS)
    seen = []
    cosine = nn.functional.cosine_similarity

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args)
        return cosine(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "cosine_similarity", counted)
    plan = plan_of(tmp_path, DepthPruning(blocks=2, score=score, batch_size=64))
    compress.run(plan)
    assert len(seen) == BLOCKS + 1 - apart


def test_neighbours_and_single_blocks() -> None:
    """The pair that turns least together need not be the two blocks that turn least alone."""
    pairs = {(a, b): (0.5, 0.5) for a in range(4) for b in range(a + 1, 5)}
    pairs[1, 3] = (0.1, 0.5)
    pairs[0, 1] = (0.5, 0.9)
    pairs[3, 4] = (0.5, 0.8)
    assert chosen_by_angle(pairs, 2, neighbours=True) == [1, 2]
    assert chosen_by_angle(pairs, 2, neighbours=False) == [0, 3]


def test_what_is_refused(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "model", "gpt2", tied=True, blocks=2, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(PlanError, match="scaled by the number of its block"):
        compile_plan(plan_of(tmp_path, DepthPruning(blocks=1)))
    tiny_directory(tmp_path / "model", "llama", tied=True, blocks=2)
    with pytest.raises(PlanError, match="blocks = 2 of 2 leaves none") as caught:
        compile_plan(plan_of(tmp_path, DepthPruning(blocks=2)))
    assert caught.value.fix == "blocks = 1 or less"
    tiny_directory(tmp_path / "model", "llama", tied=True, blocks=1)
    with pytest.raises(PlanError, match="blocks = 1 of 1 leaves none") as caught:
        compile_plan(plan_of(tmp_path, DepthPruning(blocks=1)))
    assert caught.value.fix == "leave depth out"  # 0 is no number of blocks to drop
    tiny_directory(tmp_path / "model", "llama", tied=True, blocks=2)
    with pytest.raises(PlanError, match="depth prunes the whole model by one setting") as caught:
        compile_plan(plan_of(tmp_path, DepthPruning(blocks=1, match=("*.0.*",))))
    assert caught.value.fix == 'leave "match" out'
    with pytest.raises(PlanError, match="would break the mask"):
        compile_plan(plan_of(tmp_path, Wanda(sparsity=0.5), DepthPruning(blocks=1)))


def test_a_layer_that_is_gone(tmp_path: Path) -> None:
    """Later passes know the smaller model only."""
    tiny_directory(tmp_path / "model", "llama", tied=True, blocks=3)
    plan = plan_of(tmp_path, DepthPruning(blocks=1), Wanda(sparsity=0.5, match=("model.layers.2.*",)))
    with pytest.raises(PlanError, match="matches no linear"):
        compile_plan(plan)
