"""The packed linear layer as torch operators: eager, compiled, exported and on meta tensors."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernels_peft._define import define
from kernels_peft.autocast import in_autocast_dtype
from kernels_peft.packed_linear.blocked import dequantize_blocked, packed_linear_backward_blocked
from kernels_peft.packed_linear.by_slot import (
    low_rank_by_slot_backward_torch,
    packed_linear_rotated_torch,
    packed_linear_torch,
)
from kernels_peft.packed_linear.checks import (
    check_backward,
    check_dequantize,
    check_linear,
    check_low_rank_by_slot,
)
from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.rotation_bank.op import check_rotation, rotate_by_slot


def packed_linear(
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
    """Give x W^T + bias + scale (lora_x A^T) B^T for a weight W of packed codes.

    The weight is not kept: the backward dequantises it again, and computes lora_x A^T again. The
    gradients are those of x, bias, A, B and lora_x; codes, scales and zero points are frozen.
    Without A and B there is no third term. `lora_x` is x after dropout, and x itself if not given.

    With `slots`, A and B are stacks of S adapters and each row has the third term of the adapter
    that its slot names. Rows of a negative slot are bit for bit those of the layer without A and B.
    An adapter of another scale or a lower rank goes into a stack with its scale multiplied into B
    and its rank filled up with zeros. On CUDA nothing waits for the device, and a captured graph
    replays with what the slots and the stacks hold by then; a slot of S or more, an error on a CPU,
    stands for no adapter there.

    Under autocast x, bias and lora_x are cast to its dtype first, as by torch's own linear layer.

    Shapes:
        x: (..., K), any float dtype. qweight: (K bits / 32, N), int32. qzeros: (G, N bits / 32),
        int32. scales: (G, N), any float dtype. bias: (N,) in the dtype of x. lora_a: A, (r, K), and
        lora_b: B, (N, r), any float dtype; both take part in the dtype of x. lora_x: as x. slots:
        (*rows), int32 or int64, below S: the leading dimensions of x, at least one and not the
        last; then lora_a: (S, r, K), lora_b: (S, N, r). Returns (..., N), the dtype of x.
    Raises:
        ValueError: an unknown width, or tensors whose shapes, dtypes or devices do not fit; on a
            CPU, a slot of S or more.
    Source:
        ApiQ (arXiv:2402.05147); the tensors of GPTQ's format 2, a run of 32 codes to `bits` words.
    """
    x, bias, lora_x = in_autocast_dtype(x, bias, lora_x)
    lora_a, lora_b = (t if t is None else t.to(x.dtype) for t in (lora_a, lora_b))
    return _PACKED_LINEAR(
        x, qweight, qzeros, scales, bias, bits, lora_a, lora_b, float(scale), lora_x, slots
    )


def packed_linear_rotated(
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
    *,
    table: Tensor,
    group_sizes: Tensor,
    rotation_slots: Tensor,
) -> Tensor:
    """Give `rotate_by_slot` of `packed_linear`, in the same launches where rows are few.

    Bias and low-rank branch are rotated too, as they belong to the layer. Rows without a rotation
    are bit for bit those of `packed_linear`. Where a gradient is wanted, this is one operator after
    the other: the gradient of the table needs what lies between them.

    Shapes:
        As `packed_linear` and `rotate_by_slot`: table: (R, 2, N), group_sizes: (R,),
        rotation_slots: (*rows). Returns (..., N), the dtype of x.
    Raises:
        ValueError: what `packed_linear` or `rotate_by_slot` refuses.
    Source:
        RoAd (arXiv:2409.00119), eq. 4, on a layer of ApiQ (arXiv:2402.05147).
    """
    x, bias, lora_x = in_autocast_dtype(x, bias, lora_x)
    packed = (qweight, qzeros, scales, bias, bits)
    trainable = (x, bias, lora_a, lora_b, lora_x, table)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trainable):
        y = packed_linear(x, *packed, lora_a, lora_b, scale, lora_x, slots)
        return rotate_by_slot(y, table, group_sizes, rotation_slots)
    lora_a, lora_b = (t if t is None else t.to(x.dtype) for t in (lora_a, lora_b))
    branch = (lora_a, lora_b, float(scale), lora_x, slots)
    return _PACKED_LINEAR_ROTATED(x, *packed, *branch, table, group_sizes, rotation_slots)


def dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Give the weight of packed codes, transposed: (K, N); see `dequantize_reference`.

    Raises:
        ValueError: an unknown width, or tensors whose shapes, dtypes or devices do not fit.
    """
    return _DEQUANTIZE(qweight, qzeros, scales, bits, dtype)


def _check_rotated(*args: Any) -> None:
    check_linear(*args[:-3])
    # the check of the rotation only asks what y is like
    check_rotation(args[0].new_empty(()).expand(_fake(*args[:2]).shape), *args[-3:])


