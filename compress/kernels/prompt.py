"""y = x Wᵀ in Triton for packed W and some hundred rows of x, on Hopper GPUs: their warp-group products, dense or 2:4.

W is read as `compress.kernels.fragments` laid it out, one tile of 16 rows a warp, and stays in registers; x goes
through shared memory, 64 columns at a time, where the tensor cores read it. While they multiply, what comes next is
decoded: each code − zero times its scale, rounded as the grid's `dequantize` does. Its registers are written while the
product before is still running, so they are others than those that it reads; `compress.kernels.aot` looks for that.

    y_mn = Σ_k w_nk x_mk

Warp groups along columns take every `ALONG`-th step; their sums are added in one order. A dense W wants x in the order
of its fragments (`product.order_kernel`), 2:4 as it is.
"""

# ruff: noqa: RUF005 (Triton adds tuples)

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.instructions import (
    arrived,
    copy,
    decode,
    halves,
    keep,
    large_room,
    matrices,
    public,
    put,
    room,
    settled,
    shared,
    times,
    together,
    twice,
    warpgroup,
)  # fmt: skip
from compress.kernels.reading import read, zeros


@triton.jit
def _bring(x, base, slot, M, columns, first, start, thread, BM: tl.constexpr, THREADS: tl.constexpr):
    """Begin to copy 64 columns of BM rows of x, pieces of 16 bytes, exchanged as the tensor cores want them."""
    for i in tl.static_range(BM * 8 // THREADS):
        row, piece = (i * THREADS + thread) // 8, thread % 8
        there = (first + row < M) & (start + piece * 8 < columns)
        source = x + (first + row).to(tl.int64) * columns + (start + piece * 8)
        copy(base + slot * (BM * 128) + row * 128 + ((piece ^ (row & 7)) * 16), source, there, 16, 0, 0)
    together(thread)


@triton.jit
def _numbers(here, part, scales, offsets, one, CODES: tl.constexpr, SPARSE: tl.constexpr, BF16: tl.constexpr):
    """The first operand for 64 columns: of 2:4 twice four pairs, else four times."""
    found = ()
    if SPARSE:
        for b in tl.static_range(2):
            if CODES:
                a = decode(here[2 * part + b], offsets[0], offsets[1], one, BF16)
                found = found + _scaled(a, scales, BF16)
            else:
                found = found + here[8 * part + 4 * b : 8 * part + 4 * b + 4]
    else:
        for b in tl.static_range(4):
            a = decode(here[4 * part + b], offsets[0], offsets[1], one, BF16)
            found = found + _scaled(a, scales, BF16)
    return found


@triton.jit
def _scaled(a, s, BF16: tl.constexpr):
    return times(a[0], s[0], BF16), times(a[1], s[1], BF16), times(a[2], s[0], BF16), times(a[3], s[1], BF16)


@triton.jit
def _grid(here, at, ZEROS: tl.constexpr, MIDDLE0: tl.constexpr, MIDDLE1: tl.constexpr, THREADS: tl.constexpr):
    """Scales and offsets, of the rows g and g + 8."""
    scales = twice(here[at])
    if ZEROS:
        offsets = twice(here[at + 1])
    else:
        offsets = (tl.full((THREADS,), MIDDLE0, tl.int32), tl.full((THREADS,), MIDDLE1, tl.int32))
    return scales, offsets


@triton.jit(do_not_specialize=["M", "N", "columns", "tiles", "steps", "one"])
def prompt_kernel(
    x,  # (M, columns) halves; ordered, if W is dense
    words,
    positions,
    scale,
    offset,
    y,  # (M, N) halves, N a multiple of 8
    M,
    N,
    columns,
    tiles,
    steps,
    one,  # for `decode`
    CODES: tl.constexpr,
    SPARSE: tl.constexpr,
    GROUP: tl.constexpr,  # 64 or 128
    STEP: tl.constexpr,  # 128, or 64
    BF16: tl.constexpr,
    ZEROS: tl.constexpr,
    MIDDLE0: tl.constexpr,
    MIDDLE1: tl.constexpr,
    BM: tl.constexpr,  # rows of x
    GROUPS: tl.constexpr,  # warp groups beside each other, of 64 rows of W
    ALONG: tl.constexpr,  # times as many, that share the columns
    STAGES: tl.constexpr,  # parts of x that have room, for each of these
    KIB: tl.constexpr,  # of shared memory, more than 48; or 0
):
    """64 · GROUPS rows of W by BM rows of x."""
    THREADS: tl.constexpr = 128 * GROUPS * ALONG
    SOME: tl.constexpr = 128 * GROUPS
    PARTS: tl.constexpr = STEP // 64
    words_of_tile: tl.constexpr = (STEP // 32 if CODES else STEP // 8) if SPARSE else STEP // 16
    scales_at: tl.constexpr = words_of_tile + (STEP // 64 if SPARSE else 0)
    a_group: tl.constexpr = 2 if ZEROS else 1
    thread = tl.arange(0, THREADS)
    along, mine = thread // SOME, thread % SOME
    lane, warp = mine % 32, mine // 32
    across = tl.cdiv(M, BM)
    block, first = tl.program_id(0) // across, tl.program_id(0) % across * BM
    tile = tl.minimum(block * (4 * GROUPS) + warp, tiles - 1)
    start = large_room(thread, y, M < 0, KIB) if KIB else room(thread, ALONG * STAGES * (BM * 128), 1024)
    base = start + along * (STAGES * (BM * 128))
    for early in tl.static_range(STAGES - 1):
        column = ((early // PARTS * ALONG + along) * PARTS + early % PARTS) * 64
        _bring(x, base, early, M, columns, first, column, mine, BM, SOME)
    total = zeros(BM // 2, THREADS)
    here = read(words, positions, scale, offset, tile, tiles, steps, along, lane,
                CODES, SPARSE, ZEROS, GROUP, STEP, 1, False)  # fmt: skip
    scales, offsets = here[0:2], here[0:2]
    if CODES:
        scales, offsets = _grid(here, scales_at, ZEROS, MIDDLE0, MIDDLE1, THREADS)
    a = _numbers(here, 0, scales, offsets, one, CODES, SPARSE, BF16)
    for turn in tl.range(0, tl.cdiv(steps, ALONG)):
        step = turn * ALONG + along
        for part in tl.static_range(PARTS):
            stage = turn * PARTS + part
            arrived(thread, STAGES - 2)
            public(thread)
            tl.debug_barrier()
            column = ((step + (part + STAGES - 1) // PARTS * ALONG) * PARTS + (part + STAGES - 1) % PARTS) * 64
            _bring(x, base, (stage + STAGES - 1) % STAGES, M, columns, first, column, mine, BM, SOME)
            if part + 1 == PARTS:
                coming = read(words, positions, scale, offset, tile, tiles, steps, step + ALONG, lane,
                              CODES, SPARSE, ZEROS, GROUP, STEP, 1, False)  # fmt: skip
            where = here[words_of_tile + part] if SPARSE else here[0]
            total = warpgroup(total, a, where, base + stage % STAGES * (BM * 128), SPARSE, BF16)
            before = a
            if part + 1 < PARTS:
                if CODES and (part + 1) * 64 % GROUP == 0:
                    scales, offsets = _grid(
                        here, scales_at + a_group * ((part + 1) * 64 // GROUP), ZEROS, MIDDLE0, MIDDLE1, THREADS
                    )
                a = _numbers(here, part + 1, scales, offsets, one, CODES, SPARSE, BF16)
            else:
                if CODES:
                    scales, offsets = _grid(coming, scales_at, ZEROS, MIDDLE0, MIDDLE1, THREADS)
                a = _numbers(coming, 0, scales, offsets, one, CODES, SPARSE, BF16)
            total = settled(total, before)
        here = coming
    arrived(thread, 0)
    if ALONG > 1:
        tl.debug_barrier()
        for i in tl.static_range(BM // 8):
            four = total[4 * i : 4 * i + 4]
            keep(start + along * (SOME * BM * 2) + i * (SOME * 16) + mine * 16, four)
        tl.debug_barrier()
        for other in tl.static_range(1, ALONG):
            sums = ()
            for i in tl.static_range(BM // 8):
                more = shared(start + other * (SOME * BM * 2) + i * (SOME * 16) + mine * 16, 4, 0)
                for r in tl.static_range(4):
                    sums = sums + (total[4 * i + r] + more[r].to(tl.float32, bitcast=True),)
            total = sums
    # y goes through shared memory, 64 rows of x at a time, so that neighbours store neighbours
    PITCH: tl.constexpr = 128 * GROUPS
    q, r = lane // 8, lane % 8
    for some in tl.static_range(BM // 64):
        tl.debug_barrier()
        for j in tl.static_range(0, 8, 2):
            eight = total[32 * some + 4 * j : 32 * some + 4 * j + 8]
            pairs = (
                halves(eight[0], eight[1], BF16),
                halves(eight[2], eight[3], BF16),
                halves(eight[4], eight[5], BF16),
                halves(eight[6], eight[7], BF16),
            )
            row = along * 64 + 8 * (j + q // 2) + r
            matrices(start + row * PITCH + (((warp * 2 + q % 2) ^ (row & 7)) * 16), pairs)
        tl.debug_barrier()
        for i in tl.static_range(64 * 8 * GROUPS // THREADS):  # what the first of those along columns have: all of it
            number = i * THREADS + thread
            row, piece = number // (8 * GROUPS), number % (8 * GROUPS)
            m, n = first + some * 64 + row, block * (64 * GROUPS) + piece * 8
            four = shared(start + row * PITCH + ((piece ^ (row & 7)) * 16), 4, 0)
            put(y + m.to(tl.int64) * N + n, four, (m < M) & (n < N))
