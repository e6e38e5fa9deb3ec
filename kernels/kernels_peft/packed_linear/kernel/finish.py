"""The parts of a product added up in order, and all that is done to the sum before it is written.

That is the low-rank branch, the bias and a rotation, in this order. The rotation needs the partners
of a program's columns, which lie where the group size of a row says: a program adds them up once
more for each distinct group size of its rows, which costs reads of parts that the cache holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_peft.packed_linear.kernel import tiles
from kernels_peft.packed_linear.kernel.slots import load_slots
from kernels_peft.rotation.kernel import FP_FUSION


class LowRank(NamedTuple):
    """scale u B^T: u in parts (parts, M, r); B (N, r), or (S, N, r) with slots."""

    low: Tensor
    factors: Tensor
    scale: float = 1.0
    slots: Tensor | None = None


class Rotation(NamedTuple):
    """The tensors of `rotate_by_slot`: (S, 2, N) float32, (S,) and the slots."""

    table: Tensor
    group_sizes: Tensor
    slots: Tensor


def finish(
    parts: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Add up parts, low-rank branch and bias, round once, then rotate if asked.

    Shapes:
        parts: (parts, M, N), any float dtype. bias: (N,). Returns (M, N).
    """
    count, M, N = parts.shape
    out = parts.new_empty((M, N), dtype=dtype)
    tile = tiles.FINISH_TILE
    # where there is nothing, any tensor stands in: it is not read
    low, factors, scale, slots = low_rank or LowRank(parts[:0], out, 1.0, None)
    table, group_sizes, turns = rotation or Rotation(out[:0], out, out)
    _packed_linear_finish_kernel[(triton.cdiv(N, tile.outputs), triton.cdiv(M, tile.rows))](
        parts,
        out if bias is None else bias.contiguous(),
        low,
        factors,
        out if slots is None else slots.contiguous(),
        table.contiguous(),
        group_sizes.contiguous(),
        turns.contiguous(),
        out,
        M,
        N,
        count,
        len(low),
        low.shape[2],
        len(factors),
        1 if slots is None else M // slots.numel(),
        0 if slots is None else factors.stride(0),
        *factors.stride()[-2:],
        scale,
        len(table),
        1 if rotation is None else M // turns.numel(),
        BIAS=bias is not None,
        LORA=low_rank is not None,
        BY_SLOT=slots is not None,
        ROTATED=rotation is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_R=tile.inputs,
        num_warps=tile.warps,
        enable_fp_fusion=FP_FUSION,
    )
    return out


