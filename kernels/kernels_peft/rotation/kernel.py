"""The rotation in Triton: one launch forward, one launch and a sum over chunks of rows backward.

A program owns a tile of rows x pairs. With HALF > 1 the two members of its pairs are two tiles of
contiguous runs of HALF features; with HALF == 1 they alternate in one contiguous tile, which is
split in registers. Programs past the last pair copy the features that have no coefficient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels_peft.rotation.blocked import rotate_backward_blocked, rotate_blocked


class Tile(NamedTuple):
    """The share of a program: `rows` at a time, `pairs` wide, `chunk` rows in all (backward)."""

    rows: int
    pairs: int
    warps: int
    chunk: int = 0


# (least number of rows, tile); the last one that applies is taken. Eight pairs a thread and row
# make 16-byte loads of 16-bit data. Forward, a program is one warp: its rows share the float32
# coefficients in registers and nothing passes through shared memory. Backward, the warps of a
# program share a chunk, or too few loads would be in flight; a chunk costs 8 bytes a feature for
# its two partial sums, 2 % of the traffic of 64 rows of 16-bit data. Few rows need small shares to
# occupy the device.
FORWARD_TILES = (
    (0, Tile(rows=1, pairs=256, warps=1)),
    (512, Tile(rows=4, pairs=256, warps=1)),
)
BACKWARD_TILES = (
    (0, Tile(rows=4, pairs=256, warps=4, chunk=16)),
    (2048, Tile(rows=4, pairs=256, warps=4, chunk=64)),
    (32768, Tile(rows=4, pairs=256, warps=4, chunk=256)),
)
# Fixed here because the default of the compiler changes between its versions.
FP_FUSION = True
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rotate_triton(x: Tensor, first: Tensor, second: Tensor, group_size: int) -> Tensor:
    """Compute what `rotate_blocked` computes, on the device of `x`.

    Shapes:
        x: (..., d). first, second: (n,), n <= d. Returns (..., d), contiguous, the dtype of x.
    """
    if x.dtype not in DTYPES:
        return rotate_blocked(x, first, second, group_size)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    rows, n = as_rows(x), first.shape[0]
    M, width = rows.shape
    tile = _choose(FORWARD_TILES, M)
    blocks = _column_blocks(tile, n, width - n)
    with torch.cuda.device_of(x):
        _rotate_fwd_kernel[(triton.cdiv(M, tile.rows) * blocks,)](
            rows,
            first.contiguous(),
            second.contiguous(),
            out,
            M,
            n // group_size,
            width,
            rows.stride(0),
            HALF=group_size // 2,
            BLOCK_M=tile.rows,
            BLOCK_P=tile.pairs,
            TAIL=n < width,
            num_warps=tile.warps,
            enable_fp_fusion=FP_FUSION,
        )
    return out


def rotate_backward_triton(
    grad: Tensor,
    saved: Tensor,
    first: Tensor,
    second: Tensor,
    group_size: int,
    saved_is_output: bool,
    input_grad: bool,
    coefficient_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `rotate_backward_blocked` computes, on the device of `grad`.

    Shapes:
        grad: (..., d). saved: (..., d), the input of the rotation or its output; (0,) if no
        coefficient gradient is asked for. Returns (..., d), (n,), (n,), the latter as `first`;
        what is not asked for comes back empty.
    """
    if grad.dtype not in DTYPES:
        return rotate_backward_blocked(
            grad, saved, first, second, group_size, saved_is_output, input_grad, coefficient_grad
        )
    n, width = first.shape[0], grad.shape[-1]
    M = grad.shape[:-1].numel()
    tile = _choose(BACKWARD_TILES, M)
    chunks = triton.cdiv(M, tile.chunk)
    dx = grad.new_empty(grad.shape if input_grad else 0)
    partials = first.new_empty(2, chunks, n) if coefficient_grad else None
    blocks = _column_blocks(tile, n, width - n if input_grad else 0)
    if chunks * blocks and (input_grad or coefficient_grad):
        rows = as_rows(grad)
        saved_rows = as_rows(saved) if coefficient_grad else None
        with torch.cuda.device_of(grad):
            _rotate_bwd_kernel[(chunks * blocks,)](
                rows,
                saved_rows,
                first.contiguous(),
                second.contiguous(),
                dx if input_grad else None,
                partials,
                M,
                n // group_size,
                width,
                rows.stride(0),
                0 if saved_rows is None else saved_rows.stride(0),
                chunks,
                HALF=group_size // 2,
                BLOCK_M=tile.rows,
                BLOCK_P=tile.pairs,
                CHUNK=tile.chunk,
                TAIL=input_grad and n < width,
                INPUT_GRAD=input_grad,
                COEFFICIENT_GRAD=coefficient_grad,
                SAVED_IS_OUTPUT=saved_is_output,
                num_warps=tile.warps,
                enable_fp_fusion=FP_FUSION,
            )
    if partials is None:
        return dx, first.new_empty(0), second.new_empty(0)
    return dx, partials[0].sum(0), partials[1].sum(0)


