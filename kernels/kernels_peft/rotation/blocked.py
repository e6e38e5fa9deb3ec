"""The rotation in plain torch without autograd, in blocks of rows that stay in the cache.

A pass over a tensor larger than the cache costs more than its arithmetic. Here every block of rows
is read from memory once and written once; the further passes over it hit the cache. Small inputs
are one block, and what they cost is the number of calls: there is no call that they can do without.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels_peft.outputs import in_shape

BLOCK_ELEMENTS = 1 << 18  # 1 MiB in float32; a few such blocks fit in the last-level cache


def rotate_blocked(x: Tensor, first: Tensor, second: Tensor, group_size: int) -> Tensor:
    """Compute what `rotate_reference` computes along the last dimension.

    Shapes:
        x: (..., d). first, second: (n,), n <= d. Returns (..., d), contiguous, the dtype of x.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    compute, n = torch.promote_types(x.dtype, torch.float32), first.shape[0]
    first, second = first.to(compute), second.to(compute)
    for rows, targets in _blocks(n, x, out):
        wide = rows.to(compute)
        turned = targets if targets.dtype == compute else torch.empty_like(wide)
        _rotate_into(turned, wide, first, _halves(second, group_size), group_size)
        if turned is not targets:
            targets.copy_(turned)
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
    compute, n = torch.promote_types(grad.dtype, torch.float32), first.shape[0]
    wide_first, wide_second = first.to(compute), second.to(compute)
    low, high = _halves(wide_second, group_size)
    transposed = (-high, -low)  # the gradient of x is a rotation with these
    dx = torch.empty_like(grad, memory_format=torch.contiguous_format) if input_grad else None
    straight = crossed = None
    for rows, targets, kept in _blocks(n, grad, dx, saved if coefficient_grad else None):
        g = rows.to(compute)
        if input_grad:
            turned = targets if targets.dtype == compute else torch.empty_like(g)
            _rotate_into(turned, g, wide_first, transposed, group_size)
            if turned is not targets:
                targets.copy_(turned)
        if coefficient_grad:
            h = kept.to(compute)
            product = g * h
            total = product.sum(0)
            straight = total if straight is None else straight + total
            (to_low, to_high), (g_low, g_high), (h_low, h_high) = (
                _halves(t, group_size) for t in (product, g, h)
            )
            torch.mul(g_low, h_high, out=to_low)
            torch.mul(g_high, h_low, out=to_high)
            total = product.sum(0)
            crossed = total if crossed is None else crossed + total
    dx = grad.new_empty(0) if dx is None else dx
    if straight is None or crossed is None:
        return dx, first.new_empty(0), second.new_empty(0)
    if saved_is_output:
        straight, crossed = _from_output(straight, crossed, wide_first, wide_second, group_size)
    _halves(crossed, group_size)[0].neg_()
    return dx, straight.to(first.dtype), crossed.to(second.dtype)


def _from_output(
    straight: Tensor, crossed: Tensor, first: Tensor, second: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Turn sums over the output into sums over the input: both are linear in it."""
    (low, high), (low_high, high_low), (a, d), (b, c) = (
        _halves(t, group_size) for t in (straight, crossed, first, second)
    )
    det = a * d + b * c
    return (
        _interleaved((d * low + b * low_high) / det, (a * high - c * high_low) / det),
        _interleaved((a * low_high - c * low) / det, (d * high_low + b * high) / det),
    )


def _interleaved(low: Tensor, high: Tensor) -> Tensor:
    """Undo `_halves`, in new memory."""
    return in_shape(torch.stack((low, high), 1), (2 * low.numel(),))


def _blocks(n: int, source: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """Give the first n features of the tensors, rows by rows; copy the rest of `source` along.

    What lies past n goes from `source` to the first of the others, if that is given. Where None
    is given, None comes back.
    """
    width = source.shape[-1]
    flat = [
        t if t is None else t.reshape(source.shape[:-1].numel(), width) for t in (source, *others)
    ]
    rows, target = flat[0], flat[1]
    assert rows is not None
    if n < width:
        if target is not None:
            target[:, n:] = rows[:, n:]
        flat = [t if t is None else t[:, :n] for t in flat]
    step = max(1, BLOCK_ELEMENTS // max(1, width))
    if rows.shape[0] <= step:
        yield tuple(flat)  # type: ignore[arg-type]
        return
    for start in range(0, rows.shape[0], step):
        yield tuple(t if t is None else t[start : start + step] for t in flat)  # type: ignore[misc]


def _halves(tensor: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    *rows, n = tensor.shape
    paired = tensor.view(*rows, n // group_size, 2, group_size // 2)
    return paired.select(-2, 0), paired.select(-2, 1)


def _rotate_into(
    out: Tensor, x: Tensor, first: Tensor, second: tuple[Tensor, Tensor], group_size: int
) -> None:
    """Write the rotation of `x` to `out`, both in the compute dtype."""
    torch.mul(x, first, out=out)
    (low, high), (out_low, out_high) = _halves(x, group_size), _halves(out, group_size)
    out_low.addcmul_(high, second[0], value=-1)
    out_high.addcmul_(low, second[1])
