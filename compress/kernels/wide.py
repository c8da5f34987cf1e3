"""y = x Wᵀ in Triton for codes of 4 bits and some hundred rows of x, on Hopper GPUs: their warp-group product.

W is read as `compress.kernels.fragments` laid it out. A step of 64 columns becomes numbers in registers, each code −
zero times its scale, rounded as the grid's `dequantize` does; that they are the first operand is left to Triton, whose
layout for it these fragments have. Each product is awaited before the next step is decoded: Triton would let it write
to registers that the tensor cores still read, which gave wrong sums on an H200. x comes through shared memory, its
columns in the fragments' order (`product.order_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.instructions import awaited, decode, times, twice


@triton.jit
def _halves(pair, HALF: tl.constexpr):
    """Pairs (…) → (…, 2)."""
    low = (pair & 0xFFFF).to(tl.int16).to(HALF, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(HALF, bitcast=True)
    return tl.join(low, high)


@triton.jit(do_not_specialize=["M", "tiles", "steps"])  # a multiple of 16 as N makes stores wide
def wide_kernel(
    x,  # (M, 64 steps) halves, ordered
    words,
    scale,
    offset,
    y,  # (M, N) halves
    M,
    N,
    tiles,
    steps,  # of 64 columns
    BF16: tl.constexpr,
    ZEROS: tl.constexpr,  # whether there are offsets
    MIDDLE0: tl.constexpr,  # the offsets where there are none
    MIDDLE1: tl.constexpr,
    GROUP: tl.constexpr,  # 64 or 128
    BM: tl.constexpr,  # rows of x
    BN: tl.constexpr,  # rows of W
    STAGES: tl.constexpr,
):
    """A tile (BN, BM) of W xᵀ."""
    HALF: tl.constexpr = x.dtype.element_ty
    across = tl.cdiv(M, BM)
    block, rows = tl.program_id(0) // across, tl.program_id(0) % across
    tile = tl.minimum(block * (BN // 16) + tl.arange(0, BN // 16), tiles - 1)[:, None]
    lane = tl.arange(0, 32)[None, :]
    k = tl.arange(0, 64)[:, None]
    m = rows * BM + tl.arange(0, BM)[None, :]
    word = words + ((tile * steps) * 128 + lane * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    pair = tile * 8 + lane // 4
    at = x + (m % M).to(tl.int64) * (steps * 64) + k  # not the last row again and again: all programs would read it
    total = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        group = step * 64 // GROUP * tiles * 8
        s0, s1 = twice(tl.load(scale + pair + group))
        if ZEROS:
            z0, z1 = twice(tl.load(offset + pair + group))
        else:
            z0, z1 = tl.full(s0.shape, MIDDLE0, tl.int32), tl.full(s0.shape, MIDDLE1, tl.int32)
        a0, a1, a2, a3 = decode(tl.load(word + step * 128), z0[:, :, None], z1[:, :, None], 0x3F803F80, BF16)
        first = tl.join(_halves(times(a0, s0[:, :, None], BF16), HALF), _halves(times(a1, s1[:, :, None], BF16), HALF))
        second = tl.join(_halves(times(a2, s0[:, :, None], BF16), HALF), _halves(times(a3, s1[:, :, None], BF16), HALF))
        a = tl.reshape(
            tl.join(first, second), (BN // 16, 8, 4, 4, 2, 2, 2)
        )  # tile, g, t, word, pair, half, column half
        a = tl.reshape(tl.permute(a, (0, 5, 1, 3, 6, 2, 4)), (BN, 64))
        total = awaited(tl.dot(a, tl.load(at + step * 64), total))
    n = block * BN + tl.arange(0, BN)[:, None]
    tl.store(y + m.to(tl.int64) * N + n, total.to(HALF), mask=(m < M) & (n < N))
