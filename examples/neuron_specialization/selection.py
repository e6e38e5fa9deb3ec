"""The equations of the method, on tensors: which neurons a task keeps, and how tasks overlap.

A neuron is a row of the first linear layer of a feed-forward block. What is counted is how often it
fires (its value after the activation is above zero) on the tokens of a task.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "derangement",
    "gate",
    "mean_overlap",
    "overlap",
    "permutation_p",
    "random_like",
    "sampling",
    "select_cumulative",
    "sparsity",
]


def select_cumulative(counts: Tensor, k: float) -> Tensor:
    """Keep the most active neurons that together make k percent of all activations.

    Neurons are sorted by their count, the larger first and among equals the first; kept is the
    shortest beginning of that order whose sum is at least k/100 of the sum of all, so at least one.

    Shapes:
        counts: (..., d_ff), whole numbers. Returns the same shape, bool.
    Raises:
        ValueError: k is not in (0, 100].
    Source:
        Neuron Specialization (arXiv:2404.11201), the selection of the released code.
    """
    if not 0 < k <= 100:
        raise ValueError(f"k is {k}; it must be above 0 and at most 100 (percent)")
    order = counts.argsort(dim=-1, descending=True, stable=True)
    # times 100 on the left: whole numbers, exact in double precision; nothing is divided
    sums = counts.gather(-1, order).cumsum(-1).double() * 100
    target = counts.sum(-1, keepdim=True).double() * k
    length = (sums < target).sum(-1, keepdim=True) + 1
    rank = order.argsort(dim=-1)
    return rank < length


def gate(z: Tensor, keep: Tensor, bias: Tensor | None) -> Tensor:
    """Mask the output of the first linear layer: where a neuron is not kept, only `bias` is left.

    With z = W x + b and bias = b that is (diag(m) W) x + b, as released: the bias is not masked,
    and a masked neuron still gives relu(b). Without bias it is diag(m) (W x + b): no neuron at all.

    Shapes:
        z: (..., d_ff). keep: bool, broadcast to z. bias: (d_ff,). Returns the shape of z.
    """
    return torch.where(keep, z, z.new_zeros(()) if bias is None else bias.to(z.dtype))


def sparsity(keep: Tensor) -> Tensor:
    """Give the share of neurons that are masked.

    Shapes:
        keep: (..., d_ff), bool. Returns (...).
    """
    return 1 - keep.double().mean(-1)


def overlap(keep: Tensor) -> Tensor:
    """Give the neurons that two tasks both keep, over those that either keeps (IoU).

    Shapes:
        keep: (tasks, d_ff), bool. Returns (tasks, tasks); 1 on the diagonal.
    """
    sets = keep.double()
    both = sets @ sets.T
    size = sets.sum(-1)
    return both / (size[:, None] + size[None, :] - both)


def mean_overlap(table: Tensor) -> float:
    """Give the mean of a table (tasks, tasks) off its diagonal."""
    tasks = len(table)
    return ((table.sum() - table.diagonal().sum()) / (tasks * (tasks - 1))).item()


def random_like(keep: Tensor, generator: torch.Generator) -> Tensor:
    """Keep as many neurons in every row as `keep` does, drawn at random.

    Shapes:
        keep: (tasks, d_ff), bool. Returns the same.
    """
    rank = torch.rand(keep.shape, generator=generator).argsort(-1).argsort(-1)
    return rank < keep.sum(-1, keepdim=True)


def derangement(count: int, seed: int) -> list[int]:
    """Give an order of 0 .. count-1 in which nothing stands at its own place.

    Raises:
        ValueError: count is below 2.
    """
    if count < 2:
        raise ValueError(f"{count} task has no other task's masks to take; give at least 2")
    ring = random.Random(seed).sample(range(count), count)
    after = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    return [after[i] for i in range(count)]


def sampling(sizes: Sequence[int], temperature: float) -> list[float]:
    """Give the shares at which tasks are drawn: their size to the power 1/T, made to sum to 1."""
    total = sum(sizes)
    powers = [(size / total) ** (1 / temperature) for size in sizes]
    return [power / sum(powers) for power in powers]


def permutation_p(
    table: Tensor, related: Iterable[tuple[int, int]], draws: int = 10_000
) -> tuple[float, float]:
    """Compare related pairs with the others; give the difference of means and its p value.

    The p value is the share of renamings of the tasks whose difference is at least as large: of
    all renamings up to 8 tasks, else of so many random ones and the one that is.

    Shapes:
        table: (tasks, tasks), symmetric.
    """
    found = list(related)
    values = table.tolist()
    tasks = len(values)
    pairs = tasks * (tasks - 1) / 2
    total = sum(values[i][j] for i in range(tasks) for j in range(i))

    def difference(names: Sequence[int]) -> float:
        inside = sum(values[names[i]][names[j]] for i, j in found)
        return inside / len(found) - (total - inside) / (pairs - len(found))

    own = difference(range(tasks))
    renamings: Iterable[Any] = itertools.permutations(range(tasks))
    if tasks > 8:
        draw = random.Random(0)
        shuffled = (draw.sample(range(tasks), tasks) for _ in range(draws))
        renamings = itertools.chain([range(tasks)], shuffled)
    # sums are taken in another order for another renaming, which must not break ties
    reached = [difference(names) >= own - 1e-12 for names in renamings]
    return own, sum(reached) / len(reached)
