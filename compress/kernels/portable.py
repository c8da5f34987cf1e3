"""y = x Wᵀ in plain Triton for packed W: codes of 4 bits, 2:4, or both. No instruction of one vendor's GPUs is in it.

W is read as `compress.kernels.fragments` laid it out, several numbers of a word at once (SWAR). What 2:4 left out is
put back before the product: masks, one bit for each column, move a pair of kept numbers to its places, so that `tl.dot`
multiplies a dense tile. Codes are or-ed into the mantissa of 16.0, which makes them 16 + code exactly; where nothing
was kept stands 16 + zero. What is too much is taken back from the sums of a group, by the sums of x that come with it:

    y_mn = Σ_g s_ng (Σ_k (16 + c_nk) x_mk − (16 + z_ng) Σ_k x_mk)

The columns of x are in the order in which lanes hold W (`product.order_kernel`). With Triton 3.9 W goes from memory to
the registers of the product; 3.6 takes it through shared memory, at up to twice the instructions.
"""

# ruff: noqa: RET505, RUF005, SIM300 (Triton compiles what is not returned from, and adds tuples; HALF is no constant)

from __future__ import annotations

import triton
import triton.language as tl

INTEGERS = ["M", "N", "tiles", "steps"]
PAIR = tl.constexpr(0x00010001)
NIBBLES = tl.constexpr(0x11111111)


