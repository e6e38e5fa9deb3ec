"""A linear layer whose weight is packed codes, in plain torch: the definition of correct."""

from __future__ import annotations

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
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Give x W^T + bias for the weight that `dequantize_reference` gives, in the dtype of `x`.

    Shapes:
        x: (..., K). bias: (N,). Returns (..., N).
    """
    weight = dequantize_reference(qweight, qzeros, scales, bits, x.dtype)
    return F.linear(x, weight.t(), bias)


def packed_sizes(qweight: Tensor, bits: int) -> tuple[int, int]:
    """Give (K, N), the inputs and outputs of a packed weight."""
    return qweight.shape[0] // bits * RUN, qweight.shape[1]
