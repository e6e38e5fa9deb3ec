"""What follows the product of a packed weight, in plain torch without autograd: by slot, rotated.

The values of `slots` are at hand on a CPU, so the rows of one adapter are multiplied together: the
number of calls grows with the distinct adapters of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_peft.packed_linear.blocked import packed_linear_blocked
from kernels_peft.rotation_bank.blocked import rotate_by_slot_blocked


def packed_linear_torch(
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
) -> Tensor:
    """Compute what `packed_linear_reference` computes.

    Shapes:
        As `packed_linear_reference`.
    Raises:
        ValueError: a slot is S or more.
    """
    packed = (qweight, qzeros, scales, bias, bits)
    if slots is None or lora_a is None or lora_b is None:
        return packed_linear_blocked(x, *packed, lora_a, lora_b, scale, lora_x)
    y = packed_linear_blocked(x, *packed)
    branch, target = _by_slot(x if lora_x is None else lora_x, slots), _by_slot(y, slots)
    wide = torch.promote_types(x.dtype, torch.float32)
    for slot, rows in _rows_of_slots(slots, len(lora_a)):
        low = F.linear(branch[rows].to(wide), lora_a[slot].to(wide))
        delta = F.linear(low, lora_b[slot].to(wide)).mul_(scale)
        target[rows] = (target[rows] + delta).to(y.dtype)
    return y


def packed_linear_rotated_torch(
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
    """Compute `rotate_by_slot` of what `packed_linear_torch` computes.

    Shapes:
        As `packed_linear_reference`. table: (R, 2, N). group_sizes: (R,). rotation_slots: (*rows).
    """
    y = packed_linear_torch(
        x, qweight, qzeros, scales, bias, bits, lora_a, lora_b, scale, lora_x, slots
    )
    return rotate_by_slot_blocked(y, table, group_sizes, rotation_slots)


def low_rank_by_slot_backward_torch(
    grad: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    slots: Tensor,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of x, if asked for, and of A and B, if x is given; else empty.

    Shapes:
        grad: (*rows, ..., N). x: (*rows, ..., K). lora_a: (S, r, K). lora_b: (S, N, r). slots:
        (*rows). Returns tensors like x, lora_a and lora_b, in the dtype of grad.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    dx, d_a, d_b = (grad.new_empty(0) for _ in range(3))
    if input_grad:
        dx = grad.new_zeros(*grad.shape[:-1], lora_a.shape[2])
        d_target = _by_slot(dx, slots)
    if x is not None:
        d_a, d_b = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
        branch = _by_slot(x, slots)
    cut = _by_slot(grad, slots)
    for slot, rows in _rows_of_slots(slots, len(lora_a)):
        g, a = cut[rows].to(wide), lora_a[slot].to(wide)
        d_low = torch.matmul(g, lora_b[slot].to(wide)).mul_(scale)
        if input_grad:
            d_target[rows] = torch.matmul(d_low, a).to(grad.dtype)
        if x is not None:
            given = branch[rows].to(wide).flatten(0, 1)
            d_a[slot] = d_low.flatten(0, 1).t() @ given
            d_b[slot] = (g.flatten(0, 1).t() @ F.linear(given, a)).mul_(scale)
    return dx, d_a, d_b


def _by_slot(x: Tensor, slots: Tensor) -> Tensor:
    """View x as (slots, rows of each, features); of a strided x this is a copy."""
    return x.reshape(slots.numel(), math.prod(x.shape[slots.dim() : -1]), x.shape[-1])


def _rows_of_slots(slots: Tensor, count: int) -> Iterator[tuple[int, Tensor | slice]]:
    """Give every slot in use with the places that name it."""
    chosen = slots.flatten()
    used = sorted(set(chosen.tolist()))
    if used and used[-1] >= count:
        raise ValueError(
            f"slots holds {used[-1]}, but there are {count} adapters; give a slot below that, or a"
            " negative one for a row without an adapter"
        )
    for slot in used:
        if slot >= 0:
            yield slot, slice(None) if len(used) == 1 else (chosen == slot).nonzero().squeeze(1)
