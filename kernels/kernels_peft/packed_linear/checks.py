"""What the operators of the packed linear layer refuse, the same with and without compilation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.packing import FORMATS, RUN

INTEGERS = (torch.int32, torch.int64)


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


def check_linear(
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
) -> None:
    """Refuse arguments of `packed_linear` that do not belong together."""
    check_packed(qweight, qzeros, scales, bits)
    K, N = packed_sizes(qweight, bits)
    _check_rows("x", x, K, qweight)
    _check_like_x("bias", bias, (N,), x)
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b belong together; give both or neither")
    if lora_a is None or lora_b is None:
        if lora_x is not None or slots is not None:
            raise ValueError(
                "lora_x or slots is given without lora_a and lora_b; give them too, or neither"
            )
        return
    _check_like_x("lora_x", lora_x, tuple(x.shape), x)
    stack: tuple[int, ...] = ()
    if slots is not None:
        _check_slots(slots, x)
        stack = (lora_a.shape[0],) if lora_a.dim() == 3 else (0,)
    rank = lora_a.shape[-2] if lora_a.dim() == len(stack) + 2 else 0
    if rank == 0:
        wanted = f"(r, {K}) without slots" if slots is None else f"(S, r, {K}) with slots"
        raise ValueError(
            f"lora_a has shape {tuple(lora_a.shape)}; it must be {wanted}, with a rank r of at"
            " least 1"
        )
    _check_like_x("lora_a", lora_a, (*stack, rank, K), x)
    _check_like_x("lora_b", lora_b, (*stack, N, rank), x)


def check_low_rank_by_slot(
    grad: Tensor, x: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, slots: Tensor,
    input_grad: bool,
) -> None:  # fmt: skip
    """Refuse arguments of the gradient of adapters by slot that do not belong together."""
    _check_slots(slots, grad)
    if lora_a.dim() != 3 or lora_b.dim() != 3:
        raise ValueError(
            f"lora_a and lora_b have shapes {tuple(lora_a.shape)} and {tuple(lora_b.shape)}; they"
            " must be (S, r, K) and (S, N, r)"
        )
    (count, rank, K), N = lora_a.shape, grad.shape[-1]
    _check_like_x("x", x, (*grad.shape[:-1], K), grad)
    _check_like_x("lora_a", lora_a, (count, rank, K), grad)
    _check_like_x("lora_b", lora_b, (count, N, rank), grad)


def _check_slots(slots: Tensor, x: Tensor) -> None:
    fits = 1 <= slots.dim() < x.dim() and slots.shape == x.shape[: slots.dim()]
    if not fits or slots.dtype not in INTEGERS or slots.device != x.device:
        raise ValueError(
            f"slots has shape {tuple(slots.shape)} and dtype {slots.dtype} and is on"
            f" {slots.device}; it must be int32 or int64 on {x.device} with leading dimensions of x"
            f" {tuple(x.shape)}, at least one and not the last"
        )


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


def check_backward(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    d_low: Tensor | None,
    lora_a: Tensor | None,
) -> None:
    """Refuse arguments of the gradient of x that do not belong together."""
    check_packed(qweight, qzeros, scales, bits)
    K, N = packed_sizes(qweight, bits)
    _check_rows("grad", grad, N, qweight)
    if (d_low is None) != (lora_a is None):
        raise ValueError("d_low and lora_a belong together; give both or neither")
    if d_low is not None and lora_a is not None:
        _check_like_x("d_low", d_low, (*grad.shape[:-1], lora_a.shape[0]), grad)
        _check_like_x("lora_a", lora_a, (lora_a.shape[0], K), grad)


def check_dequantize(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> None:
    """Refuse arguments of `dequantize` that do not belong together."""
    check_packed(qweight, qzeros, scales, bits)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; it must be a floating-point dtype")
