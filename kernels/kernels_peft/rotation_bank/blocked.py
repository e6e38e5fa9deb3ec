"""The rotation by slot in plain torch without autograd, in blocks that stay in the cache.

The values of `slots` are at hand on a CPU, so the rows of one group size are rotated together: the
number of calls grows with the distinct group sizes, never with the adapters. A step of decoding is
one block, mostly of one group size, and costs its calls: two gathers, a product, two sums of
products and the views between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels_peft.outputs import in_shape
from kernels_peft.rotation.blocked import BLOCK_ELEMENTS


class _Part(NamedTuple):
    """The rows of a block that have one group size, 0 for those that are not rotated.

    `run` is a run of slots (first, count) that may be read in place of a gather: one for all rows
    that are rotated, or as many as there are rows, one after the other.
    """

    size: int
    rows: list[int]
    run: tuple[int, int] | None


def rotate_by_slot_blocked(
    x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor, transposed: bool = False
) -> Tensor:
    """Compute what `rotate_by_slot_reference` computes, or its gradient for x if `transposed`.

    Shapes:
        x: (*rows, ..., d). table: (S, 2, d). group_sizes: (S,). slots: (*rows). Returns
        (*rows, ..., d), contiguous, the dtype of x.
    Raises:
        ValueError: a slot is S or more, or a group size is odd or negative.
    """
    chosen, sizes = _read(group_sizes, slots, x.shape[-1])
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    compute = _compute_dtype(x)
    if table.dtype != compute:
        table = table.to(compute)
    if slots.dim() != 1:
        slots = slots.reshape(-1)
    if x.numel() <= BLOCK_ELEMENTS:
        cut = x.contiguous()
        if x.dim() != 3 or x.shape[0] != len(chosen):
            cut = cut.view(len(chosen), -1, x.shape[-1])
        y = _rotate_block(cut, table, slots, _parts(chosen, sizes), transposed)
        return y if y.shape == x.shape else in_shape(y, x.shape)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    cut = x.reshape(len(chosen), -1, x.shape[-1])
    target = out.view(cut.shape)
    for parts, rows, tokens in _blocks(cut, chosen, sizes):
        _rotate_block(
            cut[rows, tokens], table, slots[rows], parts, transposed, target[rows, tokens]
        )
    return out


def rotate_by_slot_backward_blocked(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    group_sizes: Tensor,
    slots: Tensor,
    input_grad: bool,
    table_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and of the table; what is not asked for comes back empty.

    Shapes:
        grad: (*rows, ..., d). x: alike, or (0,) if the gradient of the table is not asked for.
        Returns (*rows, ..., d) and (S, 2, d), the latter in the dtype of the table.
    Source:
        The formulas of `rotation_bank/README.md`.
    """
    dx, d_table = grad.new_empty(0), table.new_empty(0)
    if input_grad:
        dx = rotate_by_slot_blocked(grad, table, group_sizes, slots, transposed=True)
    if table_grad:
        d_table = _table_gradient(grad, x, table, group_sizes, slots).to(table.dtype)
    return dx, d_table


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _read(group_sizes: Tensor, slots: Tensor, width: int) -> tuple[list[int], list[int]]:
    """Give the slot of each row and the group size of each slot, 0 if it rotates nothing."""
    chosen = slots.tolist() if slots.dim() == 1 else slots.flatten().tolist()
    sizes = group_sizes.tolist()
    largest = max(chosen, default=-1)
    if largest >= len(sizes):
        raise ValueError(
            f"slots holds {largest}, but the table has {len(sizes)} slots; give a slot below that,"
            " or a negative one for a row without a rotation"
        )
    for size in set(sizes):
        if size < 0 or size % 2:
            raise ValueError(
                f"group_sizes holds {size}; each must be even and positive, or 0 for a slot that"
                " rotates nothing"
            )
        if size > width:
            sizes = [0 if one == size else one for one in sizes]
    return chosen, sizes


def _parts(chosen: list[int], sizes: list[int]) -> list[_Part]:
    """Part the rows by group size: those that are rotated first, the most of them foremost."""
    used = set(chosen)
    rotated = {slot for slot in used if slot >= 0 and sizes[slot]}
    distinct = {sizes[slot] for slot in rotated}
    if not distinct:
        return [_Part(0, [], None)]
    run = (next(iter(rotated)), 1) if len(rotated) == 1 else None
    whole = run
    if run is None and chosen[0] >= 0 and chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        whole = (chosen[0], len(chosen))
    if len(distinct) == 1 and len(rotated) == len(used):
        return [_Part(distinct.pop(), [], whole)]
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(chosen):
        rows.setdefault(sizes[slot] if slot >= 0 else 0, []).append(row)
    main, *others = sorted(rows, key=lambda size: (size > 0, len(rows[size])), reverse=True)
    # the main part is rotated with all rows of the block, the others with their own
    return [_Part(main, rows[main], whole), *(_Part(s, rows[s], run) for s in others)]


