"""Rounding to a grid and back as a torch operator: eager, compiled, exported, on meta tensors."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernels_peft._define import define
from kernels_peft.fake_quantization.blocked import (
    fake_quantize_backward_blocked,
    fake_quantize_blocked,
)
from kernels_peft.packing import FORMATS


def fake_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Give the values that `weight` has after rounding to a grid of 2**bits levels.

    A group of g consecutive inputs shares a scale s and a zero point z:
    Q = (clamp(round(w / s) + z, 0, 2**bits - 1) - z) * s, rounding halves to even. Only the scale
    has a gradient: it takes rounding for the identity (straight through) and is that of the clamp
    otherwise. Autograd keeps weight, scale and zero, and nothing else. Arithmetic is in the dtype
    of scale, and the values round once more to theirs.

    Shapes:
        weight: (N, K), any float dtype, finite, any strides. scale, zero: (N, K / g), float32
        (float64 if weight is); zero holds whole numbers. Returns (N, K) in `dtype`, or else the
        dtype of weight, contiguous.
    Raises:
        ValueError: an unknown width, a tensor of a shape, dtype or device that does not fit, or a
            weight that needs a gradient.
    Source:
        ApiQ (arXiv:2402.05147), the quantiser of OmniQuant (arXiv:2308.13137).
    """
    return _FAKE_QUANTIZE(weight, scale, zero, bits, dtype or weight.dtype)


def _check(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> None:
    if bits not in FORMATS:
        raise ValueError(f"bits is {bits}; choose from {', '.join(map(str, FORMATS))}")
    if weight.dim() != 2 or not weight.is_floating_point() or not dtype.is_floating_point:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype} and is to become"
            f" {dtype}; it must be a matrix, and both dtypes floating-point"
        )
    N, K = weight.shape
    if scale.dim() != 2 or scale.shape[0] != N or scale.shape[1] == 0 or K % scale.shape[1]:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; for a weight of {N} x {K} it must be ({N},"
            f" groups), where the groups of a row divide its {K} inputs"
        )
    if scale.dtype != torch.float32 and not scale.dtype == weight.dtype == torch.float64:
        raise ValueError(
            f"scale has dtype {scale.dtype}; it must be float32 (or float64 if weight is)"
        )
    if zero.shape != scale.shape or zero.dtype != scale.dtype:
        raise ValueError(
            f"zero has shape {tuple(zero.shape)} and dtype {zero.dtype}; it must be"
            f" {tuple(scale.shape)} and {scale.dtype} as scale is"
        )
    if not weight.device == scale.device == zero.device:
        raise ValueError(
            f"weight, scale and zero are on {weight.device}, {scale.device} and {zero.device}; move"
            " them to one device"
        )


def _check_backward(grad: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> None:
    _check(weight, scale, zero, bits, grad.dtype)
    if grad.shape != weight.shape or grad.device != weight.device:
        raise ValueError(
            f"grad is {tuple(grad.shape)} on {grad.device}, weight {tuple(weight.shape)} on"
            f" {weight.device}; both must be alike"
        )


def _fake(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.empty_like(scale, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if ctx.needs_input_grad[0]:
        raise ValueError(
            "weight requires a gradient, and fake_quantize has one for the scale only; give"
            " weight.detach(), or use fake_quantize_reference, which lets it pass straight through"
        )
    *saved, ctx.bits, _ = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_scale = None
    if ctx.needs_input_grad[1]:
        d_scale = _FAKE_QUANTIZE_BACKWARD(grad, *ctx.saved_tensors, ctx.bits)
    return None, d_scale, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "fake quantisation has no second derivative; for one use fake_quantize_reference, which"
        " autograd differentiates as often as you like"
    )


def _triton() -> tuple[Any, Any]:
    if importlib.util.find_spec("triton") is None:
        return None, None
    from kernels_peft.fake_quantization import kernel

    return kernel.fake_quantize_triton, kernel.fake_quantize_backward_triton


_CUDA, _CUDA_BACKWARD = _triton()

_FAKE_QUANTIZE_BACKWARD = define(
    "fake_quantize_backward(Tensor grad, Tensor weight, Tensor scale, Tensor zero, int bits)"
    " -> Tensor",
    check=_check_backward,
    fake=_fake_backward,
    implementation=fake_quantize_backward_blocked,
    cuda=_CUDA_BACKWARD,
    backward=_no_second_derivative,
)

_FAKE_QUANTIZE = define(
    "fake_quantize(Tensor weight, Tensor scale, Tensor zero, int bits, ScalarType dtype) -> Tensor",
    check=_check,
    fake=_fake,
    implementation=fake_quantize_blocked,
    cuda=_CUDA,
    setup_context=_setup_context,
    backward=_backward,
)
