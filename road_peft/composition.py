"""Combining adapters in closed form: blocks of one pairing multiply and add to such blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from road_peft.variants import Coefficients, block_entries


def multiply(left: Coefficients, right: Coefficients, group_size: int) -> Coefficients:
    """Give the coefficients of the product: `right` is applied first, then `left`.

    Shapes:
        Two pairs of vectors (n,), n a multiple of group_size. Returns such a pair.
    """
    (a2, b2, c2, d2), (a1, b1, c1, d1) = (block_entries(*p, group_size) for p in (left, right))
    return (
        torch.stack((a2 * a1 - b2 * c1, d2 * d1 - c2 * b1), 1).flatten(),
        torch.stack((a2 * b1 + b2 * d1, c2 * a1 + d2 * c1), 1).flatten(),
    )


def product(
    adapters: Sequence[Coefficients], weights: Sequence[float], group_size: int
) -> Coefficients:
    """Apply the adapters in turn, each as often as its weight says.

    Where every block is a rotation times a scale (road_1), the weighted sum of angles and of
    logarithms of scales; angles are taken in (-pi, pi], scales are positive. Other blocks do not
    commute and have no power: their weights must be 1.

    Raises:
        ValueError: a weight that is not 1 for blocks that are not a rotation times a scale.
    """
    if all(_is_conformal(first, second, group_size) for first, second in adapters):
        angle, scale = torch.zeros_like(adapters[0][0]), torch.ones_like(adapters[0][0])
        for (first, second), weight in zip(adapters, weights, strict=True):
            angle = angle + weight * torch.atan2(second, first)
            scale = scale * torch.hypot(first, second) ** weight
        return scale * torch.cos(angle), scale * torch.sin(angle)
    if any(weight != 1 for weight in weights):
        raise ValueError(
            f"weights are {list(weights)}; a product of road_2 or road_4 adapters takes weights of"
            " 1 only: use 'linear' or 'interpolation'"
        )
    result = adapters[0]
    for later in adapters[1:]:
        result = multiply(later, result, group_size)
    return result


def linear(
    adapters: Sequence[Coefficients], weights: Sequence[float], group_size: int
) -> Coefficients:
    """Give the weighted sum of the blocks."""
    scales = torch.tensor(weights, dtype=adapters[0][0].dtype, device=adapters[0][0].device)
    firsts, seconds = (torch.stack(vectors, -1) for vectors in zip(*adapters, strict=True))
    return firsts @ scales, seconds @ scales


def interpolation(
    adapters: Sequence[Coefficients], weights: Sequence[float], group_size: int
) -> Coefficients:
    """Give the identity plus the weighted sum of what each adapter adds to it."""
    first, second = linear(adapters, weights, group_size)
    return first + (1 - sum(weights)), second


Combination = Callable[[Sequence[Coefficients], Sequence[float], int], Coefficients]
COMBINATIONS: dict[str, Combination] = {f.__name__: f for f in (product, linear, interpolation)}


def _is_conformal(first: torch.Tensor, second: torch.Tensor, group_size: int) -> bool:
    a, b, c, d = block_entries(first, second, group_size)
    return torch.equal(a, d) and torch.equal(b, c)
