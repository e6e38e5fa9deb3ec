"""The equations of the study: how far finetuning moved a representation, and three first layers.

A representation can change in length and in direction. The first part measures both of a trained
model; the second builds layers that see only one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "FIRST_LAYERS",
    "Head",
    "angle_only",
    "change_of_direction",
    "change_of_magnitude",
    "magnitude_only",
    "radial_share",
    "rank_correlation",
    "standard",
]


def change_of_magnitude(before: Tensor, after: Tensor) -> Tensor:
    """Give dM, the relative change of length: | |x| - |x0| | / |x0|.

    Shapes:
        before, after: (..., d). Returns (...), float64.
    """
    was, now = before.double().norm(dim=-1), after.double().norm(dim=-1)
    return (now - was).abs() / was


def change_of_direction(before: Tensor, after: Tensor) -> Tensor:
    """Give dD, the cosine of the angle between x0 and x: 1 if nothing turned, less if it did.

    Shapes:
        before, after: (..., d). Returns (...), float64.
    """
    return F.cosine_similarity(before.double(), after.double(), dim=-1, eps=0).clamp(-1, 1)


def radial_share(before: Tensor, after: Tensor) -> Tensor:
    """Give the share of the squared move that is a change of length; the rest is rotation.

    By the law of cosines  |x - x0|^2 = (|x| - |x0|)^2 + 2 |x| |x0| (1 - dD),  so the two shares add
    up to one, which dM and 1 - dD, in different units, do not. 0 where nothing moved.

    Shapes:
        before, after: (..., d). Returns (...), float64.
    """
    was, now = before.double().norm(dim=-1), after.double().norm(dim=-1)
    radial = (now - was).square()
    turned = 2 * was * now * (1 - change_of_direction(before, after))
    moved = radial + turned
    return torch.where(moved > 0, radial / moved, 0.0)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Give Spearman's correlation of two vectors without ties; 0 if one of them is constant."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return 0.0
    return torch.corrcoef(ranks)[0, 1].item()


def standard(weight: Tensor, x: Tensor) -> Tensor:
    """Give z_i = w_i . x, the product of what the two others see.

    Shapes, here and below:
        weight: (k, d), a w_i in each row. x: (n, d). Returns (n, k).
    """
    return x @ weight.T


def magnitude_only(weight: Tensor, x: Tensor) -> Tensor:
    """Give z_i = |w_i| |x|."""
    return x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)


def angle_only(weight: Tensor, x: Tensor) -> Tensor:
    """Give z_i = cos(w_i, x)."""
    return F.normalize(x, dim=-1) @ F.normalize(weight, dim=-1).T


FIRST_LAYERS = {"standard": standard, "magnitude": magnitude_only, "angle": angle_only}


class Head(nn.Module):
    """A classifier of two layers on a frozen representation of d features; the first is d to d.

    A ReLU stands between them: lengths are never negative, so it leaves a magnitude-only layer the
    linear function that it is, where a saturating one would hide how little it sees.
    """

    def __init__(self, kind: str, features: int, outputs: int) -> None:
        super().__init__()
        self.first = FIRST_LAYERS[kind]
        self.weight = nn.Parameter(nn.Linear(features, features, bias=False).weight.detach())
        self.second = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.weight, x)))
