"""The state of one linear layer while it is compressed; ``effective()`` is the only definition of its weight.

Weights are always (out_features, in_features), whatever the checkpoint stores (GPT-2's Conv1D keeps the transpose).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from compress.errors import RunError
from compress.grid import Grid

if TYPE_CHECKING:
    from collections.abc import Mapping

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

    `scores`: (out, in), M divides in.
    """
    groups = scores.reshape(-1, pattern.group)  # (out · in / M, M)
    chosen = torch.empty_like(groups, dtype=torch.bool)
    rows = max(1, SLICE // pattern.group)
    for some, found in zip(torch.split(groups, rows), torch.split(chosen, rows), strict=True):
        found.copy_(lowest_places(some.T, pattern).T)
    return chosen.view(scores.shape)


def lowest_places(scores: Tensor, pattern: Pattern) -> Tensor:
    """True at the M−N lowest scores of every column, equal ones taken by index. `scores`: (M, groups).

    Each pair of places is compared, for all groups at a time: for the small M of hardware patterns many times as fast
    as sorting every group (docs/lab-log.md).
    """
    if pattern.group > 16:
        return lowest(scores.T, pattern.group - pattern.kept).T
    signs, limits = _pairs(pattern, scores.device)
    not_above = scores.unsqueeze(1) <= scores  # (M, M, groups): of place i and place k
    return signs @ not_above.view(len(signs[0]), -1).float() < limits


@cache
def _pairs(pattern: Pattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """How comparisons of places i and k, of which i < k count, make the lowest scores of a group.

    As many scores are before that of place j as there are i < j that are not above it, and k > j that it is above. With
    +1 and −1 for `signs` (M, M · M), less than M − N where the signed sum is below `limits` (M, 1).
    """
    place = torch.arange(pattern.group, device=device)
    i, k, j = place.view(-1, 1), place, place.view(-1, 1, 1)
    signs = ((i < k) & (k == j)).float() - ((i < k) & (i == j)).float()
    limits = (pattern.group - pattern.kept) - (i < k).sum(1, keepdim=True).float()
    return signs.flatten(1), limits


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` is True, +0.0 elsewhere, whatever is there.

    As torch.where, which on a CPU is ten times as slow where bits of the mask cannot be guessed.
    """
    return (values.view(BITS[values.dtype.itemsize]) * mask).view(values.dtype)


@dataclass(frozen=True)
class LowRank:
    """A branch beside the weight, ``y = W x + up (down x)``: up (out, r) and down (r, in), float32. Never merged.

    Where ranks are still to be allocated, `spectrum` (r,) is what each is worth, and `errors` (r + 1,) float64 the
    relative error of the linear with the first 0, 1, … r of them.
    """

    up: Tensor
    down: Tensor
    spectrum: Tensor | None = None
    errors: Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of up, rows of down."""
        return self.down.shape[0]

    def product(self) -> Tensor:
        """The matrix up · down, (out, in)."""
        return self.up @ self.down

    def rounded(self, dtype: torch.dtype) -> LowRank:
        """Both factors as `dtype` holds them, and as they are read back: on GPUs a product's bits depend on strides."""
        up, down = (factor.to(dtype).float().contiguous() for factor in (self.up, self.down))
        return replace(self, up=up, down=down)


def all_finite(values: Tensor) -> bool:
    """Whether there is neither NaN nor infinity. Their sum is finite then, unless it overflows, and is soon made."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def in_dtype(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A value in the dtype of the checkpoint. Raises RunError where that does not hold it."""
    found = value.to(dtype)
    if dtype == torch.float16 and not all_finite(found):
        raise RunError(
            f"a value of {float(value.abs().max()):,.0f} is more than float16 holds",
            where=name,
            fix="convert the checkpoint to bfloat16 or float32 before",
        )
    return found


@dataclass
class LinearState:
    """One linear layer. Passes change `weight`, may only clear bits of `mask`, and may put the weight on a grid once.

    Attributes:
        name: full module name, e.g. ``model.layers.0.mlp.down_proj``.
        weight: (out_features, in_features) float32, the current real value.
        dense: (out_features, in_features) float32, the weight as the model came; what errors are measured against.
        dtype: the dtype of the checkpoint; `settle` rounds to it.
        mask: (out_features, in_features) bool, True = kept; None while nothing is pruned.
        grid: codes and scales; None while the weight is free. With a grid, `weight` is the grid's value.
        rows: (out_features,) float32, what a rewrite that preserves the function has multiplied the rows with.
        columns: (in_features,) float32, likewise the columns. `dense` is in these scaled coordinates, too.
        low_rank: a branch beside the weight; None without one.
        fisher: (out_features, in_features) float32, the diagonal Fisher information of `dense`, where a pass wants it.
    """

    name: str
    weight: Tensor
    dense: Tensor
    dtype: torch.dtype
    mask: Tensor | None = None
    grid: Grid | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    low_rank: LowRank | None = None
    fisher: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    def effective(self) -> Tensor:
        """The weight that the layer computes with, (out_features, in_features) float32: `base`, and the branch."""
        return self.base() if self.low_rank is None else self.base() + self.low_rank.product()

    def base(self) -> Tensor:
        """The weight beside the branch, (out_features, in_features) float32; +0.0 where pruned."""
        return self.weight if self.mask is None else masked(self.weight, self.mask)

    def prune(self, pruned: Tensor) -> None:
        """Clear the bits of the mask where `pruned` (out_features, in_features) is True. Bits never come back."""
        self.mask = ~pruned if self.mask is None else self.mask & ~pruned
        if self.grid is not None:
            self.grid = self.grid.zeroed(~self.mask)
        self.weight = self.base()

    def quantize(self, grid: Grid) -> None:
        """Put the weight on a grid; pruned entries get the code of 0."""
        self.grid = grid if self.mask is None else grid.zeroed(~self.mask)
        self.weight = self.grid.dequantize(self.dtype)

    def scale(self, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Multiply rows (out_features,) or columns (in_features,), of `dense` too: the function is meant to stay."""
        if rows is not None:
            self.rows = rows if self.rows is None else self.rows * rows
            self.weight, self.dense = self.weight * rows.unsqueeze(1), self.dense * rows.unsqueeze(1)
            self.fisher = None if self.fisher is None else self.fisher / rows.square().unsqueeze(1)
        if columns is not None:
            self.columns = columns if self.columns is None else self.columns * columns
            self.weight, self.dense = self.weight * columns, self.dense * columns
            self.fisher = None if self.fisher is None else self.fisher / columns.square()

    def settle(self) -> None:
        """Round weight and branch to the checkpoint's dtype, so that what runs next is what will be written."""
        self.weight = in_dtype(self.base(), self.dtype, self.name).float()
        if self.low_rank is not None:
            self.low_rank = self.low_rank.rounded(self.dtype)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that the mask prunes (an accidental zero does not count)."""
        return 0.0 if self.mask is None else 1.0 - self.mask.sum().item() / self.mask.numel()

    def tensors(self) -> dict[str, Tensor]:
        """What the journal keeps, once settled: the mask, and the grid or else the weight in the checkpoint's dtype."""
        if self.grid is not None:
            kept = self.grid.tensors(self.name)
        else:
            kept = {f"{self.name}:weight": in_dtype(self.weight, self.dtype, self.name)}
        if self.mask is not None:
            kept[f"{self.name}:mask"] = pack_bits(self.mask)
        if self.low_rank is not None:
            kept[f"{self.name}:up"] = in_dtype(self.low_rank.up, self.dtype, self.name)
            kept[f"{self.name}:down"] = in_dtype(self.low_rank.down, self.dtype, self.name)
            if self.low_rank.spectrum is not None and self.low_rank.errors is not None:
                kept[f"{self.name}:spectrum"] = self.low_rank.spectrum
                kept[f"{self.name}:errors"] = self.low_rank.errors
        if self.rows is not None:
            kept[f"{self.name}:rows"] = self.rows
        if self.columns is not None:
            kept[f"{self.name}:columns"] = self.columns
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`: take up what the journal kept; `dense` must be as the model came."""
        self.scale(rows=tensors.get(f"{self.name}:rows"), columns=tensors.get(f"{self.name}:columns"))
        self.weight = kept_weight(self.name, tensors, self.dtype).float()
        self.grid = Grid.restore(self.name, tensors)
        self.low_rank = kept_low_rank(self.name, tensors)
        packed = tensors.get(f"{self.name}:mask")
        self.mask = None if packed is None else unpack_bits(packed, self.in_features)


def kept_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a block's tensors, as the journal keeps them, is of linear `name`."""
    return {key: tensor for key, tensor in tensors.items() if key.rpartition(":")[0] == name}


def kept_weight(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of linear `name`, in `dtype`, from what the journal keeps of it."""
    grid = Grid.restore(name, tensors)
    return tensors[f"{name}:weight"] if grid is None else grid.dequantize(dtype).to(dtype)


def kept_low_rank(name: str, tensors: Mapping[str, Tensor]) -> LowRank | None:
    """The branch of linear `name` from what the journal keeps of it."""
    if f"{name}:up" not in tensors:
        return None
    spectrum, errors = (tensors.get(f"{name}:{kind}") for kind in ("spectrum", "errors"))
    return LowRank(tensors[f"{name}:up"].float(), tensors[f"{name}:down"].float(), spectrum, errors)


def cut_ranks(tensors: dict[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """What the journal keeps of a block, with the branches of linears cut to these ranks; 0 removes a branch."""
    cut = {key: tensor for key, tensor in tensors.items() if not key.endswith((":spectrum", ":errors"))}
    for name, rank in ranks.items():
        if f"{name}:up" in cut:
            up, down = cut.pop(f"{name}:up"), cut.pop(f"{name}:down")
            if rank:
                cut[f"{name}:up"], cut[f"{name}:down"] = up[:, :rank].contiguous(), down[:rank].contiguous()
    return cut


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