def _blocks(
    cut: Tensor, chosen: list[int], sizes: list[int]
) -> Iterator[tuple[list[_Part], slice, slice]]:
    """Cut (rows, tokens of a row, features) into blocks, with the parts of each."""
    count, tokens, width = cut.shape
    row_step = max(1, BLOCK_ELEMENTS // (tokens * width))
    token_step = max(1, BLOCK_ELEMENTS // width) if row_step == 1 else tokens
    for row in range(0, count, row_step):
        rows = slice(row, row + row_step)
        parts = _parts(chosen[rows], sizes)
        for token in range(0, tokens, token_step):
            yield parts, rows, slice(token, token + token_step)


def _rotate_block(
    x: Tensor,
    table: Tensor,
    slots: Tensor,
    parts: list[_Part],
    transposed: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate (rows, tokens, features) into `out`, or into a new tensor, which needs `x` dense."""
    main, *others = parts
    if main.size == 0:
        return x.clone() if out is None else out.copy_(x)
    if others and others[-1].size == 0:
        slots = slots.clamp(min=0)
    # The rows of other parts come along, which costs less than to pick the rows of this one.
    y = _rotate_rows(x, table, slots, main, transposed, out)
    for part in others:
        index = torch.tensor(part.rows, device=x.device)
        rows = x.index_select(0, index)
        if part.size:
            rows = _rotate_rows(rows, table, slots.index_select(0, index), part, transposed)
        y.index_copy_(0, index, rows)
    return y


def _rotate_rows(
    x: Tensor,
    table: Tensor,
    slots: Tensor,
    part: _Part,
    transposed: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate rows of one group size."""
    rows, tokens, width = x.shape
    size = part.size
    body = width // size * size
    if body < width:
        out = torch.empty_like(x) if out is None else out
        out[..., body:] = x[..., body:]  # before any cast, which does not keep every NaN
        head = out[..., :body]
        _rotate_rows(x[..., :body], table[..., :body], slots, part, transposed, head)
        return out
    groups = (width // size, 2, size // 2)
    pairs = (x if x.dtype == table.dtype else x.to(table.dtype)).view(rows, tokens, *groups)
    first, second = table.view(-1, 2, 1, *groups).unbind(1)
    if part.run is None:
        first, second = first.index_select(0, slots), second.index_select(0, slots)
    elif part.run != (0, len(table)):
        first, second = first.narrow(0, *part.run), second.narrow(0, *part.run)
    if out is not None and out.dtype == table.dtype:
        turned = torch.mul(pairs, first, out=out.view(pairs.shape))
    elif part.run is None and tokens == 1:
        turned = first.mul_(pairs)  # a gather has memory of its own, which the result may take
    else:
        turned = torch.mul(pairs, first)
    to_low, to_high = turned.unbind(3)
    low, high = pairs.unbind(3)
    second_low, second_high = second.unbind(3)
    if transposed:
        to_low.addcmul_(high, second_high)
        to_high.addcmul_(low, second_low, value=-1)
    else:
        to_low.addcmul_(high, second_low, value=-1)
        to_high.addcmul_(low, second_high)
    if out is None:
        turned = in_shape(turned, x.shape)
        return turned if turned.dtype == x.dtype else turned.to(x.dtype)
    return out if out.dtype == table.dtype else out.copy_(turned.view(x.shape))


def _table_gradient(
    grad: Tensor, x: Tensor, table: Tensor, group_sizes: Tensor, slots: Tensor
) -> Tensor:
    width = grad.shape[-1]
    compute = _compute_dtype(grad)
    total = torch.zeros(table.shape, dtype=compute, device=table.device)
    chosen, sizes = _read(group_sizes, slots, width)
    if grad.numel() == 0:
        return total
    g_cut, h_cut = (t.reshape(len(chosen), -1, width) for t in (grad, x))
    slots = slots.reshape(-1)
    for parts, rows, tokens in _blocks(g_cut, chosen, sizes):
        g, h, named = g_cut[rows, tokens], h_cut[rows, tokens], slots[rows]
        for part in parts:
            if part.size == 0:
                continue
            body = width // part.size * part.size
            g_part, h_part, named_part = g[..., :body], h[..., :body], named
            if len(parts) > 1:
                index = torch.tensor(part.rows, device=slots.device)
                g_part, h_part, named_part = (
                    t.index_select(0, index) for t in (g_part, h_part, named)
                )
            straight, crossed = _products(g_part.to(compute), h_part.to(compute), part.size)
            d_first, d_second = total[..., :body].unbind(1)
            d_first.index_add_(0, named_part, straight.sum(1))
            d_second.index_add_(0, named_part, crossed.sum(1))
    return total


def _products(g: Tensor, h: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Give what the gradients of both coefficients are sums of: (rows, tokens, features)."""
    groups = (*g.shape[:2], g.shape[2] // size, 2, size // 2)
    straight, crossed = g * h, torch.empty_like(g, memory_format=torch.contiguous_format)
    (to_low, to_high), (g_low, g_high), (h_low, h_high) = (
        t.view(groups).unbind(3) for t in (crossed, g, h)
    )
    torch.mul(g_low, h_high, out=to_low).neg_()
    torch.mul(g_high, h_low, out=to_high)
    return straight, crossed
