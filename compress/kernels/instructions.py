"""The instructions of a GPU that the kernels are made of: one value of each tensor is in one thread of a program.

Triton lets PTX stand where an elementwise operation stands. A tensor of exactly one value per thread, its last
digits the lane of a warp, can have one layout only, so that an instruction of a whole warp may be such an operation, too:
its operands are what the lanes hold. `compress.kernels.aot` reads from the compiled kernels that no other layout came
of it. All are of the PTX ISA, sections "mma", "mma.sp" (with `.ordered_metadata`, PTX 8.5), "lop3", "prmt" and "fma".

A pair is two halves, float16 or bfloat16, in an int32, the first one low. Of a lane, g is lane // 4 and t lane % 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ruff: noqa: E501 (a line is an instruction)


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, BF16: tl.constexpr):
    """A (16, 16) B (16, 8) + C (16, 8), float32: four values of C.

    Lane (g, t) gives of A the pairs of row g, columns 2 t (a0) and 2 t + 8 (a2), and of row g + 8 (a1, a3); of B those
    of column g, rows 2 t and 2 t + 8. It has of C row g, columns 2 t and 2 t + 1, then row g + 8.
    """
    if BF16:
        asm: tl.constexpr = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    else:
        asm: tl.constexpr = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return tl.inline_asm_elementwise(
        asm,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def mma_sparse(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, positions, ODD: tl.constexpr, BF16: tl.constexpr):
    """A (16, 32) B (32, 8) + C (16, 8), where of every four columns of a row of A two are given.

    A is as in `mma`, of the 16 given columns; B has pairs at rows 2 t, 2 t + 8, 2 t + 16 and 2 t + 24. The positions are
    those of the lanes with t // 2 = ODD: in the low half of row g, in the high one of row g + 8, four bits for every four
    columns: the first 16 columns where t is even, the last where it is odd.
    """
    if BF16:
        if ODD:
            asm: tl.constexpr = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, 0x1;"
        else:
            asm: tl.constexpr = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, 0x0;"
    else:
        if ODD:
            asm: tl.constexpr = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, 0x1;"
        else:
            asm: tl.constexpr = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, 0x0;"
    return tl.inline_asm_elementwise(
        asm,
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
        [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, positions],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def decode(word, offset0, offset1, one, BF16: tl.constexpr):
    """Eight codes of four bits as four pairs code − zero, exactly: bits 4 i and 16 + 4 i are pair i.

    Or-ed into the mantissa of 1024.0 (128.0 in bfloat16), a code is a number; its offset −(1024 + zero) is added. The odd
    pairs of float16 are read four bits higher, as sixteenfold codes: times 1/16, and their offset is −(64 + zero).
    Pairs 0 and 2 have the offsets `offset0`, the others `offset1`. `one` is a pair of ones, for bfloat16: as a number that
    the compiler knows it was put together anew for each product on sm_80, as an argument of the kernel it stays.
    """
    if BF16:
        asm: tl.constexpr = """{
        .reg .b32 s1, s2, s3, t0, t1, t2, t3;
        shr.u32 s1, $4, 4; shr.u32 s2, $4, 8; shr.u32 s3, $4, 12;
        lop3.b32 t0, $4, 0x000f000f, 0x43004300, 0xea; lop3.b32 t1, s1, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 t2, s2, 0x000f000f, 0x43004300, 0xea; lop3.b32 t3, s3, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, t0, $7, $5; fma.rn.bf16x2 $1, t1, $7, $6;
        fma.rn.bf16x2 $2, t2, $7, $5; fma.rn.bf16x2 $3, t3, $7, $6; }"""
    else:
        asm: tl.constexpr = """{
        .reg .b32 s, t0, t1, t2, t3, sixteenth;
        mov.b32 sixteenth, 0x2c002c00;
        shr.u32 s, $4, 8;
        lop3.b32 t0, $4, 0x000f000f, 0x64006400, 0xea; lop3.b32 t1, $4, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 t2, s, 0x000f000f, 0x64006400, 0xea; lop3.b32 t3, s, 0x00f000f0, 0x64006400, 0xea;
        add.f16x2 $0, t0, $5; fma.rn.f16x2 $1, t1, sixteenth, $6;
        add.f16x2 $2, t2, $5; fma.rn.f16x2 $3, t3, sixteenth, $6; }"""
    return tl.inline_asm_elementwise(
        asm,
        "=r,=r,=r,=r,r,r,r,r",
        [word, offset0, offset1, one],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def times(a, b, BF16: tl.constexpr):
    """The products of two pairs, rounded."""
    if BF16:  # mul of bfloat16 is of sm_90 on; plus −0 it is the same
        asm: tl.constexpr = "{ .reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none; }"
    else:
        asm: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def awaited(total):
    """The same sums, used by what is no product: Triton has the products that add to them end before it."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def twice(pair):
    """A pair (p, q) → the pairs (p, p) and (q, q)."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;",
        "=&r,=r,r",
        [pair],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