@triton.jit
def _packed_linear_finish_kernel(
    parts_ptr,
    bias_ptr,
    low_ptr,
    b_ptr,
    slots_ptr,
    table_ptr,
    group_sizes_ptr,
    turns_ptr,
    out_ptr,
    M,
    N,
    parts,
    low_parts,
    R,
    S,
    rows_per_slot,
    stride_bs,
    stride_bn,
    stride_br,
    scale,
    rotations,
    rows_per_turn,
    BIAS: tl.constexpr,
    LORA: tl.constexpr,
    BY_SLOT: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = tl.full((BLOCK_M,), -1, tl.int32)
    if BY_SLOT:
        slots = load_slots(slots_ptr, rows, M, rows_per_slot, S)
    if ROTATED:
        turns = load_slots(turns_ptr, rows, M, rows_per_turn, rotations)
        table_rows = table_ptr + tl.maximum(turns, 0)[:, None].to(tl.int64) * (2 * N)
        left = tl.load(group_sizes_ptr + tl.maximum(turns, 0), mask=turns >= 0, other=0)
        left = tl.where((left % 2 == 0) & (left <= N), left, 0).to(tl.int32)
        # The first turn is that of groups of one, where a column is its own partner and nothing is
        # rotated: it gives y. One call for all turns keeps registers from spilling, and so does a 1
        # that the compiler does not know, or it would peel this turn off.
        y = tl.zeros((BLOCK_M, BLOCK_N), dtype)
        size = tl.max(left * 0, 0) + 1
        while size > 0:
            half = size // 2
            low = columns % size < half
            partners = tl.where(low, columns + half, columns - half)
            inside = columns < N // size * size
            partner = _sum(
                parts_ptr, bias_ptr, low_ptr, b_ptr, slots, rows, partners, inside, M, N, parts,
                low_parts, R, stride_bs, stride_bn, stride_br, scale, dtype, BIAS, LORA, BY_SLOT,
                BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            mask = (left == size)[:, None] & inside[None, :]
            first = tl.load(table_rows + columns[None, :], mask=mask, other=0.0)
            second = tl.load(table_rows + (N + columns)[None, :], mask=mask, other=0.0)
            second = tl.where(low[None, :], -second, second)
            z = first * y.to(tl.float32) + second * partner.to(tl.float32)
            y = tl.where(mask, z.to(dtype), tl.where(size == 1, partner, y))
            left = tl.where(left == size, 0, left)
            size = tl.max(left, 0)
    else:
        y = _sum(
            parts_ptr, bias_ptr, low_ptr, b_ptr, slots, rows, columns, columns < N, M, N, parts,
            low_parts, R, stride_bs, stride_bn, stride_br, scale, dtype, BIAS, LORA, BY_SLOT,
            BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    places = rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(out_ptr + places, y, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def _sum(
    parts_ptr,
    bias_ptr,
    low_ptr,
    b_ptr,
    slots,
    rows,
    columns,
    inside,
    M,
    N,
    parts,
    low_parts,
    R,
    stride_bs,
    stride_bn,
    stride_br,
    scale,
    dtype: tl.constexpr,
    BIAS: tl.constexpr,
    LORA: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Give parts + scale u B^T + bias for `columns`, which may lie in any order, in `dtype`."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BY_SLOT:
        left = slots
        slot = tl.max(left, 0)
        while slot >= 0:
            b_own = b_ptr + slot.to(tl.int64) * stride_bs
            own = _expand(
                low_ptr, b_own, left == slot, columns, inside, M, low_parts, R,
                stride_bn, stride_br, dtype, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            # Chosen, not added: what another adapter holds, even NaN, stays out of a row.
            acc = tl.where((left == slot)[:, None], own * scale, acc)
            left = tl.where(left == slot, -1, left)
            slot = tl.max(left, 0)
    elif LORA:
        acc = _expand(
            low_ptr, b_ptr, rows < M, columns, inside, M, low_parts, R,
            stride_bn, stride_br, dtype, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        acc *= scale
    mask = (rows < M)[:, None] & inside[None, :]
    # A pointer of the tile and short offsets inside it: long ones would fill the registers.
    tile = parts_ptr + tl.program_id(1).to(tl.int64) * BLOCK_M * N
    inner = tl.arange(0, BLOCK_M)[:, None] * N + columns[None, :]
    for _ in range(parts):
        acc += tl.load(tile + inner, mask=mask, other=0.0).to(tl.float32)
        tile += M * N  # several parts are of few rows, so int32 holds it
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return acc.to(dtype)


@triton.jit
def _expand(
    low_ptr,
    b_ptr,
    live,
    columns,
    inside,
    M,
    low_parts,
    R,
    stride_bn,
    stride_br,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Give u B^T of the live rows, with u the sum of its parts rounded to `dtype`: float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        low_mask = live[:, None] & (ranks < R)[None, :]
        tile = low_ptr + tl.program_id(1).to(tl.int64) * BLOCK_M * R
        inner = tl.arange(0, BLOCK_M)[:, None] * R + ranks[None, :]
        for _ in range(low_parts):
            low += tl.load(tile + inner, mask=low_mask, other=0.0).to(tl.float32)
            tile += M * R
        b_mask = (ranks < R)[:, None] & inside[None, :]
        at = columns[None, :].to(tl.int64) * stride_bn + ranks[:, None].to(tl.int64) * stride_br
        b = tl.load(b_ptr + at, mask=b_mask, other=0.0)
        acc = tl.dot(low.to(dtype), b, acc, input_precision="ieee")
    return acc
