"""The rotation in plain torch without autograd, in blocks of rows that stay in the cache.

A pass over a tensor larger than the cache costs more than its arithmetic. Here every block of rows
is read from memory once and written once; the further passes over it hit the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 19  # 2 MiB in float32: two such blocks fit in the last-level cache


def rotate_blocked(x: Tensor, first: Tensor, second: Tensor, group_size: int) -> Tensor:
    """Compute what `rotate_reference` computes along the last dimension.

    Shapes:
        x: (..., d). first, second: (n,), n <= d. Returns (..., d), contiguous, the dtype of x.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    targets, n = out.view(rows.shape), first.shape[0]
    targets[:, n:] = rows[:, n:]
    first, second = _widen(first, x), _widen(second, x)
    for block in _blocks(rows):
        target = targets[block, :n]
        _rotate_into(target, _widen(rows[block, :n], x), first, second, group_size)
    return out


def rotate_backward_blocked(
    grad: Tensor,
    saved: Tensor,
    first: Tensor,
    second: Tensor,
    group_size: int,
    saved_is_output: bool,
    input_grad: bool,
    coefficient_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, first and second; what is not asked for comes back empty.

    Shapes:
        grad: (..., d). saved: (..., d), the input of the rotation or its output; (0,) if no
        coefficient gradient is asked for. Returns (..., d), (n,), (n,), the latter as `first`.
    Source:
        The two formulas of `rotation/README.md`.
    """
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1])
    n, half = first.shape[0], group_size // 2
    wide_first, wide_second = _widen(first, grad), _widen(second, grad)
    dx = grad.new_empty(grad.shape if input_grad else 0)
    if input_grad:
        targets = dx.view(rows.shape)
        targets[:, n:] = rows[:, n:]
        transposed = -wide_second.unflatten(0, (-1, 2, half)).flip(1).flatten()
    if coefficient_grad:
        saved = saved.reshape(rows.shape)
        straight, crossed = torch.zeros_like(wide_first), torch.zeros_like(wide_second)
    for block in _blocks(rows):
        g = _widen(rows[block, :n], grad)
        if input_grad:
            _rotate_into(targets[block, :n], g, wide_first, transposed, group_size)
        if coefficient_grad:
            h = _widen(saved[block, :n], grad)
            product = g * h
            straight += product.sum(0)
            (to_low, to_high), (g_low, g_high), (h_low, h_high) = (
                _halves(t, half) for t in (product, g, h)
            )
            torch.mul(g_low, h_high, out=to_low)
            torch.mul(g_high, h_low, out=to_high)
            crossed += product.sum(0)
    if not coefficient_grad:
        return dx, first.new_empty(0), second.new_empty(0)
    if saved_is_output:
        straight, crossed = _from_output(straight, crossed, wide_first, wide_second, half)
    _halves(crossed, half)[0].neg_()
    return dx, straight.to(first.dtype), crossed.to(second.dtype)


def _from_output(
    straight: Tensor, crossed: Tensor, first: Tensor, second: Tensor, half: int
) -> tuple[Tensor, Tensor]:
    """Turn sums over the output into sums over the input: both are linear in it."""
    (low, high), (low_high, high_low) = _halves(straight, half), _halves(crossed, half)
    (a, d), (b, c) = _halves(first, half), _halves(second, half)
    det = a * d + b * c
    return (
        torch.stack(((d * low + b * low_high) / det, (a * high - c * high_low) / det), 1).flatten(),
        torch.stack(((a * low_high - c * low) / det, (d * high_low + b * high) / det), 1).flatten(),
    )


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def _widen(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(like.dtype, torch.float32))


def _halves(tensor: Tensor, half: int) -> tuple[Tensor, Tensor]:
    low, high = tensor.unflatten(-1, (-1, 2, half)).unbind(-2)
    return low, high


def _rotate_into(
    target: Tensor, x: Tensor, first: Tensor, second: Tensor, group_size: int
) -> Tensor:
    """Write the rotation of `x`, already in the compute dtype, to `target` of any float dtype."""
    out = target if target.dtype == x.dtype else torch.empty_like(x)
    torch.mul(x, first, out=out)
    (low, high), (out_low, out_high), (second_low, second_high) = (
        _halves(t, group_size // 2) for t in (x, out, second)
    )
    out_low.addcmul_(high, second_low, value=-1)
    out_high.addcmul_(low, second_high)
    if out is not target:
        target.copy_(out)
    return target
