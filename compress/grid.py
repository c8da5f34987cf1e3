"""Grids: weights as codes, with a scale and a zero-point per group of columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class ScaleSpec(NamedTuple):
    """What a plan decides of scales that are codes: their bits, how many share a peak, and the dtype of the peaks."""

    bits: int
    group: int
    peak_dtype: torch.dtype


class GridSpec(NamedTuple):
    """What a plan decides of a grid: codes of `bits`, a scale and a zero-point per `group_size` columns.

    `group_size` divides the width; −1 is one group per row. `symmetric`: the zero-point is 2^(bits−1), the middle code.
    `scale_dtype` is that of the stored scales; None is the checkpoint's. `kind`: codes are integers ("int"), or places
    in the table of NormalFloat values ("nf"), whose zero-point is the place of 0. `second`: scales are codes, too.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    scale_dtype: torch.dtype | None = None
    kind: Literal["int", "nf"] = "int"
    second: ScaleSpec | None = None

    @property
    def largest(self) -> int:
        """The largest code; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero-point of a symmetric grid; of NormalFloat the place of 0."""
        return (1 << (self.bits - 1)) - (self.kind == "nf")

    def width(self, in_features: int) -> int:
        """Columns that share a scale."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Scales per row."""
        return in_features // self.width(in_features)

    def code(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The code (0 … largest, float) nearest to each of `values`; scale and zero broadcast to them."""
        if self.kind == "nf":
            table = normal_float(self.bits).to(values.device)
            return torch.bucketize(values / scale, (table[1:] + table[:-1]) / 2).to(values.dtype)
        return (values / scale).round_().add_(zero).clamp_(0, self.largest)


@cache
def normal_float(bits: int) -> Tensor:
    """The 2^bits values of NormalFloat, ascending from −1 to 1, 0 among them (Dettmers et al. 2023, arXiv 2305.14314).

    Quantiles of the normal distribution at equal steps of probability from 1/2 to `EDGE`, on each side of 0 apart:
    2^(bits−1) − 1 negative ones and 2^(bits−1) positive ones, divided by the largest.
    """
    half = 1 << (bits - 1)
    normal = NormalDist()
    positive = [normal.inv_cdf(0.5 + (EDGE - 0.5) * step / half) for step in range(1, half + 1)]
    negative = [-normal.inv_cdf(0.5 + (EDGE - 0.5) * step / (half - 1)) for step in range(half - 1, 0, -1)]
    values = [*(v / positive[-1] for v in negative), 0.0, *(v / positive[-1] for v in positive)]
    return torch.tensor(values, device="cpu")


EDGE = 0.9677083  # QLoRA's: the mean of 1 − 1/32 and 1 − 1/30, where 4 bits would put their outermost quantiles


@dataclass(frozen=True)
class ScaleCodes:
    """The scales of a grid as codes of their own, ``scale = offset + peak · code / (2^bits − 1)``, row after row.

    QLoRA's double quantization (Dettmers et al. 2023, arXiv 2305.14314), with the smallest scale as the offset.

    Attributes:
        bits: of a code.
        group: scales that share a peak; the last ones may be fewer.
        codes: (out_features, groups) uint8.
        peaks: (ceil(scales / group),), not negative, in the dtype in which they are stored.
        offset: () float32, positive.
    """

    bits: int
    group: int
    codes: Tensor
    peaks: Tensor
    offset: Tensor

    def scale(self) -> Tensor:
        """The scales (out_features, groups), positive float32."""
        steps = self.peaks.float() / ((1 << self.bits) - 1)
        spread = steps.repeat_interleave(self.group)[: self.codes.numel()].view(self.codes.shape)
        return self.codes.float().mul_(spread).add_(self.offset)


@dataclass(frozen=True)
class Grid:
    """A weight as codes: ``w = scale · (code − zero)``, or the code's NormalFloat value, so 0 is a value (decision D4).

    Attributes:
        spec: what the plan decided.
        scale: (out_features, groups), positive, in the dtype in which it is stored.
        zero: (out_features, groups) uint8, a code.
        codes: (out_features, in_features) uint8.
        second: what the scales are the values of, where they are codes themselves.
    """

    spec: GridSpec
    scale: Tensor
    zero: Tensor
    codes: Tensor
    second: ScaleCodes | None = None

    def spread(self, per_group: Tensor) -> Tensor:
        """(out, groups) → (out, in): each group's value for each of its columns."""
        return per_group.repeat_interleave(self.codes.shape[1] // per_group.shape[1], dim=1)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), float32 holding values of `dtype`.

        The product is rounded once, to `dtype`: what a reader computes that multiplies in the model's dtype, because
        float32 holds the product of an 11-bit significand and a code exactly.
        """
        rows, groups = self.scale.shape
        if self.spec.kind == "nf":
            values = normal_float(self.spec.bits).to(self.codes.device)[self.codes.long()].view(rows, groups, -1)
            return values.mul_(self.scale.unsqueeze(-1).float()).flatten(1).to(dtype).float()
        steps = self.codes.view(rows, groups, -1).float() - self.zero.unsqueeze(-1).float()  # (out, groups, width)
        return steps.mul_(self.scale.unsqueeze(-1).float()).flatten(1).to(dtype).float()

    def zeroed(self, pruned: Tensor) -> Grid:
        """The same grid with the code of 0 where `pruned` (out, in) is True."""
        return replace(self, codes=torch.where(pruned, self.spread(self.zero), self.codes))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What the journal keeps of the grid of linear `name`."""
        known = [self.spec.bits, self.spec.group_size, self.spec.symmetric, self.spec.kind == "nf"]
        spec = torch.tensor(known, dtype=torch.int32)
        kept = {
            f"{name}:grid": spec,
            f"{name}:codes": self.codes,
            f"{name}:scale": self.scale,
            f"{name}:zero": self.zero,
        }
        if self.second is not None:
            kept[f"{name}:scale_grid"] = torch.tensor([self.second.bits, self.second.group], dtype=torch.int32)
            kept[f"{name}:scale_codes"] = self.second.codes
            kept[f"{name}:scale_peaks"] = self.second.peaks
            kept[f"{name}:scale_offset"] = self.second.offset
        return kept

    @classmethod
    def restore(cls, name: str, tensors: Mapping[str, Tensor]) -> Grid | None:
        """The inverse of `tensors`; None when there is no grid of that name."""
        if f"{name}:grid" not in tensors:
            return None
        codes, scale, zero = (tensors[f"{name}:{kind}"] for kind in ("codes", "scale", "zero"))
        bits, group_size, symmetric, normal = tensors[f"{name}:grid"].tolist()
        second = None
        if f"{name}:scale_grid" in tensors:
            parts = (tensors[f"{name}:scale_{part}"] for part in ("codes", "peaks", "offset"))
            second = ScaleCodes(*tensors[f"{name}:scale_grid"].tolist(), *parts)
        of_scales = ScaleSpec(second.bits, second.group, second.peaks.dtype) if second else None
        spec = GridSpec(bits, group_size, bool(symmetric), scale.dtype, "nf" if normal else "int", of_scales)
        return cls(spec, scale, zero, codes, second)
