"""The weight of packed codes written out by Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_peft.packed_linear.blocked import dequantize_blocked
from kernels_peft.packed_linear.kernel.tiles import DEQUANTIZE_TILE
from kernels_peft.packed_linear.kernel.unpacking import weight_tile
from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.packing import RUN
from kernels_peft.rotation.kernel import DTYPES, FP_FUSION


def dequantize_triton(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Compute what `dequantize_blocked` computes, on the device of `qweight`.

    Shapes:
        Returns (K, N).
    """
    if not served(dtype, qweight, scales, bits):
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


def served(dtype: torch.dtype, qweight: Tensor, scales: Tensor, bits: int) -> bool:
    """Say whether the kernels serve: dtypes they know, and groups of whole runs of codes."""
    group = packed_sizes(qweight, bits)[0] // scales.shape[0]
    return dtype in DTYPES and scales.dtype in DTYPES and group % RUN == 0


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
    weight = weight_tile(
        qweight_ptr, qzeros_ptr, scales_ptr, k, columns, N, group_size, BITS, BLOCK_K, BLOCK_N
    )
    inputs = (k + tl.arange(0, BLOCK_K))[:, None].to(tl.int64)
    at = out_ptr + inputs * N + columns[None, :]
    tl.store(at, weight.to(out_ptr.dtype.element_ty), mask=(columns < N)[None, :])
