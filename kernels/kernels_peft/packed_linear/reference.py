"""A linear layer whose weight is packed codes, in plain torch: the definition of correct."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_peft.packing import RUN, unpack


def dequantize_reference(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Give the weight that the codes stand for: (code - zero) * scale.

    Computed in float32 and rounded once to `dtype`. K inputs in groups of K / G share a scale and a
    zero point for each output.

    Shapes:
        qweight: (K bits / 32, N), int32. qzeros: (G, N bits / 32), int32. scales: (G, N), any float
        dtype. Returns (K, N): transposed, as the codes lie in memory.
    Source:
        The tensors of GPTQ's format 2 (zero points are stored as they are).
    """
    wide = torch.promote_types(dtype, torch.float32)
    groups = scales.shape[0]
    codes = unpack(qweight, bits).to(wide).unflatten(0, (groups, -1))
    zeros = unpack(qzeros, bits, dim=1).to(wide).unsqueeze(1)
    return ((codes - zeros) * scales.to(wide).unsqueeze(1)).flatten(0, 1).to(dtype)


def packed_linear_reference(
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
    """Give x W^T + bias + scale (lora_x A^T) B^T for the weight of `dequantize_reference`.

    Without A and B there is no third term; without `lora_x` it takes x. With `slots`, a row takes
    the A and B that its slot names, and has no third term if its slot is negative.

    Shapes:
        x: (..., K). bias: (N,). lora_a: A, (r, K). lora_b: B, (N, r). lora_x: (..., K). slots:
        (*rows), leading dimensions of x, below S; then A is (S, r, K) and B (S, N, r). Returns
        (..., N), the dtype of x.
    Source:
        ApiQ (arXiv:2402.05147): the layer whose Q and A B^T are calibrated together.
    """
    weight = dequantize_reference(qweight, qzeros, scales, bits, x.dtype)
    y = F.linear(x, weight.t(), bias)
    if lora_a is None or lora_b is None:
        return y
    branch = x if lora_x is None else lora_x
    if slots is None:
        return y + scale * F.linear(F.linear(branch, lora_a), lora_b)
    if len(lora_a) == 0:
        return y
    index = slots.flatten().clamp(min=0).long()
    rows = branch.reshape(len(index), math.prod(x.shape[slots.dim() : -1]), x.shape[-1])
    delta = scale * (rows @ lora_a[index].mT @ lora_b[index].mT)
    absent = (slots < 0).view(*slots.shape, *(1,) * (x.dim() - slots.dim()))
    return torch.where(absent, y, y + delta.view(y.shape))


def packed_sizes(qweight: Tensor, bits: int) -> tuple[int, int]:
    """Give (K, N), the inputs and outputs of a packed weight."""
    return qweight.shape[0] // bits * RUN, qweight.shape[1]
