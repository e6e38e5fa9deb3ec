"""The packed linear layer in Triton.

Few rows: the codes are unpacked in registers and multiplied there. The product is cut into parts
along its sum, so that a small layer still occupies the device; a second launch adds the parts up in
order, and with them the bias and the low-rank branch. No atomics: runs are bit-equal.

Many rows: the weight is written out once, and the product is that of the library.

A tile of the weight reads each word once, whatever the width. Of 3 bits, the three words of a run
become four windows of eight whole codes, in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_peft.packed_linear.blocked import (
    dequantize_blocked,
    packed_linear_backward_blocked,
    packed_linear_blocked,
)
from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.packing import RUN
from kernels_peft.rotation.kernel import DTYPES, FP_FUSION, as_rows


class Tile(NamedTuple):
    """The share of a program: rows of x, and at most `inputs` x `outputs` of the weight a step."""

    rows: int
    inputs: int
    outputs: int
    warps: int
    stages: int


# (least number of rows, tile); the last one that applies is taken. More rows take the library.
FUSED_TILES = (
    (0, Tile(rows=16, inputs=128, outputs=64, warps=4, stages=3)),
    (17, Tile(rows=32, inputs=64, outputs=64, warps=4, stages=3)),
    (33, Tile(rows=64, inputs=64, outputs=64, warps=4, stages=3)),
)
FUSED_ROWS = 64
# Without matrix units a tile of float32 fills the registers.
FUSED_DTYPES = (torch.float16, torch.bfloat16)
LOW_TILE = Tile(rows=64, inputs=64, outputs=32, warps=4, stages=2)
FINISH_TILE = Tile(rows=16, inputs=32, outputs=64, warps=4, stages=1)
DEQUANTIZE_TILE = Tile(rows=0, inputs=32, outputs=128, warps=4, stages=1)
# A product is cut until every processor of a large device has about two programs, but not below a
# number of steps for each, as a part costs an output 4 bytes written and read.
PROGRAMS = 256
LEAST_STEPS = 4


def packed_linear_triton(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    lora_x: Tensor | None = None,
) -> Tensor:
    """Compute what `packed_linear_blocked` computes, on the device of `x`.

    Shapes:
        x: (..., K). bias: (N,). lora_a: (r, K). lora_b: (N, r). lora_x: (..., K). Returns (..., N).
    """
    if not _served(x.dtype, qweight, scales, bits):
        return packed_linear_blocked(
            x, qweight, qzeros, scales, bias, bits, lora_a, lora_b, scale, lora_x
        )
    N = qweight.shape[1]
    shape = (*x.shape[:-1], N)
    if x.numel() == 0:
        return x.new_empty(shape)
    rows = as_rows(x)
    branch = rows if lora_x is None else as_rows(lora_x)
    if not _fused(rows):
        weight = dequantize_triton(qweight, qzeros, scales, bits, x.dtype)
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        if lora_a is not None and lora_b is not None:
            y.addmm_(branch @ lora_a.t(), lora_b.t(), alpha=scale)
        return y.view(shape)
    with torch.cuda.device_of(x):
        parts = _partials(rows, qweight, qzeros, scales, bits, transposed=False)
        if lora_a is None or lora_b is None:
            return _finish(parts, x.dtype, bias).view(shape)
        low = _low_partials(branch, lora_a.contiguous())
        return _finish(parts, x.dtype, bias, low, lora_b, scale).view(shape)


def packed_linear_backward_triton(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    d_low: Tensor | None = None,
    lora_a: Tensor | None = None,
) -> Tensor:
    """Compute what `packed_linear_backward_blocked` computes, on the device of `grad`.

    Shapes:
        grad: (..., N). d_low: (..., r). lora_a: (r, K). Returns (..., K).
    """
    if not _served(grad.dtype, qweight, scales, bits):
        return packed_linear_backward_blocked(grad, qweight, qzeros, scales, bits, d_low, lora_a)
    shape = (*grad.shape[:-1], packed_sizes(qweight, bits)[0])
    if grad.numel() == 0:
        return grad.new_empty(shape)
    rows = as_rows(grad)
    low = None if d_low is None else d_low.reshape(-1, d_low.shape[-1])
    if not _fused(rows):
        dx = rows @ dequantize_triton(qweight, qzeros, scales, bits, grad.dtype).t()
        if low is not None and lora_a is not None:
            dx.addmm_(low, lora_a)
        return dx.view(shape)
    with torch.cuda.device_of(grad):
        parts = _partials(rows, qweight, qzeros, scales, bits, transposed=True)
        if low is None or lora_a is None:
            return _finish(parts, grad.dtype).view(shape)
        return _finish(parts, grad.dtype, None, low.contiguous()[None], lora_a.t()).view(shape)


def dequantize_triton(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Compute what `dequantize_blocked` computes, on the device of `qweight`.

    Shapes:
        Returns (K, N).
    """
    if not _served(dtype, qweight, scales, bits):
        return dequantize_blocked(qweight, qzeros, scales, bits, dtype)
    K, N = packed_sizes(qweight, bits)
    weight = scales.new_empty((K, N), dtype=dtype)
    if weight.numel() == 0:
        return weight
    tile = DEQUANTIZE_TILE
    with torch.cuda.device_of(qweight):
        _dequantize_kernel[(K // tile.inputs, triton.cdiv(N, tile.outputs))](
            qweight.contiguous(),
            qzeros.contiguous(),
            scales.contiguous(),
            weight,
            N,
            K // scales.shape[0],
            BITS=bits,
            BLOCK_K=tile.inputs,
            BLOCK_N=tile.outputs,
            num_warps=tile.warps,
            enable_fp_fusion=FP_FUSION,
        )
    return weight


def _served(dtype: torch.dtype, qweight: Tensor, scales: Tensor, bits: int) -> bool:
    """Say whether the kernels serve: dtypes they know, and groups of whole runs of codes."""
    group = packed_sizes(qweight, bits)[0] // scales.shape[0]
    return dtype in DTYPES and scales.dtype in DTYPES and group % RUN == 0


def _fused(rows: Tensor) -> bool:
    return len(rows) <= FUSED_ROWS and rows.dtype in FUSED_DTYPES


def _partials(
    rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, transposed: bool
) -> Tensor:
    """Multiply by the weight (K, N), or by its transpose, in parts: (parts, M, width), float32."""
    (K, N), M = packed_sizes(qweight, bits), len(rows)
    group = K // scales.shape[0]
    tile = next(tile for least, tile in reversed(FUSED_TILES) if least <= M)
    inputs = min(tile.inputs, group & -group)  # a power of two that divides a group
    width, step, own, along = (K, tile.outputs, inputs, N) if transposed else (
        N, inputs, tile.outputs, K,
    )  # fmt: skip
    blocks, steps = triton.cdiv(width, own), triton.cdiv(along, step)
    parts = max(1, min(triton.cdiv(PROGRAMS, blocks), steps // LEAST_STEPS))
    each = triton.cdiv(steps, parts)
    parts = triton.cdiv(steps, each)
    out = rows.new_empty((parts, M, width), dtype=torch.float32)
    _packed_linear_partials_kernel[(blocks, parts, triton.cdiv(M, tile.rows))](
        rows,
        qweight.contiguous(),
        qzeros.contiguous(),
        scales.contiguous(),
        out,
        M,
        K,
        N,
        group,
        rows.stride(0),
        each,
        BITS=bits,
        TRANSPOSED=transposed,
        BLOCK_M=tile.rows,
        BLOCK_K=inputs,
        BLOCK_N=tile.outputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=FP_FUSION,
    )
    return out


def _low_partials(rows: Tensor, lora_a: Tensor) -> Tensor:
    """Multiply (M, K) by A^T, in parts along K: (parts, M, r), float32."""
    (M, K), rank, tile = rows.shape, lora_a.shape[0], LOW_TILE
    steps = triton.cdiv(K, tile.inputs)
    each = LEAST_STEPS
    out = rows.new_empty((triton.cdiv(steps, each), M, rank), dtype=torch.float32)
    _low_partials_kernel[(triton.cdiv(rank, tile.outputs), len(out), triton.cdiv(M, tile.rows))](
        rows,
        lora_a,
        out,
        M,
        K,
        rank,
        rows.stride(0),
        each,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.inputs,
        BLOCK_R=tile.outputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=FP_FUSION,
    )
    return out


def _finish(
    parts: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Add up parts, bias and scale (sum of `low`) B^T, and round once: (M, width)."""
    count, M, width = parts.shape
    out = parts.new_empty((M, width), dtype=dtype)
    tile = FINISH_TILE
    _packed_linear_finish_kernel[(triton.cdiv(width, tile.outputs), triton.cdiv(M, tile.rows))](
        parts,
        out if bias is None else bias.contiguous(),
        parts if low is None else low,
        out if lora_b is None else lora_b,
        out,
        M,
        width,
        count,
        0 if low is None else low.shape[0],
        0 if low is None else low.shape[2],
        *((0, 0) if lora_b is None else lora_b.stride()),
        scale,
        BIAS=bias is not None,
        LORA=low is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_R=tile.inputs,
        num_warps=tile.warps,
        enable_fp_fusion=FP_FUSION,
    )
    return out


@triton.jit
def _packed_linear_partials_kernel(
    x_ptr,
    qweight_ptr,
    qzeros_ptr,
    scales_ptr,
    out_ptr,
    M,
    K,
    N,
    group_size,
    stride_xm,
    steps_each,
    BITS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    own = tl.program_id(0)
    part = tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = (rows < M)[:, None]
    x_rows = x_ptr + rows[:, None].to(tl.int64) * stride_xm
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if TRANSPOSED:
        steps = tl.cdiv(N, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    else:
        steps = K // BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(part * steps_each, tl.minimum((part + 1) * steps_each, steps)):
        if TRANSPOSED:
            k = own * BLOCK_K
            columns = step * BLOCK_N + tl.arange(0, BLOCK_N)
        else:
            k = step * BLOCK_K
            columns = own * BLOCK_N + tl.arange(0, BLOCK_N)
        weight = _weight_tile(
            qweight_ptr, qzeros_ptr, scales_ptr, k, columns, N, group_size, BITS, BLOCK_K, BLOCK_N
        ).to(dtype)
        if TRANSPOSED:
            x = tl.load(x_rows + columns[None, :], mask=exists & (columns < N)[None, :], other=0.0)
            acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        else:
            inputs = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + inputs[None, :], mask=exists, other=0.0)
            acc = tl.dot(x, weight, acc, input_precision="ieee")
    if TRANSPOSED:
        width = K
        places = own * BLOCK_K + tl.arange(0, BLOCK_K)
    else:
        width = N
        places = own * BLOCK_N + tl.arange(0, BLOCK_N)
    out_rows = out_ptr + (part.to(tl.int64) * M + rows[:, None]) * width
    tl.store(out_rows + places[None, :], acc, mask=exists & (places < width)[None, :])


@triton.jit
def _low_partials_kernel(
    x_ptr,
    a_ptr,
    out_ptr,
    M,
    K,
    R,
    stride_xm,
    steps_each,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    part = tl.program_id(1)
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = (rows < M)[:, None]
    x_rows = x_ptr + rows[:, None].to(tl.int64) * stride_xm
    a_columns = a_ptr + ranks[None, :].to(tl.int64) * K
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(part * steps_each, tl.minimum((part + 1) * steps_each, tl.cdiv(K, BLOCK_K))):
        inputs = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + inputs[None, :], mask=exists & (inputs < K)[None, :], other=0.0)
        mask = (inputs < K)[:, None] & (ranks < R)[None, :]
        a = tl.load(a_columns + inputs[:, None], mask=mask, other=0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    out_rows = out_ptr + (part.to(tl.int64) * M + rows[:, None]) * R
    tl.store(out_rows + ranks[None, :], acc, mask=exists & (ranks < R)[None, :])


@triton.jit
def _packed_linear_finish_kernel(
    parts_ptr,
    bias_ptr,
    low_ptr,
    b_ptr,
    out_ptr,
    M,
    N,
    parts,
    low_parts,
    R,
    stride_bn,
    stride_br,
    scale,
    BIAS: tl.constexpr,
    LORA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    places = rows[:, None].to(tl.int64) * N + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if LORA:
        for start in range(0, R, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            low_mask = (rows < M)[:, None] & (ranks < R)[None, :]
            at = low_ptr + rows[:, None].to(tl.int64) * R + ranks[None, :]
            for _ in range(low_parts):
                low += tl.load(at, mask=low_mask, other=0.0).to(tl.float32)
                at += M * R
            b_mask = (ranks < R)[:, None] & (columns < N)[None, :]
            at = columns[None, :].to(tl.int64) * stride_bn + ranks[:, None].to(tl.int64) * stride_br
            b = tl.load(b_ptr + at, mask=b_mask, other=0.0)
            acc = tl.dot(low.to(dtype), b, acc, input_precision="ieee")
        acc *= scale
    at = parts_ptr + places
    for _ in range(parts):
        acc += tl.load(at, mask=mask, other=0.0)
        at += M * N  # few rows, so int32 holds it
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        acc += bias[None, :]
    tl.store(out_ptr + places, acc.to(dtype), mask=mask)


@triton.jit
def _dequantize_kernel(
    qweight_ptr,
    qzeros_ptr,
    scales_ptr,
    out_ptr,
    N,
    group_size,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_K
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = _weight_tile(
        qweight_ptr, qzeros_ptr, scales_ptr, k, columns, N, group_size, BITS, BLOCK_K, BLOCK_N
    )
    inputs = (k + tl.arange(0, BLOCK_K))[:, None].to(tl.int64)
    at = out_ptr + inputs * N + columns[None, :]
    tl.store(at, weight.to(out_ptr.dtype.element_ty), mask=(columns < N)[None, :])


@triton.jit
def _weight_tile(
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
