"""Weights with grids for the tests of fake quantisation: codes inside, at the ends and beyond."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GridInputs(NamedTuple):
    """The arguments of `fake_quantize` but for the width, and a gradient of its result."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    grad: Tensor


def make_grid(
    N: int, K: int, group_size: int, bits: int, dtype: torch.dtype = torch.float32
) -> GridInputs:
    """Make a weight whose codes reach two steps past both ends of the grid.

    Every third weight lies just between two codes, exactly so in the first group of a row.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    groups = K // max(1, group_size)
    scale = torch.rand(N, groups, dtype=wide) * 0.5 + 0.2
    scale[:, :1] = 0.25
    zero = torch.randint(2**bits, (N, groups)).to(wide)
    ratio = torch.rand(N, groups, group_size, dtype=wide) * (2**bits + 3) - 2
    ratio[..., ::3] = ratio[..., ::3].floor() + 0.5
    weight = (ratio - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    grad = torch.randn(N, K, dtype=wide)
    return GridInputs(weight.reshape(N, K).to(dtype), scale, zero, grad.to(dtype))


def by_hand(inputs: GridInputs, bits: int) -> tuple[Tensor, Tensor]:
    """Give the values, and d(value)/d(scale), entry by entry: ApiQ's closed form."""
    weight, scale, zero, _ = inputs
    g = weight.shape[1] // scale.shape[1]
    value, slope = torch.empty_like(weight), torch.empty_like(weight)
    for n in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            s, z, w = scale[n, k // g].item(), zero[n, k // g].item(), weight[n, k].item()
            code = round(w / s) + z  # Python rounds halves to even as well
            inside = 0 <= code <= 2**bits - 1
            held = min(max(code, 0), 2**bits - 1)
            value[n, k] = (held - z) * s
            slope[n, k] = held - z - (w / s if inside else 0)
    return value, slope


def exact_gradient(inputs: GridInputs, bits: int) -> Tensor:
    """Give the gradient of the scale in float64, for the codes that the dtype of scale leads to.

    Autograd of the reference adds up terms that nearly cancel, so long groups need this.
    """
    weight, scale, zero, grad = inputs
    g = weight.shape[1] // scale.shape[1]
    s, z = (t.repeat_interleave(g, 1) for t in (scale, zero))
    ratio = weight.to(s.dtype) / s
    code = ratio.round() + z
    held = code.clamp(0, 2**bits - 1)
    slope = (held - z).double() - torch.where(code == held, ratio, 0).double()
    return by_group(grad.double() * slope, scale)


def by_group(tensor: Tensor, scale: Tensor) -> Tensor:
    """Sum over each group of a row."""
    return tensor.view(*scale.shape, -1).sum(-1)


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Tell whether dtype, shape and all bits agree, so that a sign of zero counts."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(kind), other.view(kind))
