"""The rotation by slot in Triton: one launch forward, two and a sort for both gradients.

A row of `width` features holds its pairs and then its tail, the features past the last whole group.
Both are laid out along one axis of `width` places, two for each pair: a program owns a span of
places and so of pairs or of tail, whatever the group size of a row turns out to be. The grid
depends on the numbers of tokens and features alone. A row without a rotation is all tail.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_peft.rotation.kernel import DTYPES, FP_FUSION, as_rows
from kernels_peft.rotation_bank.blocked import (
    rotate_by_slot_backward_blocked,
    rotate_by_slot_blocked,
)


class Tile(NamedTuple):
    """The share of a program: `tokens` at a time, `pairs` wide."""

    tokens: int
    pairs: int
    warps: int


# (least number of tokens, tile); the last one that applies is taken. Eight pairs a thread and token
# make 16-byte loads of 16-bit data. A program is one warp: tokens of one slot share its float32
# coefficients in registers, and few tokens need small shares to occupy the device.
FORWARD_TILES = (
    (0, Tile(tokens=1, pairs=256, warps=1)),
    (512, Tile(tokens=4, pairs=256, warps=1)),
)
# The warps of a program share its tokens, or too few loads would be in flight.
TABLE_TILES = ((0, Tile(tokens=4, pairs=256, warps=4)),)
# The sums of a slot are split until there are about as many programs as a large device holds, but
# not below a number of tokens for each, as a split costs 16 bytes a pair for its partial sums.
PROGRAMS = 1024
LEAST_TOKENS = 16


def rotate_by_slot_triton(
    x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor, transposed: bool = False
) -> Tensor:
    """Compute what `rotate_by_slot_blocked` computes, on the device of `x`, without waiting for it.

    Shapes:
        x: (*rows, ..., d). table: (S, 2, d). group_sizes: (S,). slots: (*rows). Returns
        (*rows, ..., d), contiguous, the dtype of x. A slot of S or more, and an odd or negative
        group size, stand for no rotation.
    """
    if x.dtype not in DTYPES:
        return rotate_by_slot_blocked(x, table, group_sizes, slots, transposed)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0 or table.shape[0] == 0:
        return out.copy_(x)
    rows = as_rows(x)
    M, width = rows.shape
    tile = _choose(FORWARD_TILES, M)
    blocks = triton.cdiv(width, 2 * tile.pairs)
    with torch.cuda.device_of(x):
        _rotate_by_slot_fwd_kernel[(triton.cdiv(M, tile.tokens) * blocks,)](
            rows,
            table.contiguous(),
            group_sizes.contiguous(),
            slots.contiguous(),
            out,
            M,
            table.shape[0],
            width,
            M // slots.numel(),
            rows.stride(0),
            BLOCK_M=tile.tokens,
            BLOCK_P=tile.pairs,
            TRANSPOSED=transposed,
            num_warps=tile.warps,
            enable_fp_fusion=FP_FUSION,
        )
    return out


def rotate_by_slot_backward_triton(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    group_sizes: Tensor,
    slots: Tensor,
    input_grad: bool,
    table_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Compute what `rotate_by_slot_backward_blocked` computes, on the device of `grad`.

    Shapes:
        grad: (*rows, ..., d). x: alike, or (0,) if the gradient of the table is not asked for.
        Returns (*rows, ..., d) and (S, 2, d), float32; what is not asked for comes back empty.
    """
    if grad.dtype not in DTYPES:
        return rotate_by_slot_backward_blocked(
            grad, x, table, group_sizes, slots, input_grad, table_grad
        )
    dx, d_table = grad.new_empty(0), table.new_empty(0)
    if input_grad:
        dx = rotate_by_slot_triton(grad, table, group_sizes, slots, transposed=True)
    if table_grad:
        d_table = _table_gradient(grad, x, group_sizes, slots)
    return dx, d_table


