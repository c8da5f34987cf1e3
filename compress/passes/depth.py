"""Structured pruning of the depth: drop the decoder blocks that change least.

    angular     the n neighbours over which the residual stream turns least: the ℓ of least mean
                ``arccos(x_ℓ · x_{ℓ+n} / ‖x_ℓ‖ ‖x_{ℓ+n}‖) / π``            Gromov et al. 2024, arXiv 2403.17887
    influence   the n blocks of least ``1 − cos(x_ℓ, x_{ℓ+1})``, on average   Men et al. 2024 (ShortGPT), 2403.03853
    perplexity  one after another, the block whose absence raises the loss least
                                                                  Kim et al. 2024 (Shortened LLaMA), arXiv 2402.02834

x_ℓ is the input of block ℓ; means are over the real tokens of the calibration set. The whole model is in memory.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.passes.base import ModelPass, Note, SettingError
from compress.passes.structured import Structured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.architecture import Architecture
    from compress.barrier import WholeModel
    from compress.structure import Sizes


class DepthPruning(Structured, ModelPass):
    """Drop decoder blocks."""

    blocks: int = Field(ge=1, description="decoder blocks to drop")
    score: Literal["angular", "influence", "perplexity"] = Field(default="angular", description="which blocks go")
    batch_size: int = Field(default=8, ge=1, description="samples per forward")

    def learns(self) -> bool:
        """It does not train, but looks at the calibration set."""
        return True

    def left(self, sizes: Sizes, architecture: Architecture, config: Any) -> Sizes:
        """Fewer blocks."""
        if self.blocks >= sizes.blocks:
            problem = f"blocks = {self.blocks} of {sizes.blocks} leaves none"
            fix = f"blocks = {sizes.blocks - 1} or less" if sizes.blocks > 1 else "leave depth out"
            raise SettingError(problem, fix, ("blocks",))
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            problem = (
                "attention is scaled by the number of its block, which would change (scale_attn_by_inverse_layer_idx)"
            )
            raise SettingError(problem, "prune the width instead", ("blocks",))
        return replace(sizes, blocks=sizes.blocks - self.blocks)

    def apply_model(self, model: WholeModel) -> dict[str, Note]:
        """Choose the blocks; the weights stay as they are."""
        if self.score == "perplexity":
            gone = self._by_loss(model)
        else:
            gone = chosen_by_angle(self._cosines(model), self.blocks, neighbours=self.score == "angular")
        for block in gone:
            model.found[block] = {"block:kept": torch.zeros(1, dtype=torch.int64)}
        notes: dict[str, Note] = {}
        for block in gone:
            prefix = model.lock.skeleton.prefix(block)
            notes |= {name: {"detail": f"block {block} dropped"} for name in model.states if name.startswith(prefix)}
        return notes

    def _batches(self, model: WholeModel) -> Iterator[tuple[Tensor, Tensor]]:
        ids, mask = model.tokens.ids, model.tokens.mask.to(model.device)
        yield from zip(torch.split(ids, self.batch_size), torch.split(mask, self.batch_size), strict=True)

    def _cosines(self, model: WholeModel) -> dict[tuple[int, int], tuple[float, float]]:
        """(ℓ, m) → mean angle / π and mean cosine between the stream in front of block ℓ and of block m.

        Only of the pairs that the score compares, one for each ℓ.
        """
        apart = self.blocks if self.score == "angular" else 1
        sums = {(a, a + apart): [0.0, 0.0] for a in range(model.lock.blocks - apart + 1)}
        total = 0
        for ids, mask in self._batches(model):
            stream = [state[mask] for state in model.stream(ids)]
            total += int(mask.sum())
            for (a, b), found in sums.items():
                cosine = nn.functional.cosine_similarity(stream[a].double(), stream[b].double(), dim=-1).clamp(-1, 1)
                found[0] += float(cosine.arccos().sum()) / math.pi
                found[1] += float(cosine.sum())
        return {pair: (angle / total, cosine / total) for pair, (angle, cosine) in sums.items()}

    def _by_loss(self, model: WholeModel) -> list[int]:
        model.tokens.check_targets()
        gone: list[int] = []
        for _ in range(self.blocks):
            left = [block for block in range(model.lock.blocks) if block not in gone]
            losses = {block: self._loss(model, [*gone, block]) for block in left}
            gone.append(min(left, key=lambda block: losses[block]))
        return sorted(gone)

    def _loss(self, model: WholeModel, without: list[int]) -> float:
        """Mean cross-entropy of the calibration set without some blocks."""
        total, count = 0.0, 0
        with ExitStack() as stack:
            for block in without:
                stack.enter_context(skipped(model.blocks[block]))
            for ids, mask in self._batches(model):
                logits, _ = model.logits(ids)
                real = mask[:, 1:]
                targets = ids[:, 1:].to(logits.device)[real]
                total += float(nn.functional.cross_entropy(logits[:, :-1][real].float(), targets, reduction="sum"))
                count += int(real.sum())
        return total / count


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Have a block pass on what it gets, for a while."""
    block.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        del block.forward


def chosen_by_angle(pairs: dict[tuple[int, int], tuple[float, float]], count: int, *, neighbours: bool) -> list[int]:
    """Which blocks go.

    Args:
        pairs: (ℓ, m) → mean angle / π and mean cosine between the stream in front of blocks ℓ and m.
        count: how many go.
        neighbours: `count` in a row, by the angle over all of them; else one by one, by their own cosine.
    """
    blocks = max(m for _, m in pairs)
    if neighbours:
        first = min(range(blocks - count + 1), key=lambda block: pairs[block, block + count][0])
        return list(range(first, first + count))
    order = sorted(range(blocks), key=lambda block: -pairs[block, block + 1][1])
    return sorted(order[:count])
