"""The scale and zero-point of a group of weights: min/max, or the clipped range of least squared error.

A group w (columns,) is put on the codes 0 … L, ``L = 2^bits − 1``: ``ŵ = s · (clamp(round(w / s) + z, 0, L) − z)``.
The range always includes 0, so that 0 has a code (decision D4). For the range [a, b]: asymmetric ``s = (b − a) / L``,
``z = round(−a / s)``; symmetric ``s = 2 · max(−a, b) / L``, ``z = 2^(bits−1)`` (Frantar et al. 2022, arXiv 2210.17323,
and the formats that grew from it). ``clip = "mse"`` shrinks the range by the factors of `SHRINK` and keeps, for each
group, the one with the least ``Σ_j d_j (w_j − ŵ_j)²``; the first factor is 1, so it is never worse than min/max.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from compress.state import SLICE, Grid, GridSpec

if TYPE_CHECKING:
    from torch import Tensor

# Of a Gaussian group the best range is about .95 of the largest weight at 4 bits and .5 at 2 bits.
SHRINK = tuple(1.0 - 0.02 * step for step in range(36))


def fit(
    weight: Tensor,
    spec: GridSpec,
    dtype: torch.dtype,
    *,
    clip: Literal["minmax", "mse"] = "minmax",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each row of `weight`.

    Args:
        weight: (rows, columns) float32, a group per row; 0 where pruned.
        spec: the grid.
        dtype: of the checkpoint; scales are rounded to the spec's dtype or else this one.
        clip: how the range is found.
        importance: (columns,) or (rows, columns), the d_j; None weighs all alike.

    Returns:
        scale (rows,), positive float32 holding values of the scale's dtype, and zero (rows,) float32, whole numbers.
    """
    low, high = weight.amin(1).clamp_max(0.0), weight.amax(1).clamp_min(0.0)  # (rows,)
    if clip == "minmax":
        return _range(low, high, spec, dtype)
    scale, zero = torch.empty_like(low), torch.empty_like(low)
    rows = max(1, SLICE // weight.shape[1])  # what fits the cache
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        some = weight[part]
        d = None if importance is None else importance if importance.ndim == 1 else importance[part]
        least = torch.full_like(low[part], torch.inf)
        for factor in SHRINK:
            s, z = _range(factor * low[part], factor * high[part], spec, dtype)
            columns = s.unsqueeze(1), z.unsqueeze(1)
            error = spec.code(some, *columns).sub_(columns[1]).mul_(columns[0]).sub_(some).square_()
            loss = error.sum(1) if d is None else (error * d).sum(1)
            better = loss < least
            scale[part] = torch.where(better, s, scale[part])
            zero[part] = torch.where(better, z, zero[part])
            least = torch.where(better, loss, least)
    return scale, zero


def fit_groups(
    weight: Tensor,
    spec: GridSpec,
    dtype: torch.dtype,
    *,
    clip: Literal["minmax", "mse"] = "minmax",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fit` for each group of each row: (out, in) → scale and zero (out, groups). `importance`: (in,) or None."""
    out, groups = weight.shape[0], spec.groups(weight.shape[1])
    if importance is not None:
        importance = importance.view(1, groups, -1).expand(out, -1, -1).reshape(out * groups, -1)
    flat = weight.reshape(out * groups, -1)
    scale, zero = fit(flat, spec, dtype, clip=clip, importance=importance)
    return scale.view(out, groups), zero.view(out, groups)


def grid_of(codes: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec, dtype: torch.dtype) -> Grid:
    """The grid of float codes (out, in), scales and zero-points (out, groups), in the dtypes in which they are kept."""
    return Grid(spec, scale.to(spec.scale_dtype or dtype), zero.to(torch.uint8), codes.to(torch.uint8))


def _range(low: Tensor, high: Tensor, spec: GridSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of the range [low, high] ∋ 0 of each row."""
    width = 2.0 * torch.maximum(-low, high) if spec.symmetric else high - low
    stored = spec.scale_dtype or dtype
    scale = (width / spec.largest).to(stored).float()
    # A group without any weight takes the scale 1; one whose scale the dtype cannot hold takes the smallest it can.
    scale = torch.where(scale > 0, scale, torch.finfo(stored).smallest_normal * torch.finfo(stored).eps)
    scale = torch.where(width > 0, scale, 1.0)
    if spec.symmetric:
        return scale, torch.full_like(scale, spec.middle)
    return scale, (-low / scale).round_().clamp_(0, spec.largest)
