"""The packed linear layer on a GPU: which kernels, for few rows and for many.

Few rows: the codes are multiplied as they are unpacked, in parts that a second launch adds up, and
with them everything that follows the product. Many rows: the weight is written out once, and the
product is that of the library. Grids depend on shapes alone, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_peft.outputs import in_shape
from kernels_peft.packed_linear.blocked import packed_linear_backward_blocked
from kernels_peft.packed_linear.by_slot import (
    low_rank_by_slot_backward_torch,
    packed_linear_rotated_torch,
    packed_linear_torch,
)
from kernels_peft.packed_linear.kernel import tiles
from kernels_peft.packed_linear.kernel.dequantization import dequantize_triton, served
from kernels_peft.packed_linear.kernel.finish import LowRank, Rotation, finish
from kernels_peft.packed_linear.kernel.low_rank import low_rank_in_parts
from kernels_peft.packed_linear.kernel.product import product_in_parts
from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.rotation.kernel import DTYPES, as_rows
from kernels_peft.rotation_bank.kernel import rotate_by_slot_triton


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
    slots: Tensor | None = None,
) -> Tensor:
    """Compute what `packed_linear_torch` computes, on the device of `x`.

    Shapes:
        x: (..., K). bias: (N,). lora_a: (r, K). lora_b: (N, r). lora_x: (..., K). With slots, A and
        B are (S, r, K) and (S, N, r). Returns (..., N).
    """
    if not served(x.dtype, qweight, scales, bits):
        return packed_linear_torch(
            x, qweight, qzeros, scales, bias, bits, lora_a, lora_b, scale, lora_x, slots
        )
    shape = (*x.shape[:-1], qweight.shape[1])
    packed = (qweight, qzeros, scales, bits)
    return in_shape(_layer(x, packed, bias, lora_a, lora_b, scale, lora_x, slots, None), shape)


def packed_linear_rotated_triton(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bits: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    lora_x: Tensor | None,
    slots: Tensor | None,
    table: Tensor,
    group_sizes: Tensor,
    rotation_slots: Tensor,
) -> Tensor:
    """Compute what `packed_linear_rotated_torch` computes, on the device of `x`.

    Shapes:
        As `packed_linear_triton`. table: (R, 2, N). group_sizes: (R,). rotation_slots: (*rows). A
        slot of R or more, and an odd or negative group size, stand for no rotation.
    """
    rotation = Rotation(table, group_sizes, rotation_slots)
    if not served(x.dtype, qweight, scales, bits):
        return packed_linear_rotated_torch(
            x, qweight, qzeros, scales, bias, bits, lora_a, lora_b, scale, lora_x, slots, *rotation
        )
    shape = (*x.shape[:-1], qweight.shape[1])
    packed = (qweight, qzeros, scales, bits)
    return in_shape(_layer(x, packed, bias, lora_a, lora_b, scale, lora_x, slots, rotation), shape)


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
    if not served(grad.dtype, qweight, scales, bits):
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
        return in_shape(dx, shape)
    with torch.cuda.device_of(grad):
        parts = product_in_parts(rows, qweight, qzeros, scales, bits, transposed=True)
        if low is None or lora_a is None:
            return in_shape(finish(parts, grad.dtype), shape)
        branch = LowRank(low.contiguous()[None], lora_a.t())
        return in_shape(finish(parts, grad.dtype, low_rank=branch), shape)


def low_rank_by_slot_backward_triton(
    grad: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    slots: Tensor,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `low_rank_by_slot_backward_torch` computes, without waiting for the device.

    Shapes:
        grad: (*rows, ..., N). x: (*rows, ..., K) or None. lora_a: (S, r, K). lora_b: (S, N, r).
        slots: (*rows). Returns (*rows, ..., K), or (0,) if not asked for, and the gradients of A
        and B, (0,) without x.
    """
    if grad.dtype not in DTYPES:
        return low_rank_by_slot_backward_torch(grad, x, lora_a, lora_b, scale, slots, input_grad)
    dx, d_a, d_b = (grad.new_empty(0) for _ in range(3))
    shape = (*grad.shape[:-1], lora_a.shape[2])
    if grad.numel() == 0:
        zeros = (dx, dx) if x is None else (torch.zeros_like(lora_a), torch.zeros_like(lora_b))
        return (grad.new_empty(shape) if input_grad else dx, *zeros)
    g_rows = as_rows(grad)
    with torch.cuda.device_of(grad):
        low = low_rank_in_parts(g_rows, lora_b.mT, slots).sum(0)
        d_low = (low * scale).to(grad.dtype)
        if input_grad:
            none = d_low.new_empty((0, len(g_rows), shape[-1]))
            branch = LowRank(d_low[None], lora_a.mT, slots=slots)
            dx = in_shape(finish(none, grad.dtype, low_rank=branch), shape)
        if x is not None:
            x_rows = as_rows(x)
            low = low_rank_in_parts(x_rows, lora_a, slots).sum(0).to(x.dtype)
            chosen = slots.reshape(-1, 1).expand(-1, len(g_rows) // slots.numel()).reshape(-1)
            d_a = _outer_by_slot(d_low, x_rows, chosen, len(lora_a))
            d_b = _outer_by_slot(low, g_rows, chosen, len(lora_a)).mul_(scale).mT.contiguous()
    return dx, d_a, d_b


def _outer_by_slot(low: Tensor, rows: Tensor, slots: Tensor, count: int) -> Tensor:
    """Sum low^T rows over the rows of each slot: (count, r, width).

    One product, of `count` times the width that a row needs and zeros in between: thin beside that
    of the layer for tens of adapters, and no grouping that would wait for the device.
    """
    every = torch.arange(count, device=slots.device)
    own = (slots[:, None] == every)[:, :, None]
    spread = torch.where(own, low[:, None, :], 0).flatten(1)
    return in_shape(spread.t() @ rows, (count, low.shape[1], rows.shape[1]))


def _fused(rows: Tensor) -> bool:
    return len(rows) <= tiles.FUSED_ROWS and rows.dtype in tiles.FUSED_DTYPES


def _layer(
    x: Tensor,
    packed: tuple[Tensor, Tensor, Tensor, int],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    lora_x: Tensor | None,
    slots: Tensor | None,
    rotation: Rotation | None,
) -> Tensor:
    """Give the layer and its rotation as a matrix (M, N)."""
    N = packed[0].shape[1]
    if x.numel() == 0 or N == 0:
        return x.new_empty((x.shape[:-1].numel(), N))
    rows = as_rows(x)
    branch = rows if lora_x is None else as_rows(lora_x)
    low_rank = None
    with torch.cuda.device_of(x):
        if lora_a is not None and lora_b is not None and (_fused(rows) or slots is not None):
            low_rank = LowRank(low_rank_in_parts(branch, lora_a, slots), lora_b, scale, slots)
        if _fused(rows):
            parts = product_in_parts(rows, *packed, transposed=False)
            return finish(parts, x.dtype, bias, low_rank, rotation)
        weight = dequantize_triton(*packed, x.dtype)
        y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        if low_rank is not None:
            return finish(y[None], x.dtype, None, low_rank, rotation)
        if lora_a is not None and lora_b is not None:
            y.addmm_(branch @ lora_a.t(), lora_b.t(), alpha=scale)
    return y if rotation is None else _rotate(y, x, rotation)


def _rotate(y: Tensor, x: Tensor, rotation: Rotation) -> Tensor:
    return in_shape(rotate_by_slot_triton(y.view(*x.shape[:-1], -1), *rotation), y.shape)
