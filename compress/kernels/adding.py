"""How `compress.kernels.product` adds the sums of warps, and of programs, that share the columns of W, and stores them.

Four sums of a lane are what `mma` has of a tile of 16 rows of W and eight rows of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.reading import quarters, zeros


@triton.jit
def added(sums, words):
    """Four sums and four more, which came as words."""
    return (
        sums[0] + words[0].to(tl.float32, bitcast=True),
        sums[1] + words[1].to(tl.float32, bitcast=True),
        sums[2] + words[2].to(tl.float32, bitcast=True),
        sums[3] + words[3].to(tl.float32, bitcast=True),
    )


@triton.jit
def words_of(sums):
    """Four sums as words."""
    return (
        sums[0].to(tl.int32, bitcast=True),
        sums[1].to(tl.int32, bitcast=True),
        sums[2].to(tl.int32, bitcast=True),
        sums[3].to(tl.int32, bitcast=True),
    )


@triton.jit
def store(y, sums, tile, block, four, there, lane, M, N, NT: tl.constexpr):
    """Four sums of a tile and eight rows of x, as `mma` has them."""
    n = (tile + four // NT) * 16 + lane // 4
    m = (block + four % NT) * 8 + lane % 4 * 2
    for r in tl.static_range(4):
        inside = there & (m + r % 2 < M) & (n + 8 * (r // 2) < N)
        tl.store(y + (m + r % 2).to(tl.int64) * N + (n + 8 * (r // 2)), sums[r].to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_programs(y, partial, tile, block, along, lane, M, N, NT: tl.constexpr, T: tl.constexpr, ACROSS: tl.constexpr,
                  ALONG: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """What programs that share the columns have put there, for this lane of one of them."""
    for turn in tl.static_range((T * NT + ALONG - 1) // ALONG):
        four = turn * ALONG + along
        place = partial.to(tl.pointer_type(tl.int32)) + tl.minimum(four, T * NT - 1) * (32 * ACROSS * 4)
        sums = zeros(4, 32 * ACROSS * ALONG)
        for other in tl.static_range(SPLIT):
            at = (place + other * (T * NT * 32 * ACROSS * 4))[:, None] + tl.arange(0, 4)[None, :]
            sums = added(sums, quarters(tl.load(at, cache_modifier=".cg")))
        store(y, sums, tile, block, four, four < T * NT, lane, M, N, NT)
