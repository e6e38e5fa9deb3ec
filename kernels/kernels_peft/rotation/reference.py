"""The rotation in plain torch: the definition of correct, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_reference(
    x: Tensor, first: Tensor, second: Tensor, group_size: int, dim: int = -1
) -> Tensor:
    """Rotate and scale each pair of features of `x` along `dim`.

    Within a group of g features, i is paired with i + g/2, and a pair (l, h) becomes
    (first_l * l - second_l * h,  first_h * h + second_h * l). Features past the last coefficient
    are returned as they are.

    Shapes:
        x: (..., d, ...), any float dtype. first, second: (n,) with n <= d, or any shape (..., n)
        that broadcasts against x when `dim` is the last one. Returns the shape and dtype of x.
    Source:
        RoAd (arXiv:2409.00119), eq. 4; pairs lie g/2 apart as in PEFT, g = 2 is the paper's.
    """
    dim = dim % x.dim()
    rotated, half = first.shape[-1], group_size // 2
    trailing = (1,) * (x.dim() - 1 - dim)
    body = x.narrow(dim, 0, rotated).to(torch.promote_types(x.dtype, torch.float32))
    low, high = body.unflatten(dim, (-1, 2, half)).unbind(dim + 1)
    first_low, first_high = _halves(first, half, trailing)
    second_low, second_high = _halves(second, half, trailing)
    turned = torch.stack(
        (first_low * low - second_low * high, first_high * high + second_high * low), dim + 1
    )
    turned = turned.flatten(dim, dim + 2).to(x.dtype)
    if rotated == x.shape[dim]:
        return turned
    return torch.cat((turned, x.narrow(dim, rotated, x.shape[dim] - rotated)), dim)


def invert(first: Tensor, second: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Give the coefficients of the inverse rotation, block by block.

    A block [[a, -b], [c, d]] has the inverse [[d, b], [-c, a]] / (a d + b c), which is again of
    this form. A singular block gives non-finite coefficients; `determinants` finds those.

    Shapes:
        first, second: (..., n), float32 or float64, n a multiple of group_size. Returns two alike.
    """
    half = group_size // 2
    first_low, first_high = _halves(first, half)
    second_low, second_high = _halves(second, half)
    det = first_low * first_high + second_low * second_high
    return (
        torch.stack((first_high / det, first_low / det), -2).flatten(-3),
        torch.stack((-second_low / det, -second_high / det), -2).flatten(-3),
    )


def determinants(first: Tensor, second: Tensor, group_size: int) -> Tensor:
    """Give the determinant of every 2x2 block.

    Shapes:
        first, second: (..., n). Returns (..., n / 2); entry k * g/2 + i is pair i of group k.
    """
    half = group_size // 2
    first_low, first_high = _halves(first, half)
    second_low, second_high = _halves(second, half)
    return (first_low * first_high + second_low * second_high).flatten(-2)


def _halves(vector: Tensor, half: int, trailing: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    low, high = vector.unflatten(-1, (-1, 2, half)).unbind(-2)
    return low.reshape(low.shape + trailing), high.reshape(high.shape + trailing)
