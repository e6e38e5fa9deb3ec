"""The packed linear layer as torch operators: eager, compiled, exported and on meta tensors."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from kernels_peft._define import define
from kernels_peft.packed_linear.blocked import (
    dequantize_blocked,
    packed_linear_backward_blocked,
    packed_linear_blocked,
)
from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.packing import FORMATS, RUN


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
) -> Tensor:
    """Give x W^T + bias + scale (lora_x A^T) B^T for a weight W of packed codes.

    The weight is not kept: the backward dequantises it again, and computes lora_x A^T again. The
    gradients are those of x, bias, A, B and lora_x; codes, scales and zero points are frozen.
    Without A and B there is no third term. `lora_x` is x after dropout, and x itself if not given.

    Shapes:
        x: (..., K), any float dtype. qweight: (K bits / 32, N), int32. qzeros: (G, N bits / 32),
        int32. scales: (G, N), any float dtype. bias: (N,) in the dtype of x. lora_a: A, (r, K), and
        lora_b: B, (N, r), any float dtype; both take part in the dtype of x. lora_x: as x. Returns
        (..., N), the dtype of x.
    Raises:
        ValueError: an unknown width, or tensors whose shapes, dtypes or devices do not fit.
    Source:
        ApiQ (arXiv:2402.05147); the tensors of GPTQ's format 2, a run of 32 codes to `bits` words.
    """
    lora_a, lora_b = (t if t is None else t.to(x.dtype) for t in (lora_a, lora_b))
    return _PACKED_LINEAR(
        x, qweight, qzeros, scales, bias, bits, lora_a, lora_b, float(scale), lora_x
    )


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
) -> None:
    check_packed(qweight, qzeros, scales, bits)
    K, N = packed_sizes(qweight, bits)
    _check_rows("x", x, K, qweight)
    _check_like_x("bias", bias, (N,), x)
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b belong together; give both or neither")
    if lora_a is None or lora_b is None:
        if lora_x is not None:
            raise ValueError("lora_x is given without lora_a and lora_b; give all three or none")
        return
    rank = lora_a.shape[0] if lora_a.dim() == 2 else 0
    if rank == 0:
        raise ValueError(
            f"lora_a has shape {tuple(lora_a.shape)}; it must be (r, {K}) with a rank r of at"
            " least 1"
        )
    _check_like_x("lora_a", lora_a, (rank, K), x)
    _check_like_x("lora_b", lora_b, (N, rank), x)
    _check_like_x("lora_x", lora_x, tuple(x.shape), x)


def _check_rows(name: str, rows: Tensor, width: int, qweight: Tensor) -> None:
    fits = rows.dim() > 0 and rows.shape[-1] == width and rows.device == qweight.device
    if not rows.is_floating_point() or not fits:
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}, dtype {rows.dtype} and is on {rows.device}; it"
            f" must be a floating-point tensor (..., {width}) on {qweight.device}"
        )


def _check_like_x(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, x.dtype, x.device):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype} and is on"
            f" {tensor.device}; it must be {shape} in the dtype of x, {x.dtype}, on {x.device}"
        )


def _check_backward(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    d_low: Tensor | None,
    lora_a: Tensor | None,
) -> None:
    check_packed(qweight, qzeros, scales, bits)
    K, N = packed_sizes(qweight, bits)
    _check_rows("grad", grad, N, qweight)
    if (d_low is None) != (lora_a is None):
        raise ValueError("d_low and lora_a belong together; give both or neither")
    if d_low is not None and lora_a is not None:
        _check_like_x("d_low", d_low, (*grad.shape[:-1], lora_a.shape[0]), grad)
        _check_like_x("lora_a", lora_a, (lora_a.shape[0], K), grad)


def _check_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> None:
    check_packed(qweight, qzeros, scales, bits)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating-point dtype")


def _fake(x: Tensor, qweight: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[1])


def _fake_backward(
    grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, *others: Any
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], packed_sizes(qweight, bits)[0])


def _fake_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    return scales.new_empty(packed_sizes(qweight, bits), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, qzeros, scales, _, ctx.bits, lora_a, lora_b, ctx.scale, lora_x = inputs
    ctx.apart = lora_x is not None
    trained = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
    branch = (lora_x if ctx.apart else x) if trained else None
    ctx.save_for_backward(qweight, qzeros, scales, branch, lora_a, lora_b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qweight, qzeros, scales, branch, lora_a, lora_b = ctx.saved_tensors
    wants = ctx.needs_input_grad
    d_low = dx = d_bias = d_a = d_b = d_branch = None
    if lora_a is not None:
        d_low = torch.matmul(grad, lora_b) * ctx.scale
        if wants[6]:
            d_a = _rows(d_low).t() @ _rows(branch)
        if wants[7]:
            d_b = (_rows(grad).t() @ (_rows(branch) @ lora_a.t())) * ctx.scale
        if wants[9]:
            d_branch = torch.matmul(d_low, lora_a)
    if wants[0]:
        low = (None, None) if ctx.apart else (d_low, lora_a)
        dx = _PACKED_LINEAR_BACKWARD(grad, qweight, qzeros, scales, ctx.bits, *low)
    if wants[4]:
        d_bias = _rows(grad).sum(0)
    return dx, None, None, None, d_bias, None, d_a, d_b, None, d_branch


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the packed linear layer has no second derivative; for one use packed_linear_reference,"
        " which autograd differentiates as often as you like"
    )


def _triton() -> tuple[Any, Any, Any]:
    if importlib.util.find_spec("triton") is None:
        return None, None, None
    from kernels_peft.packed_linear import kernel

    return (
        kernel.dequantize_triton,
        kernel.packed_linear_triton,
        kernel.packed_linear_backward_triton,
    )


_CUDA_DEQUANTIZE, _CUDA, _CUDA_BACKWARD = _triton()

_DEQUANTIZE = define(
    "dequantize(Tensor qweight, Tensor qzeros, Tensor scales, int bits, ScalarType dtype)"
    " -> Tensor",
    check=_check_dequantize,
    fake=_fake_dequantize,
    implementation=dequantize_blocked,
    cuda=_CUDA_DEQUANTIZE,
)

_PACKED_LINEAR_BACKWARD = define(
    "packed_linear_backward(Tensor grad, Tensor qweight, Tensor qzeros, Tensor scales, int bits,"
    " Tensor? d_low, Tensor? lora_a) -> Tensor",
    check=_check_backward,
    fake=_fake_backward,
    implementation=packed_linear_backward_blocked,
    cuda=_CUDA_BACKWARD,
    backward=_no_second_derivative,
)

_PACKED_LINEAR = define(
    "packed_linear(Tensor x, Tensor qweight, Tensor qzeros, Tensor scales, Tensor? bias, int bits,"
    " Tensor? lora_a, Tensor? lora_b, float scale, Tensor? lora_x) -> Tensor",
    check=_check,
    fake=_fake,
    implementation=packed_linear_blocked,
    cuda=_CUDA,
    setup_context=_setup_context,
    backward=_backward,
)
