"""y = x Wᵀ + dx upᵀ in Triton for packed W: codes of 4 bits, 2:4, or both; x and y in float16 or bfloat16.

W is the first operand of the tensor cores' instruction and x the second, so a few rows of x are a whole operand, and W
goes from memory into registers as it is multiplied: `compress.kernels.fragments` laid it out for that. Codes become
numbers in registers, exactly; their scale is applied to the float32 sums of a group, or, with many rows of x, to the
numbers, which are then rounded to what the grid's `dequantize` gives. 2:4 is multiplied by the instruction for it.

    y_mn = Σ_g s_ng Σ_k (c_nk − z_ng) x_mk  + Σ_r up_nr dx_mr

A program works on 16 · tiles rows of W a warp. Its warps are `across` rows times `along` columns; those along columns
take every `along`-th step, and their sums are added in one fixed order: the same input gives the same bits.
"""

# ruff: noqa: RET505 (Triton compiles what is not returned from)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compress.kernels.adding import add_programs, added, store, words_of
from compress.kernels.instructions import arrived, decode, keep, mma, mma_sparse, put, room, shared, times, twice
from compress.kernels.reading import begin, quarters, read, read_x, take, zeros

INTEGERS = ["M", "N", "tiles", "steps", "rank", "one"]


@triton.jit
def _floats(pair, BF16: tl.constexpr):
    if BF16:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _same(VALUE0: tl.constexpr, VALUE1: tl.constexpr, THREADS: tl.constexpr):
    return tl.full((THREADS,), VALUE0, tl.int32), tl.full((THREADS,), VALUE1, tl.int32)


@triton.jit
def _scaled(total, part, f0, f1, AT: tl.constexpr):
    return (
        total[AT] + part[AT] * f0,
        total[AT + 1] + part[AT + 1] * f0,
        total[AT + 2] + part[AT + 2] * f1,
        total[AT + 3] + part[AT + 3] * f1,
    )


@triton.jit
def _mma(a, b0, b1, c, BF16: tl.constexpr):
    return mma(a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3], BF16)


@triton.jit
def _mma_sparse(a, b, c, positions, ODD: tl.constexpr, BF16: tl.constexpr):
    return mma_sparse(
        a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], positions, ODD, BF16
    )  # fmt: skip


@triton.jit
def _times(a, s0, s1, BF16: tl.constexpr):
    return times(a[0], s0, BF16), times(a[1], s1, BF16), times(a[2], s0, BF16), times(a[3], s1, BF16)


