"""Rounding to a grid and back in plain torch without autograd, in blocks that stay in the cache.

What autograd spends on the reference is memory: every step of it is a pass over a tensor of the
size of the weight, into memory that is new. Here a block of rows goes through all steps in the
cache, so the weight is read once, and the values are written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels_peft.rotation.blocked import BLOCK_ELEMENTS


def fake_quantize_blocked(
    weight: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    """Compute what `fake_quantize_reference` computes, bit for bit.

    Shapes:
        weight: (N, K). scale, zero: (N, K / g). Returns (N, K), contiguous.
    """
    out = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    for w, target, s, z in _blocks(weight, out, scale, zero):
        q = target if dtype == s.dtype else torch.empty_like(target, dtype=s.dtype)
        torch.div(w.to(s.dtype), s, out=q).round_().add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s)
        if q is not target:
            target.copy_(q)
    return out


def fake_quantize_backward_blocked(
    grad: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """Compute the gradient of the scale.

    Shapes:
        grad, weight: (N, K). scale, zero: (N, K / g). Returns (N, K / g), contiguous, as `scale`.
    Source:
        The formula of `fake_quantization/README.md`.
    """
    sums = []
    ratio = code = slope = scale.new_empty(0)  # of one block, and used again by the next
    for w, g, s, z in _blocks(weight, grad, scale, zero):
        if ratio.shape != w.shape:
            ratio, code, slope = (scale.new_empty(w.shape) for _ in range(3))
        torch.div(w.to(s.dtype), s, out=ratio)
        torch.round(ratio, out=code).add_(z)
        torch.clamp(code, 0, 2**bits - 1, out=slope)
        inside = code.eq_(slope)  # 1 or 0; at the bounds a clamp passes its gradient on
        slope.sub_(z).addcmul_(ratio, inside, value=-1)
        sums.append(slope.mul_(g).sum(-1))
    return torch.cat(sums) if sums else torch.zeros_like(scale)


def _blocks(
    weight: Tensor, other: Tensor, scale: Tensor, zero: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Give all four by rows: weight and other as (rows, groups, g), the last two with g = 1."""
    shape = (scale.shape[-1], weight.shape[-1] // scale.shape[-1])
    whole = (
        weight.unflatten(-1, shape),
        other.unflatten(-1, shape),
        scale.unsqueeze(-1),
        zero.unsqueeze(-1),
    )
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[-1]))
    for start in range(0, weight.shape[0], step):
        yield tuple(t[start : start + step] for t in whole)
