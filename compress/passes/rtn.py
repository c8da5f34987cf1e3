"""Round to nearest: each weight becomes the nearest value of its group's grid, without calibration data.

The baseline of the other quantizers, and the whole method for 8 bits. The grid's range is min/max, or the one of least
squared error; `grid_search` has the formulas. With `rescale` the scales are then fitted to the codes and the inputs,
which takes calibration data: the closed form of PEQA, which begins with rounded weights.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.passes.base import LinearState, Moments, Note, Statistics
from compress.passes.grid_search import fit_groups, grid_of, rescaled, rescaling_bytes
from compress.passes.quantizing import QuantizingPass


class RTN(QuantizingPass):
    """Quantize by rounding to nearest. Pruned weights keep their exact 0."""

    # Without calibration, the least error of weights is not that of outputs: clipping is worse (docs/lab-log.md).
    clip: Literal["minmax", "mse"] = Field(
        default="minmax", description="range of the grid: all weights, or least error"
    )
    rescale: bool = Field(default=False, description="fit the scales to the codes, by least squares")

    def needed(self) -> Statistics:
        """The second moment of the input, to fit scales."""
        return Statistics.GRAM if self.rescale else Statistics.NONE

    def solving_bytes(self, out_features: int, in_features: int) -> int:
        """The systems of equations for the scales."""
        spec = self.grid()
        return rescaling_bytes(spec.groups(in_features)) if self.rescale and spec else 0

    def apply(self, linear: LinearState, moments: Moments) -> Note:
        """Choose scales, then round."""
        spec = self.grid()
        assert spec is not None
        weight = linear.effective()
        scale, zero = fit_groups(weight, spec, linear.dtype, clip=self.clip)
        width = spec.width(linear.in_features)
        codes = spec.code(weight, scale.repeat_interleave(width, 1), zero.repeat_interleave(width, 1))
        linear.quantize(grid_of(codes, scale, zero, spec, linear.dtype))
        if self.rescale and linear.grid is not None:
            linear.quantize(rescaled(linear.dense, linear.grid, moments.gram(), linear.dtype))
        return {}