@triton.jit
def _halves(pair, HALF: tl.constexpr):
    """Pairs (…) → (…, 2)."""
    low = pair.to(tl.int16).to(HALF, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(HALF, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _right(word, BY: tl.constexpr):
    """Shifted right, filled with 0; to the left where BY is negative."""
    if BY > 0:
        return (word.to(tl.uint32, bitcast=True) >> BY).to(tl.int32, bitcast=True)
    elif BY < 0:
        return word << -BY
    else:
        return word


@triton.jit
def _numbers(word, magic, NUMBER: tl.constexpr, HALF: tl.constexpr):
    """Pair NUMBER of the codes of a word as 16 + code: (…) → (…, 2)."""
    if HALF == tl.float16:
        return _halves((_right(word, 4 * NUMBER - 6) & 0x03C003C0) | magic, HALF)
    else:
        return _halves((_right(word, 4 * NUMBER - 3) & 0x00780078) | magic, HALF)


@triton.jit
def _of_word(word, magic, HALF: tl.constexpr):
    """The eight codes of a word as numbers: (…) → (…, pair, row half, column half)."""
    top = tl.join(_numbers(word, magic, 0, HALF), _numbers(word, magic, 1, HALF))
    bottom = tl.join(_numbers(word, magic, 2, HALF), _numbers(word, magic, 3, HALF))
    return tl.join(top, bottom)


@triton.jit
def _moved(pairs, first, second, empty):
    """Kept pairs of every four columns → what is in the first two of the four, and in the last two.

    `first` and `second` have all bits of a number's place: of the low one if column 0 (2) was kept, of the high one if
    column 1 (3) was. The first of a pair is in column 1 where column 0 was not kept, the second in column 2 where
    column 3 was not. Elsewhere is `empty`.
    """
    swapped = _right(pairs, 16) | (pairs << 16)
    stay = (first << 16) | 0xFFFF  # low: the first is in its place; high: the second, if column 0 was kept
    left = ((pairs & stay) | (swapped & ~stay)) & first | (empty & ~first)
    stay = _right(second, 16) | -65536  # high: the second is in its place; low: the first, if column 3 was kept
    right = ((pairs & stay) | (swapped & ~stay)) & second | (empty & ~second)
    return left, right


@triton.jit
def _read(words, kept, tile, steps, step, lane, CODES: tl.constexpr, SPARSE: tl.constexpr, STEP: tl.constexpr):
    """What a lane needs of W in a step: words by fours, of 64 columns, of 128 of 2:4 or of 32 of its values; masks."""
    at = tile * steps + step  # (BN/16, 1)
    four = tl.arange(0, 4)[None, None, :]
    each: tl.constexpr = (STEP // 128 if CODES else STEP // 32) if SPARSE else STEP // 64
    found = ()
    for c in tl.static_range(each):
        found = found + (tl.load(words + ((at * each + c) * 128 + lane * 4)[:, :, None] + four),)
    if SPARSE:
        two = tl.arange(0, 2)[None, None, :]
        found = found + tl.split(tl.load(kept + (at * 64 + lane * 2)[:, :, None] + two))
    return found


@triton.jit
def _planes(read, AT: tl.constexpr, BLOCK: tl.constexpr):
    """Whether columns 0 and 1 of every four were kept, and columns 2 and 3: the lowest bits of two words' numbers."""
    bits = read[AT + BLOCK // 2]
    return _right(bits, BLOCK % 2 * 2) & NIBBLES, _right(bits, BLOCK % 2 * 2 + 1) & NIBBLES


@triton.jit
def _four(v):
    """(…, 4) → four of (…)"""
    even, odd = tl.split(tl.reshape(v, (v.shape[0], v.shape[1], 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def _tile(read, empty, magic, ones, CHUNK: tl.constexpr, CODES: tl.constexpr, SPARSE: tl.constexpr,
          WIDTH: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """WIDTH columns from CHUNK · WIDTH on of a step: (BN, WIDTH) numbers, 16 + code or a value. WIDTH is 32 or 64."""
    if not SPARSE:
        word = read[CHUNK * WIDTH // 64]
        if WIDTH == 32:
            four = _four(word)
            word = tl.join(four[CHUNK % 2 * 2], four[CHUNK % 2 * 2 + 1])
        a = tl.reshape(_of_word(word, magic, HALF), (BN // 16, 8, 4, WIDTH // 16, 2, 2, 2))
        return tl.reshape(tl.permute(a, (0, 5, 1, 3, 6, 2, 4)), (BN, WIDTH))
    else:
        if WIDTH == 32:
            a = _block(read, empty, magic, ones, CHUNK, CODES, BN, HALF)
        else:
            a = tl.join(
                _block(read, empty, magic, ones, 2 * CHUNK, CODES, BN, HALF),
                _block(read, empty, magic, ones, 2 * CHUNK + 1, CODES, BN, HALF),
            )
        # tile, g, t, pair, row half, 16 columns, column half, 32 columns
        a = tl.reshape(a, (BN // 16, 8, 4, 2, 2, 2, 2, WIDTH // 32))
        return tl.reshape(tl.permute(a, (0, 4, 1, 7, 5, 6, 2, 3)), (BN, WIDTH))


@triton.jit
def _block(read, empty, magic, ones, BLOCK: tl.constexpr, CODES: tl.constexpr, BN: tl.constexpr, HALF: tl.constexpr):
    """32 columns of 2:4: (BN/16, 32, pair, row half, 16 columns, column half)."""
    first, second = _planes(read, 1 if CODES else 4, BLOCK)
    if CODES:
        left, right = _moved(_four(read[0])[BLOCK], first * ones, second * ones, empty)
        return tl.join(_of_word(left, magic, HALF), _of_word(right, magic, HALF))
    else:
        columns0, columns1 = tl.split(tl.permute(tl.reshape(read[BLOCK], (BN // 16, 32, 2, 2)), (0, 1, 3, 2)))
        a = tl.join(_values(columns0, first, second, ones, 0, HALF), _values(columns1, first, second, ones, 2, HALF))
        return tl.permute(a, (0, 1, 2, 3, 5, 4))


@triton.jit
def _values(pairs, first, second, ones, NUMBER: tl.constexpr, HALF: tl.constexpr):
    """16 columns of values of the rows g and g + 8: (BN/16, 32, row half) → (…, pair, row half, column half)."""
    row0, row1 = tl.split(pairs)
    left0, right0 = _spread(row0, first, second, ones, NUMBER, HALF)
    left1, right1 = _spread(row1, first, second, ones, NUMBER + 1, HALF)
    return tl.join(tl.join(left0, left1), tl.join(right0, right1))


@triton.jit
def _spread(pairs, first, second, ones, NUMBER: tl.constexpr, HALF: tl.constexpr):
    here, there = _right(first, 4 * NUMBER) & PAIR, _right(second, 4 * NUMBER) & PAIR
    left, right = _moved(pairs, here * ones, there * ones, tl.zeros_like(pairs))
    return _halves(left, HALF), _halves(right, HALF)


@triton.jit
def _constants(zero, CODES: tl.constexpr, HALF: tl.constexpr):
    """16.0 twice, and the bits of a number. `zero` is 0, which the compiler must not know.

    Or-ing with a register, and multiplying by one, is one instruction, with a number that it knows often two.
    """
    magic = (0x4C004C00 if HALF == tl.float16 else 0x41804180) ^ zero
    if CODES:
        return magic, 15
    else:
        return magic, 0xFFFF ^ zero


@triton.jit
def _empty(zeros, group, tiles, tile, lane, ZEROS: tl.constexpr, BN: tl.constexpr):
    """The zero-points of the rows g and g + 8 in all places of a word."""
    if ZEROS:
        return tl.load(zeros + group * (tiles * 8) + tile * 8 + lane // 4)
    else:
        return tl.full((BN // 16, 32), -0x77777778, tl.int32)


@triton.jit
def _scale(scale, zeros, group, tiles, n, HALF: tl.constexpr, ZEROS: tl.constexpr):
    """The scales of rows, and 16 + zero."""
    pair, upper = group * (tiles * 8) + tl.minimum(n // 16, tiles - 1) * 8 + n % 8, n // 8 % 2
    s = tl.load(scale.to(tl.pointer_type(HALF)) + pair * 2 + upper).to(tl.float32)
    if ZEROS:
        return s, (16 + ((tl.load(zeros + pair) >> (4 * upper)) & 15)).to(tl.float32)
    else:
        return s, tl.full(n.shape, 24.0, tl.float32)


@triton.jit(do_not_specialize=INTEGERS)
def portable_kernel(
    x,  # (M, STEP · steps) halves, ordered
    sums,  # (M, groups) float32: of x; where there are codes
    words,
    kept,  # masks; where W is 2:4
    scale,
    zeros,  # where they are not 8
    y,  # (M, N) halves
    M,
    N,
    tiles,
    steps,
    CODES: tl.constexpr,
    SPARSE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    ZEROS: tl.constexpr,
    BM: tl.constexpr,  # rows of x
    BN: tl.constexpr,  # rows of W
    STAGES: tl.constexpr,
):
    """A tile (BN, BM) of W xᵀ."""
    HALF: tl.constexpr = x.dtype.element_ty
    WIDTH: tl.constexpr = 32 if GROUP == 32 else 64
    GROUPS: tl.constexpr = STEP // GROUP
    across = tl.cdiv(M, BM)
    block, rows = tl.program_id(0) // across, tl.program_id(0) % across
    tile = tl.minimum(block * (BN // 16) + tl.arange(0, BN // 16), tiles - 1)[:, None]
    lane = tl.arange(0, 32)[None, :]
    n = block * BN + tl.arange(0, BN)
    m = rows * BM + tl.arange(0, BM)
    row = tl.minimum(m, M - 1).to(tl.int64)
    at = x + row[None, :] * (steps * STEP) + tl.arange(0, WIDTH)[:, None]
    magic, ones = _constants(M >> 31, CODES, HALF)
    total = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        read = _read(words, kept, tile, steps, step, lane, CODES, SPARSE, STEP)
        for q in tl.static_range(GROUPS):
            group = step * GROUPS + q
            empty = _empty(zeros, group, tiles, tile, lane, ZEROS and SPARSE, BN)
            part = tl.zeros((BN, BM), tl.float32) if CODES else total
            for c in tl.static_range(GROUP // WIDTH):
                a = _tile(read, empty, magic, ones, q * (GROUP // WIDTH) + c,
                          CODES, SPARSE, WIDTH, BN, HALF)  # fmt: skip
                part = tl.dot(a, tl.load(at + step * STEP + (q * GROUP + c * WIDTH)), part)
            if CODES:
                s, z = _scale(scale, zeros, group, tiles, n, HALF, ZEROS)
                of_x = tl.load(sums + row * (steps * GROUPS) + group)
                total += (part - z[:, None] * of_x[None, :]) * s[:, None]
            else:
                total = part
    out = m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y + out, total.to(HALF), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["tiles", "steps"])
def portable_weight_kernel(words, kept, scale, zeros, w, tiles, steps,
                           CODES: tl.constexpr, SPARSE: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
                           ZEROS: tl.constexpr):  # fmt: skip
    """The weight (16 tiles, STEP · steps) halves, rounded once; 16 rows and a step a program."""
    HALF: tl.constexpr = w.dtype.element_ty
    WIDTH: tl.constexpr = 32 if GROUP == 32 else 64
    step = tl.program_id(0)
    tile = (tl.program_id(1) + tl.arange(0, 1))[:, None]
    lane = tl.arange(0, 32)[None, :]
    n = tl.program_id(1) * 16 + tl.arange(0, 16)
    k = tl.arange(0, WIDTH)
    half, t, pair = k // 8 % 2, k // 2 % 4, k % 2
    column = (
        k // 16 * 16 + 4 * t + 2 * half + pair if SPARSE else k // 32 * 32 + 8 * t + k // 16 % 2 * 4 + 2 * half + pair
    )
    magic, ones = _constants(steps >> 31, CODES, HALF)
    read = _read(words, kept, tile, steps, step, lane, CODES, SPARSE, STEP)
    for chunk in tl.static_range(STEP // WIDTH):
        group = step * (STEP // GROUP) + chunk * WIDTH // GROUP
        empty = _empty(zeros, group, tiles, tile, lane, ZEROS and SPARSE, 16)
        a = _tile(read, empty, magic, ones, chunk, CODES, SPARSE, WIDTH, 16, HALF)
        if CODES:
            s, z = _scale(scale, zeros, group, tiles, n, HALF, ZEROS)
            a = ((a.to(tl.float32) - z[:, None]) * s[:, None]).to(HALF)
        place = n[:, None].to(tl.int64) * (steps * STEP) + step * STEP + chunk * WIDTH + column[None, :]
        tl.store(w + place, a)
