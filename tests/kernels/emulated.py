"""The instructions of `compress.kernels.instructions` in numpy, as the PTX ISA describes them: lanes of warps by hand.

PTX cannot stand in Triton's interpreter. A kernel that is interpreted gets these in its place, a value for each thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

if TYPE_CHECKING:
    import pytest

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def install(patch: pytest.MonkeyPatch) -> None:
    """Let the kernels use these."""
    from compress.kernels import product, wide

    for module in (product, wide):
        for instruction in (awaited, mma, mma_sparse, decode, times, twice):
            patch.setattr(module, instruction.__name__, instruction, raising=False)
    for name in ("gdc_wait", "gdc_launch_dependents"):  # kernels follow each other here
        patch.setattr(product, name, lambda: None)


def _array(tensor: Any) -> Any:
    return np.ascontiguousarray(tensor.handle.data)


def _tensor(array: Any) -> Any:
    kind = tl.float32 if array.dtype == np.float32 else tl.int32
    return tl.core.tensor(TensorHandle(np.ascontiguousarray(array), kind), tl.block_type(kind, list(array.shape)))


def _halves(words: Any, bf16: Any) -> Any:
    """Pairs (…) int32 → (…, 2) float64."""
    dtype = torch.bfloat16 if getattr(bf16, "value", bf16) else torch.float16
    return torch.from_numpy(np.ascontiguousarray(words)).unsqueeze(-1).view(dtype).double().numpy()


def _pairs(values: Any, bf16: Any) -> Any:
    """(…, 2) → pairs (…) int32, rounded."""
    dtype = torch.bfloat16 if getattr(bf16, "value", bf16) else torch.float16
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(torch.int32).squeeze(-1).numpy()


def _warps(words: Any, bf16: Any) -> Any:
    return _halves(_array(words), bf16).reshape(-1, 32, 2)


def _second(registers: tuple[Any, ...], bf16: Any) -> Any:
    """B (warps, 8 · registers, 8)."""
    parts = [_warps(one, bf16) for one in registers]
    b = np.zeros((len(parts[0]), 8 * len(parts), 8))
    for number, part in enumerate(parts):
        for half in range(2):
            b[:, 8 * number + 2 * T + half, G] = part[..., half]
    return b


def _first(a0: Any, a1: Any, a2: Any, a3: Any, bf16: Any) -> Any:
    """A (warps, 16, 16)."""
    parts = [_warps(one, bf16) for one in (a0, a1, a2, a3)]
    a = np.zeros((len(parts[0]), 16, 16))
    for number, part in enumerate(parts):
        for half in range(2):
            a[:, G + 8 * (number % 2), 2 * T + 8 * (number // 2) + half] = part[..., half]
    return a


def _sum(a: Any, b: Any, c: tuple[Any, ...]) -> tuple[Any, ...]:
    d = a @ b  # (warps, 16, 8)
    found = []
    for number, one in enumerate(c):
        part = d[:, G + 8 * (number // 2), 2 * T + number % 2].reshape(-1)
        found.append(_tensor((part + _array(one)).astype(np.float32)))
    return tuple(found)


def mma(a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, *c: Any, **_: Any) -> tuple[Any, ...]:
    *c, bf16 = c
    return _sum(_first(a0, a1, a2, a3, bf16), _second((b0, b1), bf16), tuple(c))


def mma_sparse(*registers: Any) -> tuple[Any, ...]:
    *parts, positions, odd, bf16 = registers
    given = _first(*parts[:4], bf16)
    chosen = _array(positions).astype(np.int64).reshape(-1, 32) & 0xFFFFFFFF
    a = np.zeros((len(given), 16, 32))
    for warp in range(len(given)):
        for row in range(16):
            for four in range(8):
                lane = 4 * (row % 8) + 2 * int(getattr(odd, "value", odd)) + four // 4
                places = chosen[warp, lane] >> (16 * (row // 8) + 4 * (four % 4)) & 15
                first, second = places & 3, places >> 2
                assert first < second, "the instruction wants positions that ascend"
                a[warp, row, 4 * four + first] = given[warp, row, 2 * four]
                a[warp, row, 4 * four + second] = given[warp, row, 2 * four + 1]
    return _sum(a, _second(tuple(parts[4:8]), bf16), tuple(parts[8:12]))


def decode(word: Any, offset0: Any, offset1: Any, one: Any, bf16: Any) -> tuple[Any, ...]:
    """By the bits that the text names, and the numbers that they are."""
    word, found = _array(word), []
    wide = not getattr(bf16, "value", bf16)
    one = getattr(one, "value", one)  # a number in the kernel, or its argument
    assert wide or (one if isinstance(one, int) else one.handle.data.item()) == 0x3F803F80, "a pair of ones"
    for number in range(4):
        bits = np.stack(((word >> (4 * number)) & 15, (word >> (16 + 4 * number)) & 15), -1).astype(np.float64)
        # odd pairs of float16 are sixteenfold in the mantissa of 1024, times 1/16
        values = (1024 + 16 * bits) / 16 if wide and number % 2 else (1024 if wide else 128) + bits
        offset = _halves(_array(offset1 if number % 2 else offset0), bf16)
        found.append(_tensor(_pairs(values + offset, bf16)))
    return tuple(found)


def awaited(total: Any) -> Any:
    return total


def times(a: Any, b: Any, bf16: Any) -> Any:
    return _tensor(_pairs(_halves(_array(a), bf16) * _halves(_array(b), bf16), bf16))


def twice(pair: Any) -> tuple[Any, ...]:
    whole = _array(pair)
    halves = whole.reshape(*whole.shape, 1).view(np.int16)  # (…, 2)
    return tuple(_tensor(np.repeat(halves[..., [one]], 2, -1).view(np.int32)[..., 0]) for one in range(2))
