"""Softmax that reaches exact zeros: clipped, and clipped with a sum that no length changes.

With p the softmax over the T visible keys of a row, a stretch zeta >= 1 and a shift gamma <= 0:

    clipped:     clip((zeta - gamma) p + gamma, 0, 1), whose sum before clipping is
                 zeta + (T - 1) gamma and so depends on T
    normalised:  the same with gamma_T = (beta - zeta) / (T - 1), whose sum is beta for every T
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes_peft.errors import UserError

__all__ = [
    "KINDS",
    "Variant",
    "beta_of",
    "clipped_softmax",
    "gamma_of_alpha",
    "gamma_of_beta",
    "normalized_clipped_softmax",
    "row_sum",
]


@dataclass(frozen=True)
class Variant:
    """Which softmax, and its numbers; `gamma` is read by `clipped`, `beta` by `normalized`.

    Raises:
        UserError: there is no such kind, or a number makes no sense for it.
    """

    kind: str = "softmax"
    zeta: float = 1.0
    gamma: float = 0.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"the softmax is {self.kind!r}; choose from {', '.join(KINDS)}")
        if self.zeta < 1:
            raise UserError(f"zeta is {self.zeta}; the stretch must be 1 or above")
        if self.kind == "clipped" and self.gamma > 0:
            raise UserError(f"gamma is {self.gamma}; the shift must be 0 or below")
        if self.kind == "normalized" and self.beta > self.zeta:
            raise UserError(f"beta is {self.beta}; it must be at most zeta, which is {self.zeta}")

    def __call__(self, scores: Tensor, n_visible: Tensor, visible: Tensor | None) -> Tensor:
        """Give the probabilities of scores in which hidden keys are lowest; float32.

        Shapes:
            scores: (..., keys). n_visible: (..., 1). visible: as the scores, or None for all.
        """
        return KINDS[self.kind](self, scores, n_visible, visible)


def clipped_softmax(
    scores: Tensor, zeta: float, gamma: float | Tensor, visible: Tensor | None = None
) -> Tensor:
    """Stretch, shift and clip the softmax over the last dimension; rows need not sum to 1.

    Shapes:
        scores: (..., keys), hidden keys lowest. visible: as the scores, or None. Returns float32.
    Source:
        Bondarenko et al. (NeurIPS 2023).
    """
    clipped = _clip(torch.softmax(scores.float(), -1), zeta, gamma)
    return clipped if visible is None else clipped * visible


def normalized_clipped_softmax(
    scores: Tensor, n_visible: Tensor, zeta: float, beta: float, visible: Tensor | None = None
) -> Tensor:
    """Give the clipped softmax whose rows sum to `beta` before clipping, however many keys.

    With one visible key it is the softmax.

    Shapes:
        scores: (..., keys), hidden keys lowest. n_visible: (..., 1), visible keys of each row.
        visible: as the scores, or None. Returns float32.
    Source:
        Liao and Monz (arXiv:2402.12102); the form as in the README.
    """
    p = torch.softmax(scores.float(), -1)
    # one visible key would divide by zero; its row stays the softmax
    gamma = gamma_of_beta(beta, zeta, n_visible.clamp(min=2))
    found = torch.where(n_visible > 1, _clip(p, zeta, gamma), p)
    return found if visible is None else found * visible


def _clip(p: Tensor, zeta: float, gamma: float | Tensor) -> Tensor:
    return ((zeta - gamma) * p + gamma).clamp(0, 1)


def _softmax(variant: Variant, scores: Tensor, n_visible: Tensor, visible: Tensor | None) -> Tensor:
    return torch.softmax(scores.float(), -1)


def _clipped(variant: Variant, scores: Tensor, n_visible: Tensor, visible: Tensor | None) -> Tensor:
    return clipped_softmax(scores, variant.zeta, variant.gamma, visible)


def _normalized(
    variant: Variant, scores: Tensor, n_visible: Tensor, visible: Tensor | None
) -> Tensor:
    return normalized_clipped_softmax(scores, n_visible, variant.zeta, variant.beta, visible)


KINDS = {"softmax": _softmax, "clipped": _clipped, "normalized": _normalized}


def row_sum(length: int | Tensor, zeta: float, gamma: float | Tensor) -> float | Tensor:
    """Give the sum of a row before clipping: zeta + (T - 1) gamma."""
    return zeta + (length - 1) * gamma


def gamma_of_alpha(alpha: float, length: int) -> float:
    """Give the shift -alpha / T of a model pretrained at the length T (Bondarenko et al.)."""
    return -alpha / length


def gamma_of_beta(beta: float, zeta: float, length: int | Tensor) -> float | Tensor:
    """Give the shift that makes rows of this length sum to `beta`: (beta - zeta) / (T - 1)."""
    return (beta - zeta) / (length - 1)


def beta_of(gamma: float, zeta: float, length: int) -> float:
    """Give the beta of the normalised form that equals a clipped one at this length."""
    return float(row_sum(length, zeta, gamma))