def as_rows(tensor: Tensor) -> Tensor:
    """View `tensor` as (rows, features) with unit last stride, copying only if it must."""
    rows = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _choose(tiles: tuple[tuple[int, Tile], ...], rows: int) -> Tile:
    return next(tile for least, tile in reversed(tiles) if rows >= least)


def _column_blocks(tile: Tile, coefficients: int, tail: int) -> int:
    return triton.cdiv(coefficients // 2, tile.pairs) + triton.cdiv(tail, 2 * tile.pairs)


@triton.jit
def _rotate_fwd_kernel(
    x_ptr,
    first_ptr,
    second_ptr,
    out_ptr,
    M,
    groups,
    width,
    stride_xm,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TAIL: tl.constexpr,
):
    rotated_blocks = tl.cdiv(groups * HALF, BLOCK_P)
    blocks = rotated_blocks
    if TAIL:
        blocks += tl.cdiv(width - groups * 2 * HALF, 2 * BLOCK_P)
    block = tl.program_id(0) % blocks
    rows = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    live = rows < M
    x_rows = x_ptr + rows.to(tl.int64) * stride_xm
    out_rows = out_ptr + rows.to(tl.int64) * width
    rotates = True
    if TAIL:
        rotates = block < rotated_blocks
    if rotates:
        start = block * BLOCK_P
        first_low, first_high = _load_coefficients(first_ptr, start, groups, 1.0, HALF, BLOCK_P)
        second_low, second_high = _load_coefficients(second_ptr, start, groups, 0.0, HALF, BLOCK_P)
        low, high = _load_pairs(x_rows, live, start, groups, 0.0, HALF, BLOCK_M, BLOCK_P)
        _store_pairs(
            out_rows,
            first_low * low - second_low * high,
            first_high * high + second_high * low,
            live,
            start,
            groups,
            HALF,
            BLOCK_M,
            BLOCK_P,
        )
    else:
        _copy_tail(x_rows, out_rows, live, block - rotated_blocks, groups, width, HALF, BLOCK_P)


@triton.jit
def _rotate_bwd_kernel(
    grad_ptr,
    saved_ptr,
    first_ptr,
    second_ptr,
    dx_ptr,
    partials_ptr,
    M,
    groups,
    width,
    stride_gm,
    stride_sm,
    chunks,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    TAIL: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    COEFFICIENT_GRAD: tl.constexpr,
    SAVED_IS_OUTPUT: tl.constexpr,
):
    rotated_blocks = tl.cdiv(groups * HALF, BLOCK_P)
    blocks = rotated_blocks
    if TAIL:
        blocks += tl.cdiv(width - groups * 2 * HALF, 2 * BLOCK_P)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks
    rotates = True
    if TAIL:
        rotates = block < rotated_blocks
    if rotates:
        start = block * BLOCK_P
        if INPUT_GRAD or SAVED_IS_OUTPUT:
            first_low, first_high = _load_coefficients(first_ptr, start, groups, 1.0, HALF, BLOCK_P)
            second_low, second_high = _load_coefficients(
                second_ptr, start, groups, 0.0, HALF, BLOCK_P
            )
        if COEFFICIENT_GRAD:
            low_low = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
            low_high = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
            high_low = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
            high_high = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        for step in range(0, CHUNK, BLOCK_M):
            rows = chunk * CHUNK + step + tl.arange(0, BLOCK_M)[:, None]
            live = rows < M
            grad_rows = grad_ptr + rows.to(tl.int64) * stride_gm
            g_low, g_high = _load_pairs(grad_rows, live, start, groups, 0.0, HALF, BLOCK_M, BLOCK_P)
            if INPUT_GRAD:
                _store_pairs(
                    dx_ptr + rows.to(tl.int64) * width,
                    first_low * g_low + second_high * g_high,
                    first_high * g_high - second_low * g_low,
                    live,
                    start,
                    groups,
                    HALF,
                    BLOCK_M,
                    BLOCK_P,
                )
            if COEFFICIENT_GRAD:
                saved_rows = saved_ptr + rows.to(tl.int64) * stride_sm
                low, high = _load_pairs(
                    saved_rows, live, start, groups, 0.0, HALF, BLOCK_M, BLOCK_P
                )
                low_low += g_low * low
                low_high += g_low * high
                high_low += g_high * low
                high_high += g_high * high
        if COEFFICIENT_GRAD:
            ll = tl.sum(low_low, 0, keep_dims=True)
            lh = tl.sum(low_high, 0, keep_dims=True)
            hl = tl.sum(high_low, 0, keep_dims=True)
            hh = tl.sum(high_high, 0, keep_dims=True)
            if SAVED_IS_OUTPUT:
                # The inverse of a block is the same for all rows, so it applies to the sums.
                scale = 1.0 / (first_low * first_high + second_low * second_high)
                ll, lh = (
                    scale * (first_high * ll + second_low * lh),
                    scale * (first_low * lh - second_high * ll),
                )
                hl, hh = (
                    scale * (first_high * hl + second_low * hh),
                    scale * (first_low * hh - second_high * hl),
                )
            total = groups * (2 * HALF)
            live = tl.full((1, 1), True, tl.int1)
            # `chunks` may be a constant, which has no method to widen it; this sum has.
            d_first = partials_ptr + tl.full((1, 1), 0, tl.int64) + chunk.to(tl.int64) * total
            d_second = partials_ptr + (tl.full((1, 1), 0, tl.int64) + chunk + chunks) * total
            _store_pairs(d_first, ll, hh, live, start, groups, HALF, 1, BLOCK_P)
            _store_pairs(d_second, -lh, hl, live, start, groups, HALF, 1, BLOCK_P)
    else:
        for step in range(0, CHUNK, BLOCK_M):
            rows = chunk * CHUNK + step + tl.arange(0, BLOCK_M)[:, None]
            _copy_tail(
                grad_ptr + rows.to(tl.int64) * stride_gm,
                dx_ptr + rows.to(tl.int64) * width,
                rows < M,
                block - rotated_blocks,
                groups,
                width,
                HALF,
                BLOCK_P,
            )


@triton.jit
def _low_columns(start, HALF: tl.constexpr, BLOCK_P: tl.constexpr):
    """Give the feature of the first member of each pair; the second is HALF further."""
    pairs = start + tl.arange(0, BLOCK_P)[None, :]
    return pairs // HALF * (2 * HALF) + pairs % HALF


@triton.jit
def _load_pairs(
    row_ptrs,
    live,
    start,
    groups,
    OTHER: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Load both members of the pairs from `start` on, as two float32 tiles, OTHER outside."""
    # groups * HALF shows the compiler that the bound is a multiple of HALF: vector loads stay.
    if HALF == 1:
        columns = 2 * start + tl.arange(0, 2 * BLOCK_P)[None, :]
        inside = live & (columns < groups * 2)
        tile = tl.load(row_ptrs + columns, mask=inside, other=OTHER).to(tl.float32)
        low, high = tl.split(tl.reshape(tile, (BLOCK_M, BLOCK_P, 2)))
    else:
        columns = _low_columns(start, HALF, BLOCK_P)
        inside = live & (start + tl.arange(0, BLOCK_P)[None, :] < groups * HALF)
        low = tl.load(row_ptrs + columns, mask=inside, other=OTHER).to(tl.float32)
        high = tl.load(row_ptrs + columns + HALF, mask=inside, other=OTHER).to(tl.float32)
    return low, high


@triton.jit
def _load_coefficients(
    ptr, start, groups, OTHER: tl.constexpr, HALF: tl.constexpr, BLOCK_P: tl.constexpr
):
    row = ptr + tl.full((1, 1), 0, tl.int32)
    live = tl.full((1, 1), True, tl.int1)
    return _load_pairs(row, live, start, groups, OTHER, HALF, 1, BLOCK_P)


@triton.jit
def _store_pairs(
    row_ptrs,
    low,
    high,
    live,
    start,
    groups,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    dtype: tl.constexpr = row_ptrs.dtype.element_ty
    if HALF == 1:
        columns = 2 * start + tl.arange(0, 2 * BLOCK_P)[None, :]
        inside = live & (columns < groups * 2)
        tile = tl.reshape(tl.join(low, high), (BLOCK_M, 2 * BLOCK_P))
        tl.store(row_ptrs + columns, tile.to(dtype), mask=inside)
    else:
        columns = _low_columns(start, HALF, BLOCK_P)
        inside = live & (start + tl.arange(0, BLOCK_P)[None, :] < groups * HALF)
        tl.store(row_ptrs + columns, low.to(dtype), mask=inside)
        tl.store(row_ptrs + columns + HALF, high.to(dtype), mask=inside)


@triton.jit
def _copy_tail(
    from_rows,
    to_rows,
    live,
    block,
    groups,
    width,
    HALF: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Copy one block of the features past the last pair."""
    columns = groups * (2 * HALF) + block * (2 * BLOCK_P) + tl.arange(0, 2 * BLOCK_P)[None, :]
    inside = live & (columns < width)
    tl.store(to_rows + columns, tl.load(from_rows + columns, mask=inside, other=0.0), mask=inside)
