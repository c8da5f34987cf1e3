"""torch's operators for packed integers on a CPU: 4 bits in groups, 8 bits by row, with activations in bfloat16.

`_weight_int4pack_mm_for_cpu` multiplies with ``w = (code − 8) · scale + zero``, codes 0 … 15, scale and zero bfloat16
for 32, 64, 128 or 256 columns. A grid ``w = scale · (code − z)`` becomes that in these ways; all but the last are exact
where bfloat16 holds the scales:

    2, 3 bits           one plane: code' = code − z + 8 is in 0 … 15 for every zero-point, zero = 0
    4 bits, symmetric   one plane: z = 8, zero = 0
    8 bits, symmetric   two planes: code = 16 h + l, so w = (h − 8) · 16 scale  +  (l − 8) · scale + 8 scale
    asymmetric          4 bits: zero = (8 − z) · scale; 8 bits: (128 − z) · scale in the first plane; as bfloat16

A group of other columns, a row too, is cut into groups that the operator takes. Columns that 2:4 does not store have
the code of 0: on a CPU they take part like others. `_weight_int8pack_mm` takes one scale per row: ``w = code · scale``.

Rounding: a scale, a zero and an activation to bfloat16 (2⁻⁸ each, relative), sums in float32, the product of a plane,
and the sum of two, to bfloat16.

For many rows it is faster to decode the weight, some rows of it at a time, and multiply in float32. Above which number
of rows was measured (benchmarks/results/cpu_decode.json).
"""

from __future__ import annotations

from functools import cache, reduce
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from compress.kernels.kernel import Kernel, ready
from compress.kernels.pack import unpack_grid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.grid import Grid
    from compress.kernels.pack import Layout

GROUPS = (256, 128, 64, 32)  # columns that share a scale, as the int4 operator takes them
ROWS = 64  # the operator packs rows in blocks of 64 or, without AVX512, of 32: whole blocks have one order
DTYPES = (torch.bfloat16, torch.float16)
INT4_ROWS = 64  # above so many rows of activations, decoding and float32 are faster
INT8_ROWS = 32
AT_ONCE = 1 << 19  # weights decoded at a time: 2 MiB in float32 stay in the cache


def refusal(layout: Layout, dtype: torch.dtype) -> str | None:
    """What both operators need."""
    if layout.grid is None:
        return "there are no codes"
    if layout.grid.kind != "int":
        return "NormalFloat values are not evenly spaced"
    if dtype not in DTYPES:
        return f"computes in bfloat16, too coarse for {str(dtype).removeprefix('torch.')}"
    return None