@triton.jit(do_not_specialize=INTEGERS)
def product_kernel(
    x,  # (M, steps · STEP) halves; or arranged
    words,
    positions,
    scale,
    offset,
    up,
    dx,  # (M, 16 rank) halves
    y,  # (M, N) halves
    partial,  # sums of programs that share the columns, and how many of these are done: or None
    counters,
    M,
    N,
    tiles,
    steps,
    rank,  # sixteenths of it
    one,  # for `decode`
    CODES: tl.constexpr,
    SPARSE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BF16: tl.constexpr,
    ZEROS: tl.constexpr,  # whether there are offsets
    MIDDLE0: tl.constexpr,  # the offsets where there are none
    MIDDLE1: tl.constexpr,
    RANK: tl.constexpr,  # whether there is a branch
    ARRANGED: tl.constexpr,  # whether x is
    EVEN: tl.constexpr,  # whether ALONG divides the steps
    NT: tl.constexpr,  # eights of rows of x
    T: tl.constexpr,  # tiles of a warp
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share the columns: of T · ACROSS tiles, so that these are many
    SCALED: tl.constexpr,  # whether scales are applied to the numbers
    AHEAD: tl.constexpr,  # steps of W that are on their way: one in registers, more (2ⁿ − 1) in shared memory
    AHEAD_X: tl.constexpr,  # whether x is
    ONCE: tl.constexpr,  # whether warps along columns add their sums behind one barrier
    DEPENDENT: tl.constexpr,  # whether the kernel before may still run: W is read first, x when it has ended
):
    """16 · T · ACROSS rows of W by 8 · NT rows of x."""
    THREADS: tl.constexpr = 32 * ACROSS * ALONG
    thread = tl.arange(0, THREADS)
    lane, warp = thread % 32, thread // 32
    g, t = lane // 4, lane % 4
    across, along = warp % ACROSS, warp // ACROSS
    WAYS: tl.constexpr = ALONG * SPLIT
    way = along + tl.program_id(2) * ALONG if SPLIT > 1 else along
    tile = tl.minimum((tl.program_id(0) * ACROSS + across) * T, tiles - T)
    block = tl.program_id(1) * NT
    pairs_of_x = x.to(tl.pointer_type(tl.int32))
    four = tl.arange(0, 4)[None, :]
    words_of_tile: tl.constexpr = (STEP // 32 if CODES else STEP // 8) if SPARSE else STEP // 16
    positions_of_tile: tl.constexpr = STEP // 64 if SPARSE else 0
    scales_at: tl.constexpr = words_of_tile + positions_of_tile
    a_group: tl.constexpr = 2 if ZEROS else 1
    each: tl.constexpr = scales_at + (STEP // GROUP * a_group if CODES else 0)
    total = zeros(4 * T * NT, THREADS)
    slot: tl.constexpr = 128 * T * each  # bytes of a step
    SLOTS: tl.constexpr = AHEAD + 1
    FOURS: tl.constexpr = min(T * NT, 2048 // THREADS)  # of sums that are added at once: 32 KiB
    if AHEAD > 1:
        for_steps: tl.constexpr = ACROSS * ALONG * SLOTS * slot
        for_sums: tl.constexpr = THREADS * 16 * FOURS if ONCE else 0
        own = room(thread, max(for_steps, for_sums))
        base = own + warp * (SLOTS * slot)
        for ahead in tl.static_range(AHEAD):
            begin(base + ahead * slot, words, positions, scale, offset, tile, tiles, steps, ahead * WAYS + way, lane,
                  CODES, SPARSE, ZEROS, GROUP, STEP, T, EVEN)  # fmt: skip
    elif AHEAD:
        coming = read(words, positions, scale, offset, tile, tiles, steps, way, lane,
                       CODES, SPARSE, ZEROS, GROUP, STEP, T, EVEN)  # fmt: skip
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    if AHEAD_X:
        coming_x = read_x(pairs_of_x, block, M, steps, way, 0, lane, SPARSE, STEP, ARRANGED, NT)
    for turn in tl.range(0, tl.cdiv(steps, WAYS)):
        step = turn * WAYS + way
        if AHEAD > 1:
            arrived(thread, AHEAD - 1)
            here = take(base + turn % SLOTS * slot, lane, CODES, SPARSE, ZEROS, GROUP, STEP, T)
            begin(base + (turn + AHEAD) % SLOTS * slot, words, positions, scale, offset, tile, tiles, steps,
                  step + AHEAD * WAYS, lane, CODES, SPARSE, ZEROS, GROUP, STEP, T, EVEN)  # fmt: skip
        elif AHEAD:
            ahead = tl.minimum(step + WAYS, steps - 1) if EVEN else step + WAYS
            here = coming
            coming = read(words, positions, scale, offset, tile, tiles, steps, ahead, lane,
                           CODES, SPARSE, ZEROS, GROUP, STEP, T, EVEN)  # fmt: skip
        else:
            here = read(words, positions, scale, offset, tile, tiles, steps, step, lane,
                         CODES, SPARSE, ZEROS, GROUP, STEP, T, EVEN)  # fmt: skip
        part = total
        for b in tl.static_range(STEP // 32):
            if CODES and (b * 32) % GROUP == 0:
                offsets = ()
                scales = ()
                for i in tl.static_range(T):
                    pair = here[each * i + scales_at + a_group * (b * 32 // GROUP)]
                    if ZEROS:
                        offsets = offsets + twice(here[each * i + scales_at + 2 * (b * 32 // GROUP) + 1])
                    else:
                        offsets = offsets + _same(MIDDLE0, MIDDLE1, THREADS)
                    scales = scales + (twice(pair) if SCALED else _floats(pair, BF16))
                if not SCALED:
                    part = zeros(4 * T * NT, THREADS)
            if AHEAD_X:
                xs = coming_x
                if b * 32 + 32 < STEP:
                    coming_x = read_x(pairs_of_x, block, M, steps, step, b + 1, lane, SPARSE, STEP, ARRANGED, NT)
                else:
                    coming_x = read_x(pairs_of_x, block, M, steps, step + WAYS, 0, lane, SPARSE, STEP, ARRANGED, NT)
            else:
                xs = read_x(pairs_of_x, block, M, steps, step, b, lane, SPARSE, STEP, ARRANGED, NT)
            after = ()
            for i in tl.static_range(T):
                mine = part[4 * NT * i : 4 * NT * (i + 1)]
                if SPARSE:
                    if CODES:
                        a = decode(here[each * i + b], offsets[2 * i], offsets[2 * i + 1], one, BF16)
                        if SCALED:
                            a = _times(a, scales[2 * i], scales[2 * i + 1], BF16)
                    else:
                        a = here[each * i + 4 * b : each * i + 4 * b + 4]
                    where = here[each * i + words_of_tile + b // 2]
                    for j in tl.static_range(NT):
                        after = after + _mma_sparse(
                            a, xs[4 * j : 4 * j + 4], mine[4 * j : 4 * j + 4], where, b % 2, BF16
                        )
                else:
                    a = decode(here[each * i + 2 * b], offsets[2 * i], offsets[2 * i + 1], one, BF16)
                    c = decode(here[each * i + 2 * b + 1], offsets[2 * i], offsets[2 * i + 1], one, BF16)
                    if SCALED:
                        a = _times(a, scales[2 * i], scales[2 * i + 1], BF16)
                        c = _times(c, scales[2 * i], scales[2 * i + 1], BF16)
                    for j in tl.static_range(NT):
                        d = _mma(a, xs[4 * j], xs[4 * j + 1], mine[4 * j : 4 * j + 4], BF16)
                        after = after + _mma(c, xs[4 * j + 2], xs[4 * j + 3], d, BF16)
            part = after
            if CODES and not SCALED and (b * 32 + 32) % GROUP == 0:
                after = ()
                for i in tl.static_range(T):
                    for j in tl.static_range(NT):
                        after = after + _scaled(total, part, scales[2 * i], scales[2 * i + 1], 4 * (NT * i + j))
                total = after
        if SCALED or not CODES:
            total = part
    if RANK:
        two = tl.arange(0, 2)[None, :]
        pairs_of_dx = dx.to(tl.pointer_type(tl.int32))
        for turn in tl.range(0, tl.cdiv(rank, WAYS)):
            column = turn * WAYS + way
            there = column < rank
            after = ()
            for i in tl.static_range(T):
                place = (up + ((tile + i) * rank + column) * 128 + lane * 4)[:, None] + four
                a = quarters(tl.load(place, mask=there[:, None], other=0))
                for j in tl.static_range(NT):
                    start = tl.minimum(8 * (block + j) + g, M - 1) * (rank * 8)
                    place = (pairs_of_dx + start + column * 8 + 2 * t)[:, None] + two
                    d = tl.split(tl.load(place, mask=there[:, None], other=0))
                    o = total[4 * (NT * i + j) : 4 * (NT * i + j + 1)]
                    after = after + _mma(a, d[0], d[1], o, BF16)
            total = after
    if ONCE:
        if AHEAD > 1:
            arrived(thread, 0)
        else:
            own = room(thread, THREADS * 16 * FOURS)
        number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        mine = (number * SPLIT + tl.program_id(2)) * (T * NT * 32 * ACROSS) + across * 32 + lane  # fours of sums
        for some in tl.static_range(0, T * NT, FOURS):
            if AHEAD > 1 or some > 0:
                tl.debug_barrier()
            for i in tl.static_range(some, min(some + FOURS, T * NT)):
                keep(own + thread * 16 + (i - some) * (THREADS * 16), total[4 * i : 4 * i + 4])
            tl.debug_barrier()
            for turn in tl.static_range((FOURS + ALONG - 1) // ALONG):  # warps along columns share the fours
                place = turn * ALONG + along
                four = some + place
                at = own + tl.minimum(place, FOURS - 1) * (THREADS * 16) + (across * 32 + lane) * 16
                sums = zeros(4, THREADS)
                for other in tl.static_range(ALONG):
                    sums = added(sums, shared(at, 4, other * (ACROSS * 512)))
                there = (place < FOURS) & (four < T * NT)
                if SPLIT > 1:
                    put(partial + (mine + tl.minimum(four, T * NT - 1) * (32 * ACROSS)) * 4, words_of(sums), there)
                else:
                    store(y, sums, tile, block, four, there, lane, M, N, NT)
        if SPLIT > 1:  # the last that is done adds all, in order
            tl.debug_barrier()
            if tl.atomic_add(counters + number, 1) == SPLIT - 1:
                first = number * SPLIT * (T * NT * 32 * ACROSS) + across * 32 + lane
                add_programs(y, partial + first * 4, tile, block, along, lane, M, N, NT, T, ACROSS, ALONG, SPLIT)
    else:
        place = tl.arange(0, 32 * ACROSS)
        first = tl.minimum((tl.program_id(0) * ACROSS + place // 32) * T, tiles - T) * 16 + place % 32 // 4
        row = block * 8 + 2 * (place % 4)
        for i in tl.static_range(T):
            for j in tl.static_range(NT):
                for r in tl.static_range(4):
                    sums = tl.sum(tl.reshape(total[4 * (NT * i + j) + r], (ALONG, 32 * ACROSS)), 0)
                    n = first + 16 * i + 8 * (r // 2)
                    m = row + 8 * j + r % 2
                    tl.store(y + m.to(tl.int64) * N + n, sums.to(y.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit(do_not_specialize=["M", "columns", "blocks", "eights"])
def arrange_kernel(x, made, counters, M, columns, blocks, eights, SPARSE: tl.constexpr, BLOCK: tl.constexpr,
                   COUNTERS: tl.constexpr, EARLY: tl.constexpr, DEPENDENT: tl.constexpr):  # fmt: skip
    """Rows x (M, columns) of pairs → (programs, blocks of 32 columns, eights of rows, 32 lanes, 4), filled up with 0.

    The eights of rows of a program are beside each other, so that it needs one pointer for all. `EARLY`: the product
    may begin to read W while the kernel before this one still runs. It waits for this one, and so for both. So many
    `counters` of it are set to 0.
    """
    if DEPENDENT:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
        if not EARLY:
            gdc_launch_dependents()
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if COUNTERS:
        counter = tl.program_id(1) * tl.num_programs(0) * BLOCK + number
        tl.store(counters + counter, tl.zeros((BLOCK,), tl.int32), mask=counter < COUNTERS)
    block, lane, r = number // 128, number // 4 % 32, number % 4
    row, t = tl.program_id(1) * 8 + lane // 4, lane % 4
    column = block * 16 + (4 * r + t if SPARSE else 4 * t + r)
    pairs = x.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * columns + column
    value = tl.load(pairs, mask=(row < M) & (column < columns), other=0)
    program, eight = tl.program_id(1) // eights, tl.program_id(1) % eights
    place = (program.to(tl.int64) * blocks + block) * (eights * 128) + eight * 128 + number % 128
    tl.store(made.to(tl.pointer_type(tl.int32)) + place, value, mask=block < blocks)


@triton.jit(do_not_specialize=["columns", "blocks"])
def order_kernel(x, made, columns, blocks, SPARSE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """Rows x (M, columns) of pairs → (M, blocks of 32 columns), filled up with 0: in each the columns of fragments.

    Lane t has the columns 8 t to 8 t + 7 of a dense W, of 2:4 every four of 16 columns.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    block, word, half, t = number // 16, number // 8 % 2, number // 4 % 2, number % 4
    column = block * 16 + (8 * word + 2 * t + half if SPARSE else 4 * t + 2 * word + half)
    row = tl.program_id(1).to(tl.int64)
    value = tl.load(x.to(tl.pointer_type(tl.int32)) + row * columns + column, mask=column < columns, other=0)
    tl.store(made.to(tl.pointer_type(tl.int32)) + row * (blocks * 16) + number, value, mask=block < blocks)


@triton.jit(do_not_specialize=["tiles", "steps"])
def weight_kernel(words, positions, scale, offset, w, tiles, steps,
                  CODES: tl.constexpr, SPARSE: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
                  BF16: tl.constexpr, ZEROS: tl.constexpr, MIDDLE0: tl.constexpr, MIDDLE1: tl.constexpr,
                  DEPENDENT: tl.constexpr):  # fmt: skip
    """The weight (16 tiles, STEP · steps) halves, a tile and a step a program."""
    lane = tl.arange(0, 32)
    g, t = lane // 4, lane % 4
    tile, step = tl.program_id(1), tl.program_id(0)
    here = read(words, positions, scale, offset, tile, tiles, steps, step, lane,
                 CODES, SPARSE, ZEROS, GROUP, STEP, 1, True)  # fmt: skip
    words_of_tile: tl.constexpr = (STEP // 32 if CODES else STEP // 8) if SPARSE else STEP // 16
    at: tl.constexpr = words_of_tile + (STEP // 64 if SPARSE else 0)
    row = (tile * 16 + g).to(tl.int64) * (steps * STEP)
    if DEPENDENT:  # which may still read what was in the memory of w
        gdc_wait()
        gdc_launch_dependents()
    four = tl.arange(0, 4)[None, :]
    for b in tl.static_range(STEP // 32):
        if CODES and (b * 32) % GROUP == 0:
            if ZEROS:
                scales = twice(here[at + 2 * (b * 32 // GROUP)])
                offsets = twice(here[at + 2 * (b * 32 // GROUP) + 1])
            else:
                scales = twice(here[at + b * 32 // GROUP])
                offsets = _same(MIDDLE0, MIDDLE1, 32)
        column = step * STEP + b * 32
        if SPARSE:
            if CODES:
                a = _times(decode(here[b], offsets[0], offsets[1], 0x3F803F80, BF16), scales[0], scales[1], BF16)
            else:
                a = here[4 * b : 4 * b + 4]
            wide = w.to(tl.pointer_type(tl.int64))
            for r in tl.static_range(4):
                place = (
                    ((tile * steps + step) * (STEP // 128) + b // 4) * 64
                    + (4 * g + 2 * (b % 2) + r // 2) * 2
                    + b // 2 % 2
                )
                two = (tl.load(positions + place) >> (16 * (r % 2) + 4 * t)) & 15
                low, high = (a[r] & 0xFFFF).to(tl.int64), (a[r] >> 16 & 0xFFFF).to(tl.int64)
                value = (low << (16 * (two & 3)).to(tl.int64)) | (high << (16 * (two >> 2)).to(tl.int64))
                tl.store(wide + (row + 8 * (r % 2) * (steps * STEP) + column + 16 * (r // 2)) // 4 + t, value)
        else:
            a = _times(decode(here[2 * b], offsets[0], offsets[1], 0x3F803F80, BF16), scales[0], scales[1], BF16)
            c = _times(decode(here[2 * b + 1], offsets[0], offsets[1], 0x3F803F80, BF16), scales[0], scales[1], BF16)
            for r in tl.static_range(2):
                value = tl.join(tl.join(a[r], c[r]), tl.join(a[2 + r], c[2 + r]))
                place = (row + 8 * r * (steps * STEP) + column) // 2 + 4 * t
                tl.store((w.to(tl.pointer_type(tl.int32)) + place)[:, None] + four, tl.reshape(value, (32, 4)))
