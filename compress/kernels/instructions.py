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

# ruff: noqa: E501, RET505 (a line is an instruction; Triton compiles what is not returned from)


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
def room(thread, BYTES: tl.constexpr, ALIGN: tl.constexpr = 16):
    """The address of so many bytes of shared memory, the same for each thread: of the only call in a kernel."""
    asm: tl.constexpr = f"{{ .shared .align {ALIGN} .b8 room[{BYTES}]; mov.u32 $0, room; }}"
    return tl.inline_asm_elementwise(asm, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def large_room(thread, anywhere, never, KIB: tl.constexpr):
    """As `room`, a power of 2 of KiB from 64 on less 1, at a multiple of 1024: a kernel has to ask for more than 48.

    Triton asks for what its own operations need: here for a transposition in a branch that is not taken, since `never`
    is false. Nothing else in the kernel may need shared memory.
    """
    if never:
        i, j = tl.arange(0, 2 * KIB)[:, None], tl.arange(0, 128)[None, :]
        place = anywhere.to(tl.pointer_type(tl.int32))
        tl.store(place + j * (2 * KIB) + i, tl.load(place + i * 128 + j))
    asm: tl.constexpr = "{ mov.u32 $0, global_smem; add.u32 $0, $0, 1023; and.b32 $0, $0, 0xfffffc00; }"
    return tl.inline_asm_elementwise(asm, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def copy(address, source, there, SIZE: tl.constexpr, TO: tl.constexpr, FROM: tl.constexpr):
    """Begin to copy `SIZE` bytes (4, 8 or 16) from `source` + FROM to shared memory at `address` + TO; zeros if not there.

    16 bytes go past the L1 cache.
    """
    way: tl.constexpr = "cg" if SIZE == 16 else "ca"
    asm: tl.constexpr = f"cp.async.{way}.shared.global [$1+{TO}], [$2+{FROM}], {SIZE}, $3; mov.b32 $0, 0;"
    size = tl.where(there, SIZE, 0)
    return tl.inline_asm_elementwise(
        asm, "=r,r,l,r", [address, source.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def together(thread):
    """What this thread began to copy since the last time is a group."""
    asm: tl.constexpr = "cp.async.commit_group; mov.b32 $0, 0;"
    return tl.inline_asm_elementwise(asm, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def arrived(thread, BUT: tl.constexpr):
    """Wait until this thread's groups, but for the last so many, are in shared memory, where it alone may read them."""
    asm: tl.constexpr = f"cp.async.wait_group {BUT}; mov.b32 $0, 0;"
    return tl.inline_asm_elementwise(asm, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def shared(address, WORDS: tl.constexpr, AT: tl.constexpr):
    """So many words (1, 2 or 4) of shared memory, from `address` + AT on: a tuple."""
    if WORDS == 4:
        asm: tl.constexpr = f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4+{AT}];"
        return tl.inline_asm_elementwise(
            asm, "=r,=r,=r,=r,r", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
        )
    elif WORDS == 2:
        asm: tl.constexpr = f"ld.shared.v2.b32 {{$0,$1}}, [$2+{AT}];"
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [address], dtype=(tl.int32, tl.int32), is_pure=False, pack=1)
    else:
        asm: tl.constexpr = f"ld.shared.b32 $0, [$1+{AT}];"
        return (tl.inline_asm_elementwise(asm, "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1),)


@tl.core.builtin
def warpgroup(total, a, positions, address, SPARSE, BF16, _semantic=None):
    """Begin A (64, 64) B (64, N) + C (64, N), float32, by four warps: C; nobody may use it, or write A, until `settled`.

    Each warp has 16 rows of A as in `mma`, four pairs for each 16 columns, or as in `mma_sparse` for each 32; and the
    values of C as there, for each 8 columns. B is in shared memory at `address`, a multiple of 1024: N rows of 64 halves
    whose pieces of 16 bytes are exchanged, piece p of row r being p xor r mod 8.
    """
    count, half = len(total), "bf16" if _value(BF16) else "f16"
    sparse = _value(SPARSE)
    name = f"m64n{2 * count}k{32 if sparse else 16}.f32.{half}.{half}"
    sums = ", ".join(f"${number}" for number in range(count))
    lines = [".reg .pred p; .reg .b32 lo; .reg .b64 where; setp.eq.u32 p, 0, 0; wgmma.fence.sync.aligned;"]
    last = 2 * count + len(a)  # the operands after C twice and A: positions, address
    for part in range(len(a) // 4):
        mine = ", ".join(f"${2 * count + 4 * part + number}" for number in range(4))
        step = (64 if sparse else 32) * part
        lines.append(f"add.u32 lo, ${last + 1}, {step}; bfe.u32 lo, lo, 4, 14; or.b32 lo, lo, 0x10000;")
        lines.append("mov.b64 where, {lo, 0x40000040};")  # rows 128 bytes apart, eights of them 1024, exchanged
        if sparse:
            lines.append(
                f"wgmma.mma_async.sp.sync.aligned.{name} {{{sums}}}, {{{mine}}}, where, ${last}, {part}, p, 1, 1, 0;"
            )
        else:
            lines.append(f"wgmma.mma_async.sync.aligned.{name} {{{sums}}}, {{{mine}}}, where, p, 1, 1, 0;")
    lines.append("wgmma.commit_group.sync.aligned;")
    return _tied("{ " + " ".join(lines) + " }", total, (*a, positions, address), _semantic)


@tl.core.builtin
def settled(total, a, _semantic=None):
    """C of `warpgroup`, when it is done; `a`: its A, which is in use until then."""
    return _tied("wgmma.wait_group.sync.aligned 0;", total, a, _semantic)


def _tied(asm, total, others, semantic):
    """An instruction that changes what is in `total`."""
    outputs, inputs = ["=f"] * len(total), [*map(str, range(len(total))), *["r"] * len(others)]
    found = tl.core.inline_asm_elementwise(
        asm,
        ",".join(outputs + inputs),
        [*total, *others],
        dtype=(tl.float32,) * len(total),
        is_pure=False,
        pack=1,
        _semantic=semantic,
    )
    return tl.core.tuple(list(found))


def _value(constant):
    return getattr(constant, "value", constant)


@triton.jit
def public(thread):
    """What this thread has written to shared memory may be read by the tensor cores, after a barrier."""
    asm: tl.constexpr = "fence.proxy.async.shared::cta; mov.b32 $0, 0;"
    return tl.inline_asm_elementwise(asm, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def halves(low, high, BF16: tl.constexpr):
    """Two numbers as a pair, rounded."""
    asm: tl.constexpr = f"cvt.rn.{'bf16x2' if BF16 else 'f16x2'}.f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(asm, "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def matrices(address, pairs):
    """Four matrices (8, 8) of pairs, each as `mma` has rows of C, to shared memory, transposed: eights of lanes have the
    addresses of their eight rows there, of 16 bytes.
    """
    asm: tl.constexpr = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;"
    return tl.inline_asm_elementwise(
        asm, "=r,r,r,r,r,r", [address, pairs[0], pairs[1], pairs[2], pairs[3]], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def keep(address, four):
    """Four numbers to shared memory."""
    asm: tl.constexpr = "st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;"
    return tl.inline_asm_elementwise(
        asm, "=r,r,f,f,f,f", [address, four[0], four[1], four[2], four[3]], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def put(place, four, there):
    """Store four words at once, where `there`."""
    asm: tl.constexpr = (
        "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }"
    )
    return tl.inline_asm_elementwise(
        asm,
        "=r,l,r,r,r,r,r",
        [place.to(tl.int64), four[0], four[1], four[2], four[3], there.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
