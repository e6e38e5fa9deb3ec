"""The RoAd variants: how many parameters a layer has and what coefficients they give.

A variant is one row of `VARIANTS`; configuration, layers and tests read the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Coefficients = tuple[Tensor, Tensor]


def block_entries(
    first: Tensor, second: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give a, b, c, d of the blocks [[a, -b], [c, d]] that the coefficients stand for.

    Shapes:
        first, second: (n,). Returns four of (n / group_size, group_size / 2).
    """
    (a, d), (b, c) = (v.view(-1, 2, group_size // 2).unbind(1) for v in (first, second))
    return a, b, c, d


@dataclass(frozen=True)
class Variant:
    """One parametrisation of the 2x2 blocks [[first_l, -second_l], [second_h, first_h]].

    `per_pair` is the number of thetas (and of alphas) for a pair of features. `coefficients` maps
    (theta, alpha, group_size) to the vectors (first, second) of the rotation operator, and
    `parameters` maps such vectors back to (theta, alpha). `closure` names the variant that holds
    every product and every weighted sum of such blocks.

    Source:
        RoAd (arXiv:2409.00119), eq. 3 and Table 1; the order of parameters in a group is PEFT's.
    """

    name: str
    per_pair: int
    closure: str
    coefficients: Callable[[Tensor, Tensor, int], Coefficients]
    parameters: Callable[[Tensor, Tensor, int], Coefficients]

    def size(self, features: int) -> int:
        """Give the length of theta and of alpha for a layer of `features` rotated features."""
        return features // 2 * self.per_pair


def _shared(theta: Tensor, alpha: Tensor, group_size: int) -> Coefficients:
    cos, sin = ((alpha * f).view(-1, group_size // 2) for f in (theta.cos(), theta.sin()))
    return torch.cat((cos, cos), 1).flatten(), torch.cat((sin, sin), 1).flatten()


def _shared_inverse(first: Tensor, second: Tensor, group_size: int) -> Coefficients:
    first, second = (v.view(-1, 2, group_size // 2)[:, 0].flatten() for v in (first, second))
    return torch.atan2(second, first), torch.hypot(first, second)


def _per_row(theta: Tensor, alpha: Tensor, group_size: int) -> Coefficients:
    return alpha * theta.cos(), alpha * theta.sin()


def _per_row_inverse(first: Tensor, second: Tensor, group_size: int) -> Coefficients:
    return torch.atan2(second, first), torch.hypot(first, second)


def _per_entry(theta: Tensor, alpha: Tensor, group_size: int) -> Coefficients:
    theta, alpha = (p.view(-1, 2, group_size) for p in (theta, alpha))
    first = alpha[:, 0] * theta[:, 0].cos()
    second = alpha[:, 1] * theta[:, 1].sin()
    return first.flatten(), second.flatten()


def _per_entry_inverse(first: Tensor, second: Tensor, group_size: int) -> Coefficients:
    alpha = torch.stack([v.view(-1, group_size) for v in (first, second)], 1)
    theta = torch.zeros_like(alpha)
    theta[:, 1] = math.pi / 2
    return theta.flatten(), alpha.flatten()


VARIANTS = {
    v.name: v
    for v in (
        Variant("road_1", 1, "road_1", _shared, _shared_inverse),
        Variant("road_2", 2, "road_4", _per_row, _per_row_inverse),
        Variant("road_4", 4, "road_4", _per_entry, _per_entry_inverse),
    )
}
