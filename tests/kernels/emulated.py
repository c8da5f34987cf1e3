"""The instructions of `compress.kernels.instructions` in numpy, as the PTX ISA describes them: lanes of warps by hand.

PTX cannot stand in Triton's interpreter. A kernel that is interpreted gets these in its place, a value for each thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import interpreter
from triton.runtime.interpreter import TensorHandle

if TYPE_CHECKING:
    import pytest

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def install(patch: pytest.MonkeyPatch) -> None:
    """Let the kernels use these."""
    from compress.kernels import product, prompt, reading, wide

    for module in (product, prompt, reading, wide):
        for instruction in INSTRUCTIONS:
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


class Room:
    """Shared memory, and what is on its way there: until it arrives, nothing of use is in its place."""

    memory = np.zeros(0, np.int32)
    groups: ClassVar[list[list[tuple[Any, Any]]]] = []


def _words_at(address: Any, words: int, at: int) -> Any:
    first = (_array(address) + at) // 4
    assert bool(((_array(address) + at) % (4 * words) == 0).all()), "the instruction wants an aligned address"
    return first[:, None] + np.arange(words)


def room(thread: Any, count: Any, _: Any = None) -> Any:
    Room.memory = np.full(int(count) // 4, 0x7BADBAD5, np.int32)
    Room.groups = [[]]
    return _tensor(np.zeros(thread.handle.data.shape, np.int32))


def large_room(thread: Any, _: Any, never: Any, kib: Any) -> Any:
    assert not _plain(never)
    return room(thread, (int(kib) - 1) * 1024)


def keep(address: Any, four: Any) -> None:
    Room.memory[_words_at(address, 4, 0)] = np.stack([_array(one) for one in four], -1).view(np.int32)


def copy(address: Any, source: Any, there: Any, size: Any, to: Any, away: Any) -> None:
    words = int(size) // 4
    place = _words_at(address, words, int(to))
    pointers = (_array(source).astype(np.uint64) + np.uint64(int(away)))[:, None]
    pointers = np.ascontiguousarray(pointers + np.arange(words, dtype=np.uint64) * np.uint64(4))
    mask = np.ascontiguousarray(np.broadcast_to(_array(there).astype(bool).reshape(-1, 1), pointers.shape))
    found = interpreter.load(pointers, mask, np.zeros(pointers.shape, np.int32), np.dtype(np.int32))
    Room.memory[place] = 0x7BADBAD5
    Room.groups[-1].append((place, found))


def together(_: Any) -> None:
    Room.groups.append([])


def arrived(_: Any, but: Any) -> None:
    done = len(Room.groups) - 1 - int(but)
    for place, found in (one for group in Room.groups[: max(0, done)] for one in group):
        Room.memory[place] = found
    Room.groups = Room.groups[max(0, done) :]


def shared(address: Any, words: Any, at: Any) -> tuple[Any, ...]:
    found = Room.memory[_words_at(address, int(words), int(at))]
    return tuple(_tensor(found[:, number]) for number in range(int(words)))


def warpgroup(total: Any, a: Any, positions: Any, address: Any, sparse: Any, bf16: Any) -> Any:
    """What comes of it is there when it is `settled`: until then nothing that a kernel could use is in its place."""
    Running.product = [tuple(total), tuple(a), positions, address, bool(_plain(sparse)), bf16]
    Running.found = _product(*Running.product)
    return tuple(_tensor(np.full(one.handle.data.shape, np.nan, np.float32)) for one in total)


def settled(total: Any, a: Any) -> Any:
    """What it was, if B is still what it was when it began."""
    again = _product(*Running.product)
    assert all(np.array_equal(_array(one), _array(other)) for one, other in zip(Running.found, again, strict=True))
    assert all(one is other for one, other in zip(Running.product[1], a, strict=True)), "A is kept"
    return Running.found


class Running:
    product: ClassVar[list[Any]] = []
    found: ClassVar[tuple[Any, ...]] = ()


def _plain(constant: Any) -> Any:
    return getattr(constant, "value", constant)


def _product(total: Any, a: Any, positions: Any, address: Any, sparse: bool, bf16: Any) -> tuple[Any, ...]:
    """Warp by warp, by eights of rows of B, as many products of one warp."""
    places, rows = _array(address).reshape(-1, 128), 2 * len(total)  # of warp groups
    assert bool((places == places[:, :1]).all()), "the four warps name one place"
    assert bool((places % 1024 == 0).all()), "the instruction wants an aligned address"
    groups = []
    for first in places[:, 0].tolist():
        pieces = Room.memory[first // 4 : first // 4 + 32 * rows].reshape(rows, 8, 4)
        pieces = np.stack([pieces[row, np.arange(8) ^ (row % 8)] for row in range(rows)])  # in order
        groups.append(_halves(pieces.reshape(rows, 32), bf16).reshape(rows, 64))
    b = np.repeat(np.stack(groups), 4, 0)  # (warps, N, 64)
    out = list(total)
    for j in range(rows // 8):
        sums = tuple(out[4 * j : 4 * j + 4])
        for part in range(len(a) // 4):
            mine, width = a[4 * part : 4 * part + 4], 32 if sparse else 16
            columns = b[:, 8 * j : 8 * j + 8, width * part : width * (part + 1)]  # (warps, 8, width): column g, rows k
            second = []
            for k in range(0, width, 8):
                lanes = np.stack([columns[:, G, k + 2 * T], columns[:, G, k + 2 * T + 1]], -1)
                second.append(_tensor(_pairs(lanes.reshape(-1, 2), bf16)))
            if sparse:
                sums = mma_sparse(*mine, *second, *sums, positions, part, bf16)
            else:
                sums = mma(*mine, *second, *sums, bf16)
        out[4 * j : 4 * j + 4] = sums
    return tuple(out)


def public(_: Any) -> None:
    """Between threads there is nothing to do here."""


def halves(low: Any, high: Any, bf16: Any) -> Any:
    return _tensor(_pairs(np.stack([_array(low), _array(high)], -1).astype(np.float64), bf16))


def matrices(address: Any, pairs: Any) -> None:
    places = _array(address).reshape(-1, 4, 8)  # (warps, matrices, rows)
    assert bool((places % 16 == 0).all())
    for number, pair in enumerate(pairs):
        values = _array(pair).reshape(-1, 32, 1).view(np.int16)  # (warps, 32, 2): row g, columns 2 t and 2 t + 1
        matrix = np.zeros((len(values), 8, 8), np.int16)
        matrix[:, G[:, None], 2 * T[:, None] + np.arange(2)] = values
        rows = np.ascontiguousarray(matrix.transpose(0, 2, 1)).view(np.int32)  # (warps, 8, 4)
        Room.memory[places[:, number, :, None] // 4 + np.arange(4)] = rows


def put(place: Any, four: Any, there: Any) -> None:
    pointers = _array(place).astype(np.uint64)[:, None] + np.arange(4, dtype=np.uint64) * np.uint64(4)
    mask = np.ascontiguousarray(np.broadcast_to(_array(there).astype(bool).reshape(-1, 1), pointers.shape))
    values = np.ascontiguousarray(np.stack([_array(one) for one in four], -1))
    interpreter.store(np.ascontiguousarray(pointers), values, mask)


def awaited(total: Any) -> Any:
    return total


def times(a: Any, b: Any, bf16: Any) -> Any:
    return _tensor(_pairs(_halves(_array(a), bf16) * _halves(_array(b), bf16), bf16))


def twice(pair: Any) -> tuple[Any, ...]:
    whole = _array(pair)
    halves = whole.reshape(*whole.shape, 1).view(np.int16)  # (…, 2)
    return tuple(_tensor(np.repeat(halves[..., [one]], 2, -1).view(np.int32)[..., 0]) for one in range(2))


INSTRUCTIONS = (
    arrived, awaited, copy, decode, halves, keep, large_room, matrices, mma, mma_sparse, public, put, room, settled,
    shared, times, together, twice, warpgroup,
)  # fmt: skip
