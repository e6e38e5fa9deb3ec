"""The packed linear layer as torch operators: eager, compiled, exported and on meta tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_peft._define import define
from kernels_peft.packed_linear.reference import (
    dequantize_reference,
    packed_linear_reference,
    packed_sizes,
)
from kernels_peft.packing import FORMATS, RUN


def packed_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Give x W^T + bias for a weight of packed codes, without keeping the weight.

    Autograd keeps the packed tensors only, and dequantises again in the backward. The gradients are
    those of x and of the bias; codes, scales and zero points are frozen.

    Shapes:
        x: (..., K), any float dtype. qweight: (K bits / 32, N), int32. qzeros: (G, N bits / 32),
        int32. scales: (G, N), any float dtype. bias: (N,) in the dtype of x. Returns (..., N).
    Raises:
        ValueError: an unknown width, or tensors whose shapes, dtypes or devices do not fit.
    Source:
        The tensors of GPTQ's format 2, one run of 32 codes to `bits` words.
    """
    return _PACKED_LINEAR(x, qweight, qzeros, scales, bias, bits)


def dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Give the weight of packed codes, transposed: (K, N); see `dequantize_reference`.

    Raises:
        ValueError: an unknown width, or tensors whose shapes, dtypes or devices do not fit.
    """
    return _DEQUANTIZE(qweight, qzeros, scales, bits, dtype)


def check_packed(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> None:
    """Refuse packed tensors that do not belong together.

    Raises:
        ValueError: says what was given, what is allowed and what to do.
    """
    if bits not in FORMATS:
        raise ValueError(f"bits is {bits}; choose from {', '.join(map(str, FORMATS))}")
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32 or tensor.dim() != 2:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; it must be a"
                " matrix of int32"
            )
    if scales.dim() != 2 or not scales.is_floating_point():
        raise ValueError(
            f"scales has shape {tuple(scales.shape)} and dtype {scales.dtype}; it must be a matrix"
            " of a floating-point dtype"
        )
    (K, N), G = packed_sizes(qweight, bits), scales.shape[0]
    if qweight.shape[0] % bits or G == 0 or K % G or N % RUN:
        raise ValueError(
            f"qweight is {tuple(qweight.shape)} for {bits} bits and {G} groups; its rows must be a"
            f" multiple of {bits}, K = {K} inputs a multiple of the groups, and N a multiple of"
            f" {RUN}"
        )
    if scales.shape[1] != N or tuple(qzeros.shape) != (G, N * bits // RUN):
        raise ValueError(
            f"qweight is for {N} outputs, but scales is {tuple(scales.shape)} and qzeros"
            f" {tuple(qzeros.shape)}; they must be {(G, N)} and {(G, N * bits // RUN)}"
        )
    if not qweight.device == qzeros.device == scales.device:
        raise ValueError(
            f"qweight, qzeros and scales are on {qweight.device}, {qzeros.device} and"
            f" {scales.device}; move them to one device"
        )


def _check(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int
) -> None:
    check_packed(qweight, qzeros, scales, bits)
    K, N = packed_sizes(qweight, bits)
    if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != K or x.device != qweight.device:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, dtype {x.dtype} and is on {x.device}; it must be a"
            f" floating-point tensor (..., {K}) on {qweight.device}"
        )
    if bias is not None and (tuple(bias.shape), bias.dtype) != ((N,), x.dtype):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)} and dtype {bias.dtype}; it must be ({N},) in the"
            f" dtype of x, {x.dtype}"
        )


def _check_backward(
    grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int
) -> None:
    check_packed(qweight, qzeros, scales, bits)


def _fake(x: Tensor, qweight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[1])


def _fake_backward(
    grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], packed_sizes(qweight, bits)[0])


def _fake_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    return scales.new_empty(packed_sizes(qweight, bits), dtype=dtype)


def _backward_of_x(
    grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int
) -> Tensor:
    return grad @ dequantize_reference(qweight, qzeros, scales, bits, grad.dtype).t()


def _check_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> None:
    check_packed(qweight, qzeros, scales, bits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, qweight, qzeros, scales, _, ctx.bits = inputs
    ctx.save_for_backward(qweight, qzeros, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    return (
        _PACKED_LINEAR_BACKWARD(grad, *ctx.saved_tensors, ctx.bits) if wants_x else None,
        None,
        None,
        None,
        grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None,
        None,
    )


_DEQUANTIZE = define(
    "dequantize(Tensor qweight, Tensor qzeros, Tensor scales, int bits, ScalarType dtype)"
    " -> Tensor",
    check=_check_dequantize,
    fake=_fake_dequantize,
    implementation=dequantize_reference,
)

_PACKED_LINEAR_BACKWARD = define(
    "packed_linear_backward(Tensor grad, Tensor qweight, Tensor qzeros, Tensor scales, int bits)"
    " -> Tensor",
    check=_check_backward,
    fake=_fake_backward,
    implementation=_backward_of_x,
)

_PACKED_LINEAR = define(
    "packed_linear(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? bias, int bits)"
    " -> Tensor",
    check=_check,
    fake=_fake,
    implementation=packed_linear_reference,
    setup_context=_setup_context,
    backward=_backward,
)
