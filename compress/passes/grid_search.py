"""The scale and zero-point of a group of weights: min/max, or the clipped range of least squared error.

A group w (columns,) is put on the codes 0 … L, ``L = 2^bits − 1``: ``ŵ = s · (clamp(round(w / s) + z, 0, L) − z)``.
The range always includes 0, so that 0 has a code (decision D4). For the range [a, b]: asymmetric ``s = (b − a) / L``,
``z = round(−a / s)``; symmetric ``s = 2 · max(−a, b) / L``, ``z = 2^(bits−1)`` (Frantar et al. 2022, arXiv 2210.17323,
and the formats that grew from it). ``clip = "mse"`` shrinks the range by the factors of `SHRINK` and keeps, for each
group, the one with the least ``Σ_j d_j (w_j − ŵ_j)²``; the first factor is 1, so it is never worse than min/max.

Once the codes are found, `rescaled` fits the scales to them: the step of PEQA for one layer alone (Kim et al. 2023,
arXiv 2305.14152). H is the second moment of the inputs, c_g holds the steps (codes less zero-point) of group g and 0
elsewhere. The scales of a row minimize

    (w − Σ_g s_g c_g) H (w − Σ_g s_g c_g)ᵀ,  so  A s = b  with  A_gh = c_g H c_hᵀ,  b_g = w H c_gᵀ;

for one group per row ``s = (w H cᵀ) / (c H cᵀ)``.

Grids of NormalFloat, which have no zero-point to choose, get theirs from `least_error`, and codes for the scales from
`second_level` (`lqlora`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from compress.grid import Grid, GridSpec, ScaleCodes, normal_float
from compress.state import SLICE

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
    shrink: tuple[float, ...] = SHRINK,
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each row of `weight`.

    Args:
        weight: (rows, columns) float32, a group per row; 0 where pruned.
        spec: the grid.
        dtype: of the checkpoint; scales are rounded to the spec's dtype or else this one.
        clip: how the range is found.
        importance: (columns,) or (rows, columns), the d_j; None weighs all alike.
        shrink: factors of the range to choose from, for least error.

    Returns:
        scale (rows,), positive float32 holding values of the scale's dtype, and zero (rows,) float32, whole numbers.
    """
    low, high = weight.amin(1).clamp_max(0.0), weight.amax(1).clamp_min(0.0)  # (rows,)
    if clip == "minmax":
        return _range(low, high, spec, dtype)
    factors = torch.tensor(shrink, dtype=weight.dtype, device=weight.device).unsqueeze(1)
    scale, zero = torch.empty_like(low), torch.empty_like(low)
    rows = max(1, SLICE // weight.shape[1])  # what fits the cache
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        some = weight[part]
        d = None if importance is None else importance if importance.ndim == 1 else importance[part]
        scales, zeros = _range(factors * low[part], factors * high[part], spec, dtype)  # (ranges, rows)
        losses, count = [], max(1, SLICE // some.numel())
        for s, z in zip(*(torch.split(one.unsqueeze(2), count) for one in (scales, zeros)), strict=True):
            error = spec.code(some, s, z).sub_(z).mul_(s).sub_(some).square_()  # (some ranges, rows, columns)
            losses.append((error if d is None else error.mul_(d)).sum(2))
        best = torch.cat(losses).argmin(0, keepdim=True)  # the first of equal ones: the widest range
        scale[part], zero[part] = scales.gather(0, best)[0], zeros.gather(0, best)[0]
    return scale, zero


def fit_groups(
    weight: Tensor,
    spec: GridSpec,
    dtype: torch.dtype,
    *,
    clip: Literal["minmax", "mse"] = "minmax",
    importance: Tensor | None = None,
    shrink: tuple[float, ...] = SHRINK,
) -> tuple[Tensor, Tensor]:
    """`fit` for each group of each row: (out, in) → scale and zero (out, groups). `importance`: (in,) or None."""
    out, groups = weight.shape[0], spec.groups(weight.shape[1])
    if importance is not None:
        importance = importance.view(1, groups, -1).expand(out, -1, -1).reshape(out * groups, -1)
    flat = weight.reshape(out * groups, -1)
    scale, zero = fit(flat, spec, dtype, clip=clip, importance=importance, shrink=shrink)
    return scale.view(out, groups), zero.view(out, groups)


def grid_of(codes: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec, dtype: torch.dtype) -> Grid:
    """The grid of float codes (out, in), scales and zero-points (out, groups), in the dtypes in which they are kept."""
    return Grid(spec, scale.to(spec.scale_dtype or dtype), zero.to(torch.uint8), codes.to(torch.uint8))


# Of the diagonal of A: above what float32 products leave of A's smallest eigenvalues, below what a scale can show.
RIDGE = 1e-6
SYSTEMS = 1 << 22  # entries of A in float64 that are solved at a time, 32 MiB; more with
ROWS = 32  # of W at least, for which H is read once
LOSS = 0.9  # of a scale, at most


def rescaling_bytes(groups: int) -> int:
    """What `rescaled` holds of systems of equations at a time, with the copies that solving them makes."""
    return 3 * 8 * max(SYSTEMS, ROWS * groups**2)


def rescaled(weight: Tensor, grid: Grid, gram: Tensor, dtype: torch.dtype) -> Grid:
    """The grid with the scales that fit its codes best; codes and zero-points stay.

    With ``δ = w − ŵ`` they change by the d of ``(A + ridge · diag A) d = (c_g H δᵀ)_g``. A group without any step, or
    with dead inputs only, keeps its scale, and groups that H cannot tell apart stay near theirs; the ridge pulls
    towards d = 0, so the error cannot grow. Where a scale would lose more than `LOSS` of itself, or turn negative, its
    row goes only part of the way: the error falls all along it. A row keeps its scales where the error of the weight
    as it is stored, rounded, would not be smaller.

    Args:
        weight: (out, in) float32, what the grid stands for: the dense weight.
        grid: of integer codes.
        gram: (in, in) float32, H.
        dtype: in which the weight is stored.

    Returns:
        the grid; rows whose scales changed have a smaller ``δ H δᵀ``.
    """
    rows, groups = grid.scale.shape
    width = weight.shape[1] // groups
    difference = weight - grid.dequantize(dtype)
    product = difference @ gram
    before = (product * difference).sum(1, dtype=torch.float64)  # (out,)
    steps = replace(grid, scale=torch.ones_like(grid.scale, dtype=torch.float32)).dequantize(torch.float32)
    scale = torch.empty_like(grid.scale)
    count = max(ROWS, SYSTEMS // groups**2)
    for start in range(0, rows, count):
        some = slice(start, start + count)
        c = steps[some]

        def by_group(product: Tensor, c: Tensor = c) -> Tensor:  # sums of product · c over each group
            return (product * c).view(-1, groups, width).sum(-1, dtype=torch.float64)

        slope = by_group(product[some])
        A = torch.empty(len(c), groups, groups, dtype=torch.float64, device=c.device)
        for g in range(groups):
            span = slice(g * width, (g + 1) * width)
            A[:, g] = by_group(c[:, span] @ gram[span])
        diagonal = A.diagonal(dim1=1, dim2=2)  # a view
        diagonal.copy_(torch.where(diagonal > 0, diagonal * (1 + RIDGE), 1.0))
        change, _ = torch.linalg.solve_ex(A, slope)
        now = grid.scale[some].double()
        part_way = torch.where(change < 0, LOSS * now / -change, 1.0).amin(1, keepdim=True).clamp_max(1.0)
        scale[some] = (now + part_way * change).to(scale.dtype)
    usable = (torch.isfinite(scale) & (scale > 0)).all(1, keepdim=True)
    fitted = replace(grid, scale=torch.where(usable, scale, grid.scale))
    difference = weight - fitted.dequantize(dtype)
    after = ((difference @ gram) * difference).sum(1, dtype=torch.float64)
    return replace(grid, scale=torch.where((after < before).unsqueeze(1), fitted.scale, grid.scale))


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


# Ranges that `least_error` begins with, as parts of the largest magnitude. With a least-squares step after each they do
# what those of `SHRINK` do without (docs/lab-log.md).
FEW = (1.0, 0.8, 0.6)


def least_error(groups: Tensor, largest: Tensor, spec: GridSpec, importance: Tensor | None) -> Tensor:
    """Scales (out, groups) that leave little ``Σ F (w − ŵ)²`` in each group, never more than the largest magnitude.

    For given codes of values v the best scale is ``Σ F w v / Σ F v²``; the codes are found for a few ranges.

    Args:
        groups: (out, groups, columns) the weights.
        largest: (out, groups) their largest magnitudes.
        spec: the grid.
        importance: like `groups`, F; None weighs all alike.
    """
    table, none = normal_float(spec.bits).to(groups.device), groups.new_zeros(())
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    F = torch.ones_like(none) if importance is None else importance
    for factor in FEW:
        scale = factor * largest
        for step in range(2):
            divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
            values = table[spec.code(groups, divisor, none).long()]
            error = (values * divisor).sub_(groups).square_().mul_(F).sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
            if step == 0:
                weighted = F * values
                fitted = (weighted * groups).sum(-1) / (weighted * values).sum(-1)
                scale = torch.where((fitted > 0) & torch.isfinite(fitted), fitted, scale)
    return best


def second_level(scales: Tensor, bits: int, group: int, dtype: torch.dtype) -> ScaleCodes:
    """Scales (out, groups) as codes above the smallest of them, with a peak in `dtype` per `group` of scales.

    A group without any weight has no scale of its own and takes the smallest, so none comes back as 0.
    """
    flat = scales.flatten()
    live = flat[flat > 0]
    offset = live.min() if len(live) else torch.ones_like(flat[0])
    above = (flat - offset).clamp_min_(0.0)
    above = torch.nn.functional.pad(above, (0, -len(above) % group)).view(-1, group)  # (peaks, group)
    peaks = above.amax(1).clamp_max_(torch.finfo(dtype).max).to(dtype)
    steps = peaks.float() / ((1 << bits) - 1)
    codes = (above / torch.where(steps > 0, steps, 1.0).unsqueeze(1)).round_().clamp_(0, (1 << bits) - 1)
    return ScaleCodes(bits, group, codes.flatten()[: len(flat)].view_as(scales).to(torch.uint8), peaks, offset)
