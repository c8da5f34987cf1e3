"""Codes of 2, 3, 4 or 8 bits as a stream of bits in int32 words, the way both quantized formats store them.

Code i of a row occupies the bits ``i · bits …`` of the row's stream, lowest bit first; a word holds 32 bits of it, also
lowest first, so that codes of 3 bits cross words. A row is padded with zero bits to whole words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.state import SLICE, pack_bits, unpack_bits


def words(count: int, bits: int) -> int:
    """int32 words of a row of `count` codes."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8 codes below 2^bits → (rows, words(n, bits)) int32."""
    columns = words(codes.shape[1], bits)
    if 8 % bits == 0:  # no code crosses a byte
        per = 8 // bits
        whole = torch.nn.functional.pad(codes.cpu(), (0, 4 * columns * per - codes.shape[1]))
        parts = whole.reshape(codes.shape[0], 4 * columns, per)
        bytewise = parts[..., 0].clone(memory_format=torch.contiguous_format)  # (rows, bytes)
        for one in range(1, per):
            bytewise |= parts[..., one] << (one * bits)
        return bytewise.view(torch.int32)
    packed = torch.empty(codes.shape[0], 4 * columns, dtype=torch.uint8, device="cpu")
    shifts = torch.arange(bits, dtype=torch.uint8, device="cpu")
    step = max(1, SLICE // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        some = codes[start : start + step].cpu()
        bitwise = (some.unsqueeze(-1) >> shifts) & 1  # (rows, n, bits)
        bytewise = pack_bits(bitwise.flatten(1).bool())
        packed[start : start + step] = torch.nn.functional.pad(bytewise, (0, 4 * columns - bytewise.shape[1]))
    return packed.view(torch.int32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: (rows, words) int32 → (rows, count) uint8."""
    # Flat on the way: one word per row counts as contiguous in any layout, but only stride 1 can be viewed as bytes.
    bytewise = packed.contiguous().flatten().view(torch.uint8).view(packed.shape[0], -1)
    if 8 % bits == 0:  # no code crosses a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        within = (bytewise.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # (rows, bytes, codes per byte)
        return within.flatten(1)[:, :count].contiguous()
    codes = torch.empty(packed.shape[0], count, dtype=torch.uint8, device=packed.device)
    weights = 2 ** torch.arange(bits, dtype=torch.uint8, device=packed.device)
    step = max(1, SLICE // max(1, count))
    for start in range(0, packed.shape[0], step):
        bitwise = unpack_bits(bytewise[start : start + step], count * bits).view(-1, count, bits)
        codes[start : start + step] = (bitwise * weights).sum(-1, dtype=torch.uint8)
    return codes
