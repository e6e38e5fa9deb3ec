"""Inputs of the rotation by slot for its test files, and its values in double precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels_peft import rotate_by_slot_reference
from tests.helpers import dense_rotation


class BankInputs(NamedTuple):
    x: Tensor
    table: Tensor
    group_sizes: Tensor
    slots: Tensor
    grad: Tensor


def make_bank(
    shape: tuple[int, ...],
    group_sizes: list[int],
    slots: list[int] | Tensor,
    dtype: torch.dtype = torch.float32,
) -> BankInputs:
    """Draw x, a gradient and a table of near identities; a list of slots is for the rows of x."""
    wide = torch.promote_types(dtype, torch.float32)
    table = 0.2 * torch.randn(len(group_sizes), 2, shape[-1], dtype=wide)
    table[:, 0] += 1
    return BankInputs(
        torch.randn(shape, dtype=wide).to(dtype),
        table,
        torch.tensor(group_sizes, dtype=torch.int32),
        torch.as_tensor(slots),
        torch.randn(shape, dtype=wide).to(dtype),
    )


def bank_gradients(inputs: BankInputs) -> dict[str, Tensor]:
    """Differentiate `rotate_by_slot_reference` in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (inputs.x, inputs.table)]
    y = rotate_by_slot_reference(*leaves, inputs.group_sizes, inputs.slots)
    gradients = torch.autograd.grad(
        y + 0 * leaves[0], leaves, inputs.grad.double(), allow_unused=True, materialize_grads=True
    )
    return dict(zip(("x", "table"), gradients, strict=True))


def row_by_row(inputs: BankInputs) -> Tensor:
    """Multiply every row by the dense matrix of its slot, in float64 and one at a time."""
    x, width = inputs.x.double(), inputs.x.shape[-1]
    if x.numel() == 0:
        return x
    tokens = x.reshape(inputs.slots.numel(), -1, width)
    out = tokens.clone()
    for row, slot in enumerate(inputs.slots.flatten().tolist()):
        size = int(inputs.group_sizes[slot]) if slot >= 0 else 0
        if size:
            n = width // size * size
            first, second = inputs.table[slot, :, :n].double()
            out[row] = tokens[row] @ dense_rotation(first, second, size, width).T
    return out.view(x.shape)


def bits(tensor: Tensor) -> Tensor:
    """Give the bytes of each number, for comparisons that know NaNs and zeros apart."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def odd_numbers(dtype: torch.dtype, count: int) -> Tensor:
    """Repeat NaNs with two payloads and signs, infinities and negative zero."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinity = bits(torch.tensor([float("inf")], dtype=dtype))
    values = torch.cat((infinity, infinity + 1, infinity + 3)).view(dtype)
    plain = torch.tensor([-0.0, float("-inf"), float("nan"), -float("nan"), 1.5], dtype=dtype)
    numbers = torch.cat((values, plain)).view(integers)
    return numbers.repeat(-(-count // len(numbers)))[:count].view(dtype)
