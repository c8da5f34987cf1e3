"""The state of one linear layer while it is compressed; ``effective()`` is the only definition of its weight.

Weights are always (out_features, in_features), whatever the checkpoint stores (GPT-2's Conv1D keeps the transpose).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Pattern(NamedTuple):
    """N:M sparsity: at most `kept` (N) non-zeros in every `group` (M) consecutive input columns of a row."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4". Raises ValueError for anything that is not 0 < N < M."""
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if match is None:
            raise ValueError(f'"{text}" is not an N:M pattern; write the kept weights first, as in "2:4"')
        kept, group = int(match[1]), int(match[2])
        if not 0 < kept < group:
            raise ValueError(f'"{text}" keeps {kept} of every {group} weights; N must be at least 1 and less than M')
        return cls(kept, group)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


def pruned_count(sparsity: float, total: int) -> int:
    """floor(sparsity · total), exact for the decimal that was written (0.29 of 100 is 29, not 28)."""
    return int(Decimal(str(sparsity)) * total)


# Scores are sorted in slices of rows: a sort needs an int64 index and a copy per score, and small slices stay in cache.
SLICE = 1 << 18


def lowest(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest scores of each row, equal ones taken by index. `scores`: (rows, columns)."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    rows = max(1, SLICE // max(1, scores.shape[1]))
    for some, found in zip(torch.split(scores, rows), torch.split(chosen, rows), strict=True):
        order = torch.argsort(some, dim=1, stable=True)
        found.scatter_(1, order[:, :count], True)
    return chosen


def lowest_of_all(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of all scores, equal ones taken by index. Same shape as `scores`."""
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view_as(scores)


def lowest_in_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """True at the M−N lowest scores of every M consecutive columns, equal ones taken by index.

    `scores`: (out, in), M divides in. Each pair of places is compared once, for all groups at a time: for the small M
    of hardware patterns several times as fast as sorting every group (docs/lab-log.md).
    """
    groups = scores.reshape(-1, pattern.group)  # (out · in / M, M)
    if pattern.group > 16:
        return lowest(groups, pattern.group - pattern.kept).view(scores.shape)
    columns = groups.T.contiguous()  # (M, out · in / M)
    ranks = torch.zeros_like(columns, dtype=torch.uint8)
    for left in range(pattern.group):
        for right in range(left + 1, pattern.group):
            first = columns[left] <= columns[right]
            ranks[right] += first
            ranks[left] += ~first
    return (ranks < pattern.group - pattern.kept).T.reshape(scores.shape)


@dataclass
class LinearState:
    """One linear layer. Passes change `weight` and may only clear bits of `mask`.

    Attributes:
        name: full module name, e.g. ``model.layers.0.mlp.down_proj``.
        weight: (out_features, in_features) float32, the current real value.
        dense: (out_features, in_features) float32, the weight as the model came; never changed.
        dtype: the dtype of the checkpoint; `settle` rounds to it.
        mask: (out_features, in_features) bool, True = kept; None while nothing is pruned.
    """

    name: str
    weight: Tensor
    dense: Tensor
    dtype: torch.dtype
    mask: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    def effective(self) -> Tensor:
        """The weight that the layer computes with, (out_features, in_features) float32; +0.0 where pruned."""
        if self.mask is None:
            return self.weight
        return torch.where(self.mask, self.weight, torch.zeros((), dtype=self.weight.dtype, device=self.weight.device))

    def prune(self, pruned: Tensor) -> None:
        """Clear the bits of the mask where `pruned` (out_features, in_features) is True. Bits never come back."""
        self.mask = ~pruned if self.mask is None else self.mask & ~pruned
        self.weight = self.effective()

    def settle(self) -> None:
        """Round the weight to the checkpoint's dtype, so that what runs next is what will be written."""
        self.weight = self.effective().to(self.dtype).float()

    @property
    def sparsity(self) -> float:
        """Fraction of weights that the mask prunes (an accidental zero does not count)."""
        return 0.0 if self.mask is None else 1.0 - self.mask.sum().item() / self.mask.numel()

    def tensors(self) -> dict[str, Tensor]:
        """What the journal keeps, once settled: the weight in the checkpoint's dtype and the mask, by suffixed name."""
        kept = {f"{self.name}:weight": self.weight.to(self.dtype)}
        if self.mask is not None:
            kept[f"{self.name}:mask"] = pack_bits(self.mask)
        return kept

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`: take up weight and mask as the journal kept them."""
        self.weight = tensors[f"{self.name}:weight"].float()
        packed = tensors.get(f"{self.name}:mask")
        self.mask = None if packed is None else unpack_bits(packed, self.in_features)


def pack_bits(mask: Tensor) -> Tensor:
    """(rows, columns) bool → (rows, ceil(columns / 8)) uint8, lowest bit first."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    eights = padded.reshape(mask.shape[0], -1, 8)
    return (eights * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: (rows, ceil(columns / 8)) uint8 → (rows, columns) bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :columns].bool()
