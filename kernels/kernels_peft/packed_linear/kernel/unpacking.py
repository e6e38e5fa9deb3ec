"""A tile of the weight from its codes, in registers.

Each word is read once, whatever the width. Of 3 bits, the three words of a run become four windows
of eight whole codes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_tile(
    qweight_ptr,
    qzeros_ptr,
    scales_ptr,
    k,
    columns,
    N,
    group_size,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Give inputs k to k + BLOCK_K, which lie in one group, of the outputs `columns`: float32.

    A code in the mantissa of 2^23 is a float32 without a conversion, and exact in the difference.
    """
    IMPLICIT_BITS: tl.constexpr = 0x4B000000
    IMPLICIT: tl.constexpr = 8388608.0
    HIGHEST: tl.constexpr = (1 << BITS) - 1
    WINDOW: tl.constexpr = 8 if BITS == 3 else 32 // BITS  # codes
    inside = columns < N
    words = qweight_ptr + (k // 32 * BITS).to(tl.int64) * N + columns[None, :]
    if BITS == 3:
        runs = tl.arange(0, BLOCK_K // 32)[:, None].to(tl.int64) * 3 * N
        first = tl.load(words + runs, mask=inside[None, :], other=0)
        second = tl.load(words + runs + N, mask=inside[None, :], other=0)
        third = tl.load(words + runs + 2 * N, mask=inside[None, :], other=0)
        a = first.to(tl.uint32, bitcast=True)[:, None, :]
        b = second.to(tl.uint32, bitcast=True)[:, None, :]
        c = third.to(tl.uint32, bitcast=True)[:, None, :]
        part = tl.arange(0, 4)[None, :, None]
        early = tl.where(part == 0, a, (a >> 24) | (b << 8))
        late = tl.where(part == 2, (b >> 16) | (c << 16), c >> 8)
        windows = tl.reshape(tl.where(part < 2, early, late), (BLOCK_K // 8, BLOCK_N))
    else:
        rows = tl.arange(0, BLOCK_K // WINDOW)[:, None].to(tl.int64) * N
        held = tl.load(words + rows, mask=inside[None, :], other=0)
        windows = held.to(tl.uint32, bitcast=True)
    shifts = (BITS * tl.arange(0, WINDOW)).to(tl.uint32)[None, :, None]
    codes = ((windows[:, None, :] >> shifts) & HIGHEST) | IMPLICIT_BITS
    values = tl.reshape(codes, (BLOCK_K, BLOCK_N)).to(tl.float32, bitcast=True)

    group = (k // group_size).to(tl.int64)
    scale = tl.load(scales_ptr + group * N + columns, mask=inside, other=0.0).to(tl.float32)
    start = columns * BITS
    zeros = qzeros_ptr + group * (N // 32 * BITS) + start // 32
    shift = (start % 32).to(tl.uint32)
    zero = tl.load(zeros, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if BITS == 3:
        across = shift > 29
        rest = tl.load(zeros + 1, mask=inside & across, other=0).to(tl.uint32, bitcast=True)
        zero |= tl.where(across, rest << ((32 - shift) & 31), 0)
    zero = (zero & HIGHEST).to(tl.float32)
    return (values - (zero[None, :] + IMPLICIT)) * scale[None, :]
