"""AWQ: scale input channels so that the quantizer that follows hurts the output least (Lin et al. 2023, 2306.00978).

For linears W_k (out, in) that read the same input x, and what precedes them, ``W_k x = (W_k diag(s)) (x / s)``: the
columns are multiplied by s (in,), and the norm or the linear before them by 1 / s, which leaves the function as it was
and pruned weights at 0. Channels that carry large inputs get a larger s, and so a smaller rounding error:
``s_j = rms(x_j)^α``, divided by ``√(max s · min s)``, with α from 0 to below 1 in `points` steps. The one is kept that
minimizes ``Σ_k ‖(W_k − Q(W_k diag(s)) diag(1/s)) X‖²`` with Q the rounding of the quantizer that follows. α = 0 is no
scaling, so the error is never larger than without.

The paper averages |x_j| and compares outputs of the block; here the root of the mean square and the output of the
linears, both of which the Gram matrix already holds: no forward is run for the search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from compress.passes.base import (
    BlockPass,
    BlockState,
    Invariant,
    LinearState,
    Note,
    SettingError,
    Statistics,
)
from compress.passes.grid_search import SHRINK, fit_groups, grid_of
from compress.passes.quantizing import GridSettings

if TYPE_CHECKING:
    from torch import Tensor

    from compress.architecture import Architecture, Scaling


class AWQ(BlockPass):
    """Scale channels for the quantizer that follows; the function and the masks stay."""

    points: int = Field(default=20, ge=1, le=200, description="exponents to try, from 0 to below 1")

    rule: ClassVar[int] = 1
    preserves: ClassVar[frozenset[Invariant]] = frozenset(Invariant) - {Invariant.GRID, Invariant.LOW_RANK}
    statistics: ClassVar[Statistics] = Statistics.GRAM

    def takes(self, architecture: Architecture, config: Any, targets: list[str], quantized: set[str]) -> list[str]:
        """Whole sets of linears that share an input, what takes their scale, and nothing that nothing can take."""
        usable = [one for one in _usable(architecture, config) if set(one.inputs) <= set(targets)]
        usable = [one for one in usable if set(one.inputs) & quantized]
        scaled = {name for one in usable for name in one.inputs}
        if not scaled and not quantized:
            problem = "awq has no quantizer after it whose rounding it could foresee"
            raise SettingError(problem, "add one, such as gptq or rtn, or leave awq out")
        left = [name for name in targets if name not in scaled and name in quantized]
        if left and ("match" in self.model_fields_set or not scaled):
            fits = sorted({name for one in _usable(architecture, config) for name in one.inputs})
            problem = (
                f"nothing that precedes {left[0]} can take its scale, or linears that share its input are left out"
            )
            raise SettingError(problem, f"match whole sets of {', '.join(fits)}", ("match",))
        return sorted(scaled | {one.by for one in usable if not one.norm})

    def apply(self, block: BlockState) -> dict[str, Note]:
        """Search and apply the scales of one block."""
        notes: dict[str, Note] = {}
        for one in _usable(block.architecture, block.config):
            if not set(one.inputs) <= set(block.linears) or not any(block.followers[name] for name in one.inputs):
                continue
            rows, columns = _channels(one, block)
            alpha, scale = self._search(one, block, rows, columns)
            for name in one.inputs:
                block.linears[name].scale(columns=scale)
                block.linears[name].settle()
                block.moments[name] = block.moments[name].rescaled(scale.reciprocal())
                notes[name] = {"detail": f"alpha {alpha:.2f}"}
            _absorb(one, block, scale, rows, columns)
        return notes

    def _search(
        self, one: Scaling, block: BlockState, rows: Tensor | None, columns: Tensor | None
    ) -> tuple[float, Tensor]:
        """The best exponent and its scale (in,)."""
        moments = block.moments[one.inputs[0]]
        power = moments.squares / max(1, moments.tokens)  # (in,) mean square
        if columns is not None:  # channels that several columns read
            power = power.index_put(
                (columns.flatten(),), power[columns].mean(1, keepdim=True).expand_as(columns).flatten()
            )
        rms = power.sqrt()
        alive = rms > 0
        best, least, chosen = 0.0, float("inf"), torch.ones_like(rms)
        for point in range(self.points):
            alpha = point / self.points
            scale = torch.where(alive, rms, 1.0) ** alpha
            live = scale[alive] if bool(alive.any()) else scale
            scale = torch.where(alive, scale / (live.max() * live.min()).sqrt(), 1.0)
            loss = 0.0
            for name in one.inputs:
                linear, follower = block.linears[name], block.followers[name]
                if isinstance(follower, GridSettings):
                    loss += moments.error(_rounded(linear, scale, follower) / scale - linear.effective())
            if loss < least:
                best, least, chosen = alpha, loss, scale
        return best, chosen


def _usable(architecture: Architecture, config: Any) -> list[Scaling]:
    return [one for one in architecture.scales if one.applies(config)]


def _rounded(linear: LinearState, scale: Tensor, settings: GridSettings) -> Tensor:
    """The scaled weight as the quantizer would round it, without the updates that it may add.

    Where it looks for the range of least error, a quarter of the ranges is enough to compare scales.
    """
    spec = settings.grid()
    assert spec is not None
    weight = linear.effective() * scale
    s, z = fit_groups(weight, spec, linear.dtype, clip=settings.clip, shrink=SHRINK[::4])
    width = spec.width(linear.in_features)
    codes = spec.code(weight, s.repeat_interleave(width, 1), z.repeat_interleave(width, 1))
    return grid_of(codes, s, z, spec, linear.dtype).dequantize(linear.dtype)


def _channels(one: Scaling, block: BlockState) -> tuple[Tensor | None, Tensor | None]:
    """Rows (channels,) of the linear that takes the scale, and the columns (channels, readers) that read each."""
    if one.norm:
        return None, None
    width = next(w for w in block.architecture.widths if w.name == one.width)
    units = width.count(block.config)
    by, reader = block.linears[one.by], block.linears[one.inputs[0]]
    device = by.weight.device
    rows = width.unit_segments(one.by, units, by.out_features, block.config)[one.segment].to(device)  # (units, rows)
    columns = width.unit_columns(units, reader.in_features).to(device)  # (units, readers · rows)
    columns = columns.view(units, -1, rows.shape[1]).transpose(1, 2)  # (units, rows, readers)
    return rows.flatten(), columns.reshape(rows.numel(), -1)


def _absorb(one: Scaling, block: BlockState, scale: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """Divide what precedes by the scale."""
    bias = block.parameters.get(f"{one.by}.bias")
    if one.norm:
        weight = block.parameters[f"{one.by}.weight"]
        block.parameters[f"{one.by}.weight"] = (weight + one.offset) / scale - one.offset
        if bias is not None:
            block.parameters[f"{one.by}.bias"] = bias / scale
        return
    assert rows is not None
    assert columns is not None
    by = block.linears[one.by]
    factor = torch.ones(by.out_features, device=scale.device)
    factor[rows] = scale[columns[:, 0]].reciprocal()
    by.scale(rows=factor)
    by.settle()
    if bias is not None:
        block.parameters[f"{one.by}.bias"] = bias * factor
