"""Rounding to a grid and back, in plain torch: the definition of correct, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def fake_quantize_reference(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Give the values that `weight` has after rounding to a grid of 2**bits levels.

    A group of g consecutive inputs shares a scale s and a zero point z:
    Q = (clamp(round(w / s) + z, 0, 2**bits - 1) - z) * s, rounding halves to even. The gradient of
    the scale takes rounding for the identity (straight through) and is that of the clamp otherwise;
    the zero point has none.

    Shapes:
        weight: (N, K), any float dtype. scale, zero: (N, K / g), float32 (float64 if weight is);
        zero holds whole numbers. Returns (N, K) in `dtype`, or else the dtype of weight.
    Source:
        ApiQ (arXiv:2402.05147), the quantiser of OmniQuant (arXiv:2308.13137).
    """
    groups = weight.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
    scale, zero = scale.unsqueeze(-1), zero.detach().unsqueeze(-1)
    ratio = groups / scale
    rounded = ratio + (ratio.round() - ratio).detach()
    codes = (rounded + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).flatten(-2).to(dtype or weight.dtype)
