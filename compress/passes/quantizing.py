"""What passes that put weights on a grid have in common: its fields, and what of a model stays true after them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator

from compress.grid import GridSpec
from compress.passes.base import Invariant, LinearPass, SettingError
from compress.settings import Settings


class GridSettings(Settings):
    """Fields common to passes that put weights on a grid of integer codes."""

    bits: int | None = Field(default=None, description="bits per code: 2, 3, 4 or 8")
    group_size: int = Field(default=128, ge=-1, description="input columns per scale; -1: one scale per row")
    symmetric: bool = Field(default=True, description="the zero-point is the middle code; else one per group")
    clip: Literal["minmax", "mse"] = Field(default="mse", description="range of the grid: all weights, or least error")
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = Field(
        default="auto", description="dtype of the stored scales; auto: the checkpoint's"
    )

    @field_validator("bits")
    @classmethod
    def _bits_exist(cls, value: int | None) -> int | None:
        if value not in (None, 2, 3, 4, 8):
            raise SettingError(f"no grid has {value} bits", "bits is 2, 3, 4 or 8")
        return value

    @field_validator("group_size")
    @classmethod
    def _group_exists(cls, value: int) -> int:
        if value == 0:
            raise SettingError("group_size is 0", "give the columns per scale, or -1 for one scale per row")
        return value

    def grid(self) -> GridSpec | None:
        """The grid that these settings describe; None without `bits`."""
        if self.bits is None:
            return None
        dtype = None if self.scale_dtype == "auto" else getattr(torch, self.scale_dtype)
        return GridSpec(self.bits, self.group_size, self.symmetric, dtype)

    def check_group(self, in_features: int) -> None:
        """A group must divide the input width. Raises SettingError."""
        if self.bits is not None and self.group_size > 0 and in_features % self.group_size:
            fits = [size for size in range(in_features, 7, -1) if in_features % size == 0]
            problem = f"group_size {self.group_size} does not divide the input width {in_features}"
            raise SettingError(problem, f"choose among {', '.join(map(str, fits[:12]))}; or -1, one scale per row")


class QuantizingPass(GridSettings, LinearPass):
    """Rules common to passes that only quantize: after the mask, which they keep, and once (rule 5)."""

    bits: int = Field(default=4, description="bits per code: 2, 3, 4 or 8")

    rule: ClassVar[int] = 5
    establishes: ClassVar[frozenset[Invariant]] = frozenset({Invariant.GRID})
    preserves: ClassVar[frozenset[Invariant]] = frozenset(
        {Invariant.MASK, Invariant.PATTERN, Invariant.SHAPES, Invariant.TIES}
    )

    def check_shape(self, out_features: int, in_features: int) -> None:
        """The group must divide the input width."""
        self.check_group(in_features)