def _fake(x: Tensor, qweight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[1])


def _fake_backward(
    grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, *others: Any
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], packed_sizes(qweight, bits)[0])


def _fake_low_rank_by_slot_backward(
    grad: Tensor,
    x: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    slots: Tensor,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty((*grad.shape[:-1], lora_a.shape[2]) if input_grad else 0),
        grad.new_empty(0 if x is None else lora_a.shape),
        grad.new_empty(0 if x is None else lora_b.shape),
    )


def _fake_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    return scales.new_empty(packed_sizes(qweight, bits), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, qzeros, scales, _, ctx.bits, lora_a, lora_b, ctx.scale, lora_x, slots = inputs
    ctx.apart = lora_x is not None
    trained = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
    branch = (lora_x if ctx.apart else x) if trained else None
    ctx.save_for_backward(qweight, qzeros, scales, branch, lora_a, lora_b, slots)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, qzeros, scales, branch, lora_a, lora_b, slots = ctx.saved_tensors
    wants = ctx.needs_input_grad
    d_low = dx = d_bias = d_a = d_b = d_branch = None
    if slots is not None:
        wanted = wants[9] if ctx.apart else wants[0]
        d_branch, d_a, d_b = _LOW_RANK_BY_SLOT_BACKWARD(
            grad, branch, lora_a, lora_b, ctx.scale, slots, wanted
        )
    elif lora_a is not None:
        d_low = torch.matmul(grad, lora_b) * ctx.scale
        if wants[6]:
            d_a = _rows(d_low).t() @ _rows(branch)
        if wants[7]:
            d_b = (_rows(grad).t() @ (_rows(branch) @ lora_a.t())) * ctx.scale
        if wants[9]:
            d_branch = torch.matmul(d_low, lora_a)
    if wants[0]:
        low = (None, None) if ctx.apart or d_low is None else (d_low, lora_a)
        dx = _PACKED_LINEAR_BACKWARD(grad, qweight, qzeros, scales, ctx.bits, *low)
        if slots is not None and not ctx.apart:
            dx = dx + d_branch
    if wants[4]:
        d_bias = _rows(grad).sum(0)
    gradients = (dx, None, None, None, d_bias, None, d_a, d_b, None, d_branch, None)
    return tuple(g if wanted else None for g, wanted in zip(gradients, wants, strict=True))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the packed linear layer has no second derivative; for one use packed_linear_reference,"
        " which autograd differentiates as often as you like"
    )


def _triton() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        return {}
    from kernels_peft.packed_linear import kernel

    return {name.removesuffix("_triton"): getattr(kernel, name) for name in kernel.__all__}


_CUDA = _triton()

_DEQUANTIZE = define(
    "dequantize(Tensor qweight, Tensor qzeros, Tensor scales, int bits, ScalarType dtype)"
    " -> Tensor",
    check=check_dequantize,
    fake=_fake_dequantize,
    implementation=dequantize_blocked,
    cuda=_CUDA.get("dequantize"),
)

_PACKED_LINEAR_BACKWARD = define(
    "packed_linear_backward(Tensor grad, Tensor qweight, Tensor qzeros, Tensor scales, int bits,"
    " Tensor? d_low, Tensor? lora_a) -> Tensor",
    check=check_backward,
    fake=_fake_backward,
    implementation=packed_linear_backward_blocked,
    cuda=_CUDA.get("packed_linear_backward"),
    backward=_no_second_derivative,
)

_LOW_RANK_BY_SLOT_BACKWARD = define(
    "low_rank_by_slot_backward(Tensor grad, Tensor? x, Tensor lora_a, Tensor lora_b, float scale,"
    " Tensor slots, bool input_grad) -> (Tensor, Tensor, Tensor)",
    check=check_low_rank_by_slot,
    fake=_fake_low_rank_by_slot_backward,
    implementation=low_rank_by_slot_backward_torch,
    cuda=_CUDA.get("low_rank_by_slot_backward"),
    backward=_no_second_derivative,
)

_ARGUMENTS = (
    "Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? bias, int bits,"
    " Tensor? lora_a, Tensor? lora_b, float scale, Tensor? lora_x, Tensor? slots"
)

_PACKED_LINEAR = define(
    f"packed_linear({_ARGUMENTS}) -> Tensor",
    check=check_linear,
    fake=_fake,
    implementation=packed_linear_torch,
    cuda=_CUDA.get("packed_linear"),
    setup_context=_setup_context,
    backward=_backward,
)

_PACKED_LINEAR_ROTATED = define(
    f"packed_linear_rotated({_ARGUMENTS}, Tensor table, Tensor group_sizes, Tensor rotation_slots)"
    " -> Tensor",
    check=_check_rotated,
    fake=_fake,
    implementation=packed_linear_rotated_torch,
    cuda=_CUDA.get("packed_linear_rotated"),
)