class Int4(Kernel):
    """2, 3, 4 bits as one plane of 4-bit codes, 8 bits as two."""

    name: ClassVar[str] = "int4"
    runs_on: ClassVar[str | None] = "cpu"

    def __init__(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Shuffle the codes for the operator, rows filled up to whole blocks."""
        super().__init__(layout, parts, dtype)
        grid = unpack_grid(layout, parts)
        self.group = _group(layout)
        self.planes = 0
        for codes, scale, zero in _planes(grid):
            fill = -codes.shape[0] % ROWS
            codes = nn.functional.pad(codes, (0, 0, 0, fill)).int()
            pairs = torch.stack((scale, zero), -1)  # (out, groups, 2)
            pairs = pairs.repeat_interleave(layout.in_features // self.group // pairs.shape[1], dim=1)
            pairs = nn.functional.pad(pairs, (0, 0, 0, 0, 0, fill)).transpose(0, 1)
            self.hold(f"codes_{self.planes}", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))
            self.hold(f"scales_{self.planes}", pairs.to(torch.bfloat16).contiguous())  # (groups, rows, 2)
            self.planes += 1

    @classmethod
    def refusal(cls, layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
        """Groups must be whole ones of the operator."""
        found = refusal(layout, dtype)
        if found is None and not _group(layout):
            assert layout.grid is not None
            found = f"32 does not divide groups of {layout.grid.width(layout.in_features)} columns"
        return found

    @classmethod
    def says(cls, layout: Layout, dtype: torch.dtype) -> str:
        """What it does with the bits of this grid."""
        assert layout.grid is not None
        bits = layout.grid.bits
        how = "codes of 4 bits" if bits == 4 else f"{bits} bits as {'two' if bits == 8 else 'one'} of 4"
        return f"{how}, bfloat16, up to {INT4_ROWS} rows; above, decoded and multiplied in float32"

    def multiply(self, x: Tensor) -> Tensor:
        """By the operator, or decoded where that is faster."""
        codes, scales = ([self.get_buffer(f"{name}_{i}") for i in range(self.planes)] for name in ("codes", "scales"))
        product = int4_matmul if torch.compiler.is_compiling() else _int4
        y: Tensor = product(x, codes, scales, self.group, self.layout.out_features)
        return y


class Int8(Kernel):
    """8 bits around the middle code, one scale per row."""

    name: ClassVar[str] = "int8"
    runs_on: ClassVar[str | None] = "cpu"
    codes: Tensor
    scale: Tensor

    def __init__(self, layout: Layout, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Make the codes signed."""
        super().__init__(layout, parts, dtype)
        grid = unpack_grid(layout, parts)
        self.hold("codes", (grid.codes ^ 128).view(torch.int8))  # code − 128 in two's complement
        self.hold("scale", grid.scale.flatten().to(torch.bfloat16))

    @classmethod
    def refusal(cls, layout: Layout, device: torch.device, dtype: torch.dtype) -> str | None:
        """One scale per row, and rows that fill vectors: the operator does not check that."""
        found = refusal(layout, dtype)
        if found is not None or layout.grid is None:
            return found
        if layout.grid.bits != 8:
            return f"takes 8 bits, not {layout.grid.bits}"
        if layout.grid.groups(layout.in_features) != 1 or not layout.grid.symmetric:
            return "takes one scale per row and the middle code as zero-point"
        return None if layout.in_features % 32 == 0 else f"32 does not divide {layout.in_features} inputs"

    @classmethod
    def says(cls, layout: Layout, dtype: torch.dtype) -> str:
        """What it does."""
        return f"codes of 8 bits, bfloat16, up to {INT8_ROWS} rows; above, decoded and multiplied in float32"

    def multiply(self, x: Tensor) -> Tensor:
        """By the operator, or decoded where that is faster."""
        product = int8_matmul if torch.compiler.is_compiling() else _int8
        y: Tensor = product(x, self.codes, self.scale)
        return y


def _int4(x: Tensor, codes: list[Tensor], scales: list[Tensor], group: int, out_features: int) -> Tensor:
    """``x Wᵀ`` for x (rows, in), in the dtype of x; of codes and scales there is a tensor for each plane."""
    block = _block()
    if x.shape[0] > INT4_ROWS and block is not None:
        y = _decoded(x.float(), codes, scales, group, *block)
    else:
        rows = ready(x, torch.bfloat16)
        parts = (
            torch.ops.aten._weight_int4pack_mm_for_cpu(rows, plane, group, pairs)
            for plane, pairs in zip(codes, scales, strict=True)
        )
        y = reduce(torch.add, parts)
    return y[:, :out_features].to(x.dtype).contiguous()


def _int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``x Wᵀ`` for x (rows, in), codes (out, in) int8 and scale (out,), in the dtype of x."""
    if x.shape[0] <= INT8_ROWS:
        y: Tensor = torch.ops.aten._weight_int8pack_mm(ready(x, torch.bfloat16), codes, scale)
        return y.to(x.dtype)
    out, width = codes.shape
    y, wide = x.new_empty(x.shape[0], out), x.float()
    step = max(1, AT_ONCE // width)
    for first in range(0, out, step):
        some = slice(first, first + step)
        y[:, some] = (wide @ codes[some].float().T) * scale[some].float()
    return y


# As operators, which `torch.compile` and `torch.export` take whole; elsewhere a call would take 15 µs more.
int4_matmul = torch.library.custom_op("compress::int4_matmul", _int4, mutates_args=())
int8_matmul = torch.library.custom_op("compress::int8_matmul", _int8, mutates_args=())


@int4_matmul.register_fake
def _(x: Tensor, codes: list[Tensor], scales: list[Tensor], group: int, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@int8_matmul.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _decoded(x: Tensor, codes: list[Tensor], scales: list[Tensor], group: int, rows: int, order: Tensor) -> Tensor:
    """``x Wᵀ`` (rows of x, out filled up) for float32 x, of blocks of so many rows of W in this order."""
    width, blocks = x.shape[1], codes[0].shape[0] // rows
    y = x.new_empty(x.shape[0], blocks, rows)
    planes = [_scaled(*plane, width, rows, order) for plane in zip(codes, scales, strict=True)]
    step = max(1, AT_ONCE // (width * rows))
    for first in range(0, blocks, step):
        some = slice(first, first + step)
        parts = []
        for packed, scale, zero in planes:
            part = x.new_empty(*packed[some].shape[:2], rows)  # (blocks, in, rows in `order`)
            part[..., : rows // 2], part[..., rows // 2 :] = packed[some] & 15, packed[some] >> 4
            groups = part.view(len(part), -1, group, rows)
            torch.addcmul(zero[some], groups, scale[some], out=groups)
            parts.append(part)
        weight = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        y[:, some] = (x @ weight).transpose(0, 1)
    return y[:, :, order.argsort()].flatten(1)


def _scaled(codes: Tensor, pairs: Tensor, width: int, rows: int, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (blocks, in, bytes), and scale and zero (blocks, groups, 1, rows) with ``w = code · scale + zero``."""
    pairs = pairs.view(pairs.shape[0], -1, rows, 2)[:, :, order].float()
    scale, zero = pairs.permute(3, 1, 0, 2).unsqueeze(3).contiguous()
    return codes.view(-1, width, rows // 2), scale, zero - 8 * scale


def _group(layout: Layout) -> int:
    """Columns per scale of the operator; 0 where none divides a group of the grid."""
    assert layout.grid is not None
    width = layout.grid.width(layout.in_features)
    return next((size for size in GROUPS if width % size == 0), 0)


def _planes(grid: Grid) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Codes (out, in) below 16, scales and zeros (out, groups) float32, as the module's docstring derives them."""
    scale, zero = grid.scale.float(), grid.zero.float()
    if grid.spec.bits == 8:
        low = grid.codes & 15
        return [(grid.codes >> 4, 16 * scale, (128 - zero) * scale), (low, scale, 8 * scale)]
    if grid.spec.bits == 4:
        return [(grid.codes, scale, (8 - zero) * scale)]
    return [(grid.codes + 8 - grid.spread(grid.zero), scale, torch.zeros_like(scale))]


@cache
def _block() -> tuple[int, Tensor] | None:
    """Rows of a block as the operator packs them here, and the row that each nibble of a column is of.

    It depends on the processor and is not documented, so it is found out: rows are packed that count themselves, their
    low and their high bits apart. The low nibbles of a column's bytes come first. None where columns are not whole.
    """
    rows, columns = torch.arange(ROWS, dtype=torch.int32, device="cpu"), 2
    found = torch.zeros(ROWS * columns, dtype=torch.int64, device="cpu")
    for digit, base in ((rows % 16, 1), (rows // 16, 16)):
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit[:, None].repeat(1, columns), 2)
        bytewise = packed.flatten()
        found += base * torch.stack((bytewise & 15, bytewise >> 4)).long().flatten()
    nibbles = found.view(2, -1)
    for block in (ROWS, ROWS // 2):
        order = nibbles[:, : block // 2].flatten()
        same = nibbles.view(2, -1, columns, block // 2)  # (nibble, block, column, byte)
        wanted = order.view(2, 1, 1, -1) + rows[::block].view(1, -1, 1, 1)
        if order.sort().values.equal(rows[:block].long()) and torch.equal(same, wanted.expand_as(same)):
            return block, order
    return None