def _table_gradient(grad: Tensor, x: Tensor, group_sizes: Tensor, slots: Tensor) -> Tensor:
    S, width = group_sizes.shape[0], grad.shape[-1]
    if grad.numel() == 0 or S == 0:
        return grad.new_zeros((S, 2, width), dtype=torch.float32)
    g_rows, x_rows = as_rows(grad), as_rows(x)
    M = g_rows.shape[0]
    # Sorted, the rows of a slot lie side by side. A stable sort keeps the order of the sums.
    by_slot, order = slots.flatten().sort(stable=True)
    every_slot = torch.arange(S + 1, device=slots.device, dtype=slots.dtype)
    starts = torch.searchsorted(by_slot, every_slot)
    tile = _choose(TABLE_TILES, M)
    blocks = triton.cdiv(width, 2 * tile.pairs)
    splits = max(1, min(PROGRAMS // (S * blocks), M // LEAST_TOKENS))
    partials = grad.new_empty((S, splits, 2, width), dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _rotate_by_slot_table_kernel[(S * splits * blocks,)](
            g_rows,
            x_rows,
            group_sizes.contiguous(),
            order,
            starts,
            partials,
            width,
            M // slots.numel(),
            g_rows.stride(0),
            x_rows.stride(0),
            splits,
            BLOCK_M=tile.tokens,
            BLOCK_P=tile.pairs,
            num_warps=tile.warps,
            enable_fp_fusion=FP_FUSION,
        )
    return partials.sum(1)


def _choose(tiles: tuple[tuple[int, Tile], ...], tokens: int) -> Tile:
    return next(tile for least, tile in reversed(tiles) if tokens >= least)


@triton.jit
def _rotate_by_slot_fwd_kernel(
    x_ptr,
    table_ptr,
    group_sizes_ptr,
    slots_ptr,
    out_ptr,
    M,
    S,
    width,
    tokens_per_slot,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    NO_SLOT: tl.constexpr = -1
    DONE: tl.constexpr = -2
    blocks = tl.cdiv(width, 2 * BLOCK_P)
    start = tl.program_id(0) % blocks * BLOCK_P
    first_token = tl.program_id(0) // blocks * BLOCK_M
    tokens = first_token + tl.arange(0, BLOCK_M)
    exists = tokens < M
    slots = tl.load(slots_ptr + tokens // tokens_per_slot, mask=exists, other=NO_SLOT)
    slots = tl.where((slots >= 0) & (slots < S), slots, NO_SLOT).to(tl.int32)
    left = tl.where(exists, slots, DONE)
    x_rows = x_ptr + tokens[:, None].to(tl.int64) * stride_xm
    out_rows = out_ptr + tokens[:, None].to(tl.int64) * width
    # One turn for each distinct slot of the tile, so mostly one.
    slot = tl.max(left, 0)
    while slot > DONE:
        half, pairs = _layout(group_sizes_ptr, slot, width)
        row = table_ptr + tl.maximum(slot, 0).to(tl.int64) * (2 * width)
        # Two ways to the same pairs: the compiler only sees runs that are written as such.
        in_runs = (half % 8 == 0) & (start < pairs)
        if in_runs:
            low, high, inside = _pairs_in_runs(start, half // 8, width, BLOCK_P)
            live = (left == slot)[:, None]
            _rotate_pairs(x_rows, out_rows, row, low, high, live, inside, width, TRANSPOSED)
        if (start + BLOCK_P > pairs) | (half % 8 != 0):
            # Addresses one by one would fill the registers, so here tokens come one by one.
            for i in range(BLOCK_M):
                token = first_token + i + tl.zeros((1, 1), tl.int32)
                inside_x = token < M
                own = tl.load(slots_ptr + token // tokens_per_slot, mask=inside_x, other=NO_SLOT)
                own = tl.where((own >= 0) & (own < S), own, NO_SLOT)
                mine = inside_x & (own == slot)
                x_row = x_ptr + token.to(tl.int64) * stride_xm
                out_row = out_ptr + token.to(tl.int64) * width
                if start >= pairs:
                    columns = 2 * start + tl.arange(0, 2 * BLOCK_P)[None, :]
                    _copy(x_row, out_row, columns, mine & (columns < width))
                else:
                    if not in_runs:
                        low, high, inside = _pairs_one_by_one(start, half, pairs, BLOCK_P)
                        _rotate_pairs(
                            x_row, out_row, row, low, high, mine, inside, width, TRANSPOSED
                        )
                    if start + BLOCK_P > pairs:
                        columns = 2 * start + tl.arange(0, 2 * BLOCK_P)[None, :]
                        tail = (columns >= 2 * pairs) & (columns < width)
                        _copy(x_row, out_row, columns, mine & tail)
        left = tl.where(left == slot, DONE, left)
        slot = tl.max(left, 0)


@triton.jit
def _rotate_by_slot_table_kernel(
    grad_ptr,
    x_ptr,
    group_sizes_ptr,
    order_ptr,
    starts_ptr,
    partials_ptr,
    width,
    tokens_per_slot,
    stride_gm,
    stride_xm,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    blocks = tl.cdiv(width, 2 * BLOCK_P)
    start = tl.program_id(0) % blocks * BLOCK_P
    part = tl.program_id(0) // blocks  # slot * splits + split
    slot = part // splits
    split = part % splits
    half, pairs = _layout(group_sizes_ptr, slot, width)
    first = tl.load(starts_ptr + slot) * tokens_per_slot
    last = tl.load(starts_ptr + slot + 1) * tokens_per_slot
    d_first = partials_ptr + part.to(tl.int64) * (2 * width)
    d_second = d_first + width
    if start < pairs:
        first += split * BLOCK_M
        step = splits * BLOCK_M
        if half % 8 == 0:
            low, high, inside = _pairs_in_runs(start, half // 8, width, BLOCK_P)
            _sum_pairs(
                grad_ptr, x_ptr, order_ptr, d_first, d_second, low, high, inside, first, last,
                step, tokens_per_slot, stride_gm, stride_xm, BLOCK_M, BLOCK_P,
            )  # fmt: skip
        else:
            low, high, inside = _pairs_one_by_one(start, half, pairs, BLOCK_P)
            _sum_pairs(
                grad_ptr, x_ptr, order_ptr, d_first, d_second, low, high, inside, first, last,
                step, tokens_per_slot, stride_gm, stride_xm, BLOCK_M, BLOCK_P,
            )  # fmt: skip
    if start + BLOCK_P > pairs:
        # The tail has no coefficients; its share of the partial sums must not stay unwritten.
        columns = 2 * start + tl.arange(0, 2 * BLOCK_P)[None, :]
        tail = (columns >= 2 * pairs) & (columns < width)
        zeros = tl.zeros((1, 2 * BLOCK_P), tl.float32)
        tl.store(d_first + columns, zeros, mask=tail)
        tl.store(d_second + columns, zeros, mask=tail)


@triton.jit
def _layout(group_sizes_ptr, slot, width):
    """Give half the group size of a slot and its number of pairs, 0 if it rotates nothing."""
    size = tl.load(group_sizes_ptr + tl.maximum(slot, 0)).to(tl.int32)
    size = tl.where((slot >= 0) & (size > 0) & (size % 2 == 0), size, 0)
    half = size // 2
    return half, width // tl.maximum(size, 1) * half


@triton.jit
def _pairs_in_runs(start, eighth, width, BLOCK_P: tl.constexpr):
    """Give the members of the pairs from `start` on where half a group is 8 * `eighth` features.

    That runs of eight are contiguous and aligned, and wholly inside or outside, is in the formula.
    """
    pairs = start + tl.arange(0, BLOCK_P)[None, :]
    runs = pairs // 8
    low = runs // eighth * eighth * 16 + runs % eighth * 8 + pairs % 8
    inside = pairs < width // (16 * eighth) * eighth * 8
    return low, low + eighth * 8, inside


@triton.jit
def _pairs_one_by_one(start, half, number, BLOCK_P: tl.constexpr):
    """Give the members of the pairs from `start` on for any group size."""
    pairs = start + tl.arange(0, BLOCK_P)[None, :]
    low = pairs // half * (2 * half) + pairs % half
    return low, low + half, pairs < number


@triton.jit
def _rotate_pairs(
    x_rows, out_rows, table_row, low, high, live, inside, width, TRANSPOSED: tl.constexpr
):
    dtype: tl.constexpr = out_rows.dtype.element_ty
    first_low = tl.load(table_row + low, mask=inside, other=0.0)
    first_high = tl.load(table_row + high, mask=inside, other=0.0)
    second_low = tl.load(table_row + width + low, mask=inside, other=0.0)
    second_high = tl.load(table_row + width + high, mask=inside, other=0.0)
    mask = live & inside
    x_low = tl.load(x_rows + low, mask=mask, other=0.0).to(tl.float32)
    x_high = tl.load(x_rows + high, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        out_low = first_low * x_low + second_high * x_high
        out_high = first_high * x_high - second_low * x_low
    else:
        out_low = first_low * x_low - second_low * x_high
        out_high = first_high * x_high + second_high * x_low
    tl.store(out_rows + low, out_low.to(dtype), mask=mask)
    tl.store(out_rows + high, out_high.to(dtype), mask=mask)


@triton.jit
def _copy(x_rows, out_rows, columns, mask):
    tl.store(out_rows + columns, tl.load(x_rows + columns, mask=mask, other=0.0), mask=mask)


@triton.jit
def _sum_pairs(
    grad_ptr,
    x_ptr,
    order_ptr,
    d_first,
    d_second,
    low,
    high,
    inside,
    first,
    last,
    step,
    tokens_per_slot,
    stride_gm,
    stride_xm,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum over every `step`-th tile of the tokens from `first` to `last` in the order of slots."""
    low_low = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    low_high = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    high_low = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    high_high = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for place in range(first, last, step):
        places = place + tl.arange(0, BLOCK_M)
        exists = places < last
        rows = tl.load(order_ptr + places // tokens_per_slot, mask=exists, other=0)
        tokens = (rows * tokens_per_slot + places % tokens_per_slot)[:, None].to(tl.int64)
        mask = exists[:, None] & inside
        g_rows = grad_ptr + tokens * stride_gm
        x_rows = x_ptr + tokens * stride_xm
        g_low = tl.load(g_rows + low, mask=mask, other=0.0).to(tl.float32)
        g_high = tl.load(g_rows + high, mask=mask, other=0.0).to(tl.float32)
        x_low = tl.load(x_rows + low, mask=mask, other=0.0).to(tl.float32)
        x_high = tl.load(x_rows + high, mask=mask, other=0.0).to(tl.float32)
        low_low += g_low * x_low
        low_high += g_low * x_high
        high_low += g_high * x_low
        high_high += g_high * x_high
    tl.store(d_first + low, tl.sum(low_low, 0, keep_dims=True), mask=inside)
    tl.store(d_first + high, tl.sum(high_high, 0, keep_dims=True), mask=inside)
    tl.store(d_second + low, -tl.sum(low_high, 0, keep_dims=True), mask=inside)
    tl.store(d_second + high, tl.sum(high_low, 0, keep_dims=True), mask=inside)
