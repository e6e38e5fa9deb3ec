"""The rotation by slot as a torch operator: eager, compiled, exported and on meta tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_peft._define import define
from kernels_peft.rotation_bank.blocked import (
    rotate_by_slot_backward_blocked,
    rotate_by_slot_blocked,
)

_PLAIN = (Tensor, torch.nn.Parameter)  # not a fake, a distributed or another wrapped tensor
_INTEGERS = (torch.int32, torch.int64)


def rotate_by_slot(x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor) -> Tensor:
    """Rotate every row of `x` by the coefficients of its slot.

    Row r takes `table[slots[r]]`, two vectors (first, second) for groups of `group_sizes[slots[r]]`
    features; `rotate` says what they do. Slots may repeat, in any order, and their group sizes may
    differ. Rows of a negative slot, and of a slot whose group size is 0, come back bit for bit, as
    do the features past the last whole group. Arithmetic is in float32 and rounds once. On CUDA
    nothing waits for the device, and a captured graph replays with what `table`, `group_sizes` and
    `slots` hold by then; a value that is an error on a CPU stands for no rotation there.

    Shapes:
        x: (*rows, ..., d), any float dtype, any strides. table: (S, 2, d), float32 (float64 if x
        is). group_sizes: (S,), int32 or int64, each even or 0. slots: (*rows), int32 or int64,
        below S: the leading dimensions of x, at least one and not the last. Returns the shape and
        dtype of x, contiguous.
    Raises:
        ValueError: a tensor is not of a shape or dtype that fits, the tensors are on several
            devices, or, on a CPU, a slot is S or more or a group size is odd or negative.
    Source:
        RoAd (arXiv:2409.00119), section 2.2 and eq. 4; group sizes as in PEFT.
    """
    if type(x) in _PLAIN and x.device.type == "cpu" and not torch.compiler.is_compiling():
        check_rotation(x, table, group_sizes, slots)
        if torch.is_grad_enabled() and (x.requires_grad or table.requires_grad):
            return _Eager.apply(x, table, group_sizes, slots)
        return rotate_by_slot_blocked(x, table, group_sizes, slots)
    return _ROTATE(x, table, group_sizes, slots)


def check_rotation(x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor) -> None:
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; it must have at least two"
            " dimensions, rows and features, and a floating-point dtype"
        )
    if table.dim() != 3 or table.shape[1] != 2 or table.shape[2] != x.shape[-1]:
        raise ValueError(
            f"table has shape {tuple(table.shape)}; for {x.shape[-1]} features it must be"
            f" (slots, 2, {x.shape[-1]})"
        )
    if table.dtype != torch.float32 and not table.dtype == x.dtype == torch.float64:
        raise ValueError(f"table has dtype {table.dtype}; it must be float32 (or float64 if x is)")
    if group_sizes.dim() != 1 or group_sizes.shape[0] != table.shape[0]:
        raise ValueError(
            f"group_sizes has shape {tuple(group_sizes.shape)}; it must hold one size for each of"
            f" the {table.shape[0]} slots of the table"
        )
    if not 1 <= slots.dim() < x.dim() or slots.shape != x.shape[: slots.dim()]:
        raise ValueError(
            f"slots has shape {tuple(slots.shape)} and x {tuple(x.shape)}; slots must have the"
            " leading dimensions of x, at least one and not the last"
        )
    if group_sizes.dtype not in _INTEGERS or slots.dtype not in _INTEGERS:
        raise ValueError(
            f"group_sizes and slots have dtypes {group_sizes.dtype} and {slots.dtype}; each must be"
            " int32 or int64"
        )
    if not x.device == table.device == group_sizes.device == slots.device:
        raise ValueError(
            f"x, table, group_sizes and slots are on {x.device}, {table.device},"
            f" {group_sizes.device} and {slots.device}; move them to one device"
        )


def _check_backward(
    grad: Tensor, x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor, *flags: bool
) -> None:
    check_rotation(grad, table, group_sizes, slots)
    if flags[-1] and (x.shape, x.dtype, x.device) != (grad.shape, grad.dtype, grad.device):
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}, grad {tuple(grad.shape)} {grad.dtype}"
            f" on {grad.device}; both must be alike"
        )


def _fake(x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    group_sizes: Tensor,
    slots: Tensor,
    input_grad: bool,
    table_grad: bool,
) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape if input_grad else 0),
        table.new_empty(table.shape if table_grad else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, table, group_sizes, slots = inputs
    # the gradient of x needs nothing of its size
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else x.new_empty(0), table, group_sizes, slots
    )


def _backward(
    ctx: Any, grad: Tensor, run: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    wants_x, wants_table = ctx.needs_input_grad[:2]
    dx, d_table = (run or _ROTATE_BACKWARD)(grad, *ctx.saved_tensors, wants_x, wants_table)
    return dx if wants_x else None, d_table if wants_table else None, None, None


class _Eager(torch.autograd.Function):
    """The operator on a CPU without the dispatcher, which costs more than a small rotation."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = rotate_by_slot_blocked(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # only the operator refuses a second derivative by name
        run = None if torch.is_grad_enabled() else rotate_by_slot_backward_blocked
        return _backward(ctx, grad, run)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the rotation by slot has no second derivative; for one use rotate_by_slot_reference, which"
        " autograd differentiates as often as you like"
    )


def _triton() -> tuple[Any, Any]:
    if importlib.util.find_spec("triton") is None:
        return None, None
    from kernels_peft.rotation_bank import kernel

    return kernel.rotate_by_slot_triton, kernel.rotate_by_slot_backward_triton


_CUDA, _CUDA_BACKWARD = _triton()

_ROTATE_BACKWARD = define(
    "rotate_by_slot_backward(Tensor grad, Tensor x, Tensor table, Tensor group_sizes, Tensor slots,"
    " bool input_grad, bool table_grad) -> (Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    implementation=rotate_by_slot_backward_blocked,
    cuda=_CUDA_BACKWARD,
    backward=_no_second_derivative,
)

_ROTATE = define(
    "rotate_by_slot(Tensor x, Tensor table, Tensor group_sizes, Tensor slots) -> Tensor",
    check=check_rotation,
    fake=_fake,
    implementation=rotate_by_slot_blocked,
    cuda=_CUDA,
    setup_context=_setup_context,
    backward=_backward,
)
