"""What a program of `compress.kernels.product` reads of W and of x, and when.

A step of W, 16 rows and some columns for each tile of a warp, is loaded into registers, or copied to shared memory many
steps before it is multiplied: what is on its way there takes no registers. Each thread copies what it will use itself,
so nobody waits for another.
"""

# ruff: noqa: RUF005 (Triton adds tuples)

from __future__ import annotations

import triton
import triton.language as tl

from compress.kernels.instructions import copy, shared, together


@triton.jit
def zeros(COUNT: tl.constexpr, THREADS: tl.constexpr):
    """So many sums of nothing yet."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros((THREADS,), tl.float32),)
    return found


@triton.jit
def quarters(v):
    """(threads, 4) → four of (threads,)"""
    even, odd = tl.split(tl.reshape(v, (v.shape[0], 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def read(words, positions, scale, offset, tile, tiles, steps, step, lane,
          CODES: tl.constexpr, SPARSE: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
          T: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """What a lane needs of W in a step, of each of its tiles: words, positions, pairs of scales, pairs of offsets."""
    four = tl.arange(0, 4)[None, :]
    two = tl.arange(0, 2)[None, :]
    within = step if EVEN else tl.minimum(step, steps - 1)
    each: tl.constexpr = (STEP // 128 if CODES else STEP // 32) if SPARSE else STEP // 64
    found = ()
    for i in tl.static_range(T):  # in each place, first what is the same in all steps, last what the compiler knows
        at = (tile + i) * steps
        for c in tl.static_range(each):
            place = (words + (at * (each * 128) + lane * 4) + within * (each * 128))[:, None] + (four + c * 128)
            if EVEN or CODES:
                found = found + quarters(tl.load(place, cache_modifier=".cg"))
            else:
                found = found + quarters(tl.load(place, mask=(step < steps)[:, None], other=0, cache_modifier=".cg"))
        if SPARSE:
            for c in tl.static_range(STEP // 128):
                place = (positions + (at * (STEP // 2) + lane * 2) + within * (STEP // 2))[:, None] + (two + c * 64)
                found = found + tl.split(tl.load(place, cache_modifier=".cg"))
        if CODES:
            for q in tl.static_range(STEP // GROUP):
                place = ((tile + i) * 8 + lane // 4) + (within * (STEP // GROUP) + q) * (tiles * 8)
                if EVEN:
                    found = found + (tl.load(scale + place),)
                else:
                    found = found + (tl.load(scale + place, mask=step < steps, other=0),)
                if ZEROS:
                    found = found + (tl.load(offset + place),)
    return found


@triton.jit
def begin(base, words, positions, scale, offset, tile, tiles, steps, step, lane,
          CODES: tl.constexpr, SPARSE: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
          T: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Begin to copy what `take` reads; of a step that is not there zeros, but positions that there may be."""
    there = step < steps
    each: tl.constexpr = (STEP // 128 if CODES else STEP // 32) if SPARSE else STEP // 64
    more: tl.constexpr = STEP // 128 if SPARSE else 0
    size: tl.constexpr = each * 512 + more * 256 + ((STEP // GROUP * (256 if ZEROS else 128)) if CODES else 0)
    for i in tl.static_range(T):
        at = (tile + i) * steps + step
        for c in tl.static_range(each):
            copy(base + lane * 16, words + (at * (each * 128) + lane * 4), there, 16, i * size + c * 512, c * 512)
        for c in tl.static_range(more):
            if EVEN:
                place = positions + (at * (STEP // 2) + lane * 2)
            else:
                place = positions + (((tile + i) * steps + tl.minimum(step, steps - 1)) * (STEP // 2) + lane * 2)
            copy(base + lane * 8, place, there if EVEN else step >= 0, 8, i * size + each * 512 + c * 256, c * 256)
        if CODES:
            for q in tl.static_range(STEP // GROUP):
                place = ((tile + i) * 8 + lane // 4) + (step * (STEP // GROUP) + q) * (tiles * 8)
                if ZEROS:
                    copy(base + lane * 4, scale + place, there, 4, i * size + each * 512 + more * 256 + q * 256, 0)
                    copy(
                        base + lane * 4, offset + place, there, 4, i * size + each * 512 + more * 256 + q * 256 + 128, 0
                    )
                else:
                    copy(base + lane * 4, scale + place, there, 4, i * size + each * 512 + more * 256 + q * 128, 0)
    together(lane)


@triton.jit
def take(base, lane, CODES: tl.constexpr, SPARSE: tl.constexpr, ZEROS: tl.constexpr, GROUP: tl.constexpr,
          STEP: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """What `read` gives, from shared memory."""
    each: tl.constexpr = (STEP // 128 if CODES else STEP // 32) if SPARSE else STEP // 64
    more: tl.constexpr = STEP // 128 if SPARSE else 0
    size: tl.constexpr = each * 512 + more * 256 + ((STEP // GROUP * (256 if ZEROS else 128)) if CODES else 0)
    found = ()
    for i in tl.static_range(T):
        for c in tl.static_range(each):
            found = found + shared(base + lane * 16, 4, i * size + c * 512)
        for c in tl.static_range(more):
            found = found + shared(base + lane * 8, 2, i * size + each * 512 + c * 256)
        if CODES:
            for q in tl.static_range(STEP // GROUP * (2 if ZEROS else 1)):
                found = found + shared(base + lane * 4, 1, i * size + each * 512 + more * 256 + q * 128)
    return found


@triton.jit
def read_x(x, block, M, steps, step, b, lane, SPARSE: tl.constexpr, STEP: tl.constexpr, ARRANGED: tl.constexpr,
            NT: tl.constexpr):  # fmt: skip
    """What a lane needs of x for 32 columns: four pairs of each eight rows."""
    four = tl.arange(0, 4)[None, :]
    within = tl.minimum(step, steps - 1)
    found = ()
    for j in tl.static_range(NT):  # what is known when it compiles comes last: it becomes the load's own offset
        if ARRANGED:
            place = x + (block * (steps * (STEP * 4)) + lane * 4) + within * (STEP * 4 * NT)
            found = found + quarters(tl.load(place[:, None] + (four + (b * NT + j) * 128)))
        else:
            row = tl.minimum(8 * (block + j) + lane // 4, M - 1)
            place = x + (row * (steps * (STEP // 2)) + lane % 4 * (1 if SPARSE else 4)) + within * (STEP // 2)
            if SPARSE:
                for r in tl.static_range(4):
                    found = found + (tl.load(place + (b * 16 + 4 * r)),)
            else:
                found = found + quarters(tl.load(place[:, None] + (four + b * 16)))
    return found
