"""The rotation as a torch operator: eager, compiled, exported and on meta tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_peft._define import define
from kernels_peft.rotation.blocked import rotate_backward_blocked, rotate_blocked

_PLAIN = (Tensor, torch.nn.Parameter)  # not a fake, a distributed or another wrapped tensor


def rotate(
    x: Tensor, first: Tensor, second: Tensor, group_size: int, *, recompute: bool = False
) -> Tensor:
    """Rotate and scale each pair of features of `x`.

    Within a group of g features, i is paired with i + g/2:  y = first * x + second * turn(x), where
    turn sends a pair (l, h) to (-h, l). Features past the last coefficient pass unchanged.
    Arithmetic is in float32 and rounds once. The backward needs x, one tensor of its size in its
    dtype; with `recompute` it keeps y instead, which the next operation mostly keeps anyway, and
    recovers x by the inverse of each block: no block may be singular.

    Shapes:
        x: (..., d), any float dtype, any strides. first, second: (n,), float32, n <= d a multiple
        of group_size (float64 if x is). Returns (..., d), contiguous, the dtype of x.
    Raises:
        ValueError: group_size is not even and positive, a coefficient vector is not of a length
            or dtype that fits, or the tensors are on several devices.
    Source:
        RoAd (arXiv:2409.00119), eq. 4; pairs lie g/2 apart as in PEFT, g = 2 is the paper's.
    """
    if type(x) in _PLAIN and x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check(x, first, second, group_size)
        return _Eager.apply(x, first, second, group_size, recompute)
    return _ROTATE(x, first, second, group_size, recompute)


def _check(
    x: Tensor, first: Tensor, second: Tensor, group_size: int, recompute: bool = False
) -> None:
    if group_size <= 0 or group_size % 2:
        raise ValueError(f"group_size is {group_size}; it must be even and positive")
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; it must have at least one dimension"
            " and a floating-point dtype"
        )
    if first.dim() != 1 or first.shape != second.shape:
        raise ValueError(
            f"first and second have shapes {tuple(first.shape)} and {tuple(second.shape)}; both"
            " must be vectors of one length"
        )
    if first.shape[0] > x.shape[-1] or first.shape[0] % group_size:
        raise ValueError(
            f"there are {first.shape[0]} coefficients for {x.shape[-1]} features; their number must"
            f" be a multiple of group_size ({group_size}) and not exceed the features"
        )
    if first.dtype != second.dtype or first.dtype not in (
        torch.float32,
        torch.promote_types(x.dtype, torch.float32),
    ):
        raise ValueError(
            f"first and second have dtypes {first.dtype} and {second.dtype}; both must be float32"
            " (or float64 if x is)"
        )
    if not x.device == first.device == second.device:
        raise ValueError(
            f"x, first and second are on {x.device}, {first.device} and {second.device}; move them"
            " to one device"
        )


def _check_backward(
    grad: Tensor, saved: Tensor, first: Tensor, second: Tensor, group_size: int, *flags: bool
) -> None:
    _check(grad, first, second, group_size)
    if flags[-1] and (saved.shape, saved.dtype, saved.device) != (
        grad.shape,
        grad.dtype,
        grad.device,
    ):
        raise ValueError(
            f"saved is {tuple(saved.shape)} {saved.dtype} on {saved.device}, grad"
            f" {tuple(grad.shape)} {grad.dtype} on {grad.device}; both must be alike"
        )


def _fake(x: Tensor, first: Tensor, second: Tensor, group_size: int, recompute: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor,
    saved: Tensor,
    first: Tensor,
    second: Tensor,
    group_size: int,
    saved_is_output: bool,
    input_grad: bool,
    coefficient_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape if input_grad else 0),
        first.new_empty(first.shape if coefficient_grad else 0),
        second.new_empty(second.shape if coefficient_grad else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, first, second, ctx.group_size, ctx.recompute = inputs
    needs_saved = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    saved = (output if ctx.recompute else x) if needs_saved else x.new_empty(0)
    ctx.save_for_backward(saved, first, second)


def _backward(
    ctx: Any, grad: Tensor, run: Callable[..., Any] | None = None
) -> tuple[Tensor | None, ...]:
    saved, first, second = ctx.saved_tensors
    wants_x, wants_first, wants_second = ctx.needs_input_grad[:3]
    dx, d_first, d_second = (run or _ROTATE_BACKWARD)(
        grad,
        saved,
        first,
        second,
        ctx.group_size,
        ctx.recompute,
        wants_x,
        wants_first or wants_second,
    )
    return (
        dx if wants_x else None,
        d_first if wants_first else None,
        d_second if wants_second else None,
        None,
        None,
    )


class _Eager(torch.autograd.Function):
    """The operator on a CPU without the dispatcher, which costs more than a small rotation."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = rotate_blocked(*inputs[:4])
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # only the operator refuses a second derivative by name
        return _backward(ctx, grad, None if torch.is_grad_enabled() else rotate_backward_blocked)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the rotation has no second derivative; for one use rotate_reference, which autograd"
        " differentiates as often as you like"
    )


def _composite_rotate(
    x: Tensor, first: Tensor, second: Tensor, group_size: int, recompute: bool
) -> Tensor:
    return rotate_blocked(x, first, second, group_size)


def _triton() -> tuple[Any, Any]:
    if importlib.util.find_spec("triton") is None:
        return None, None
    from kernels_peft.rotation.kernel import rotate_backward_triton, rotate_triton

    def run(x: Tensor, first: Tensor, second: Tensor, group_size: int, recompute: bool) -> Tensor:
        return rotate_triton(x, first, second, group_size)

    return run, rotate_backward_triton


_CUDA, _CUDA_BACKWARD = _triton()

_ROTATE_BACKWARD = define(
    "rotate_backward(Tensor grad, Tensor saved, Tensor first, Tensor second, int group_size,"
    " bool saved_is_output, bool input_grad, bool coefficient_grad) -> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_fake_backward,
    implementation=rotate_backward_blocked,
    cuda=_CUDA_BACKWARD,
    backward=_no_second_derivative,
)

_ROTATE = define(
    "rotate(Tensor x, Tensor first, Tensor second, int group_size, bool recompute) -> Tensor",
    check=_check,
    fake=_fake,
    implementation=_composite_rotate,
    cuda=_CUDA,
    setup_context=_setup_context,
    backward=_backward,
)
