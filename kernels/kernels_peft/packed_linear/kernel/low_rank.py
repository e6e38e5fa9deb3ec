"""u = x A^T in Triton, in parts along the sum; with slots, A is that of a row's slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_peft.packed_linear.kernel import tiles
from kernels_peft.packed_linear.kernel.slots import load_slots
from kernels_peft.rotation.kernel import FP_FUSION


def low_rank_in_parts(rows: Tensor, factors: Tensor, slots: Tensor | None = None) -> Tensor:
    """Multiply by the transpose of a factor, or of the one that the slot of a row names.

    Shapes:
        rows: (M, K). factors: (r, K), or (S, r, K) with slots, any strides. slots: any shape of as
        many elements as divide M. Returns (parts, M, r), float32. Rows without a slot stay
        unwritten.
    """
    (M, K), (rank, _), tile = rows.shape, factors.shape[-2:], tiles.LOW_TILE
    blocks, row_blocks = triton.cdiv(rank, tile.outputs), triton.cdiv(M, tile.rows)
    parts, each = tiles.cut(triton.cdiv(K, tile.inputs), blocks * row_blocks, rows.device)
    out = rows.new_empty((parts, M, rank), dtype=torch.float32)
    _low_rank_partials_kernel[(blocks, parts, row_blocks)](
        rows,
        factors,
        rows if slots is None else slots.contiguous(),
        out,
        M,
        K,
        rank,
        len(factors),
        1 if slots is None else M // slots.numel(),
        rows.stride(0),
        0 if slots is None else factors.stride(0),
        *factors.stride()[-2:],
        each,
        BY_SLOT=slots is not None,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.inputs,
        BLOCK_R=tile.outputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=FP_FUSION,
    )
    return out


@triton.jit
def _low_rank_partials_kernel(
    x_ptr,
    a_ptr,
    slots_ptr,
    out_ptr,
    M,
    K,
    R,
    S,
    rows_per_slot,
    stride_xm,
    stride_as,
    stride_ar,
    stride_ak,
    steps_each,
    BY_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    part = tl.program_id(1)
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x_ptr + rows[:, None].to(tl.int64) * stride_xm
    out_rows = out_ptr + (part.to(tl.int64) * M + rows[:, None]) * R
    first = part * steps_each
    last = tl.minimum(first + steps_each, tl.cdiv(K, BLOCK_K))
    if BY_SLOT:
        left = load_slots(slots_ptr, rows, M, rows_per_slot, S)
        slot = tl.max(left, 0)
        while slot >= 0:
            _low_rank_tile(
                x_rows, a_ptr + slot.to(tl.int64) * stride_as, out_rows, left == slot, ranks,
                first, last, K, R, stride_ar, stride_ak, BLOCK_M, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            left = tl.where(left == slot, -1, left)
            slot = tl.max(left, 0)
    else:
        _low_rank_tile(
            x_rows, a_ptr, out_rows, rows < M, ranks,
            first, last, K, R, stride_ar, stride_ak, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _low_rank_tile(
    x_rows,
    a_ptr,
    out_rows,
    live,
    ranks,
    first,
    last,
    K,
    R,
    stride_ar,
    stride_ak,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Multiply the live rows by one A over the steps from `first` to `last`, and store them."""
    a_columns = a_ptr + ranks[None, :].to(tl.int64) * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(first, last):
        inputs = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + inputs[None, :], mask=live[:, None] & (inputs < K)[None, :], other=0.0)
        mask = (inputs < K)[:, None] & (ranks < R)[None, :]
        a = tl.load(a_columns + inputs[:, None].to(tl.int64) * stride_ak, mask=mask, other=0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    tl.store(out_rows + ranks[None, :], acc, mask=live[:, None] & (ranks < R)[None, :])
