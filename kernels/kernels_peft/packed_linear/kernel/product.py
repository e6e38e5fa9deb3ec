"""x W^T and g W in Triton, for few rows: codes are unpacked in registers and multiplied there.

The product is cut into parts along its sum, so that a small layer still occupies the device. No
atomics: runs are bit-equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_peft.packed_linear.kernel import tiles
from kernels_peft.packed_linear.kernel.unpacking import weight_tile
from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.rotation.kernel import FP_FUSION


def product_in_parts(
    rows: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, transposed: bool
) -> Tensor:
    """Multiply by the weight (K, N), or by its transpose, in parts: (parts, M, width), float32."""
    (K, N), M = packed_sizes(qweight, bits), len(rows)
    group = K // scales.shape[0]
    tile = tiles.fused_tile(M)
    inputs = min(tile.inputs, group & -group)  # a power of two that divides a group
    width, step, own, along = (K, tile.outputs, inputs, N) if transposed else (
        N, inputs, tile.outputs, K,
    )  # fmt: skip
    blocks, row_blocks = triton.cdiv(width, own), triton.cdiv(M, tile.rows)
    parts, each = tiles.cut(triton.cdiv(along, step), blocks * row_blocks, rows.device)
    out = rows.new_empty((parts, M, width), dtype=torch.float32)
    _packed_linear_partials_kernel[(blocks, parts, row_blocks)](
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
        weight = weight_tile(
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
