"""What a model makes of pairs: the loss of each token, and whether it tells noise from translation.

Raw loss rewards sharper outputs by themselves where training made them flat, and noise does; so the
loss is also given at the temperature that suits a model best on development data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np  # torch's quantile refuses more than 16 million values
import torch
from correction import certainty, error_norm, label_mass, selected
from misalignment import auroc
from torch import Tensor

from recipes_peft.data import Encoded, collate
from recipes_peft.loop import to

__all__ = ["TEMPERATURES", "Check", "Tokens", "check", "matched", "row_losses", "tokens"]

TEMPERATURES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2)
_PLAIN = TEMPERATURES.index(1.0)


@dataclass(frozen=True)
class Tokens:
    """Values of the N target tokens of some rows.

    Shapes:
        row: the index of its row. loss: -log p(y), (temperatures, N). norm: ||p - onehot(y)||.
        right: whether y is the likeliest. mass: what the loss in use leaves of the label.
        certain: c = 1 - H(p) / log V.
    """

    row: Tensor
    loss: Tensor
    norm: Tensor
    right: Tensor
    mass: Tensor
    certain: Tensor

    @property
    def plain(self) -> Tensor:
        return self.loss[_PLAIN]


@torch.no_grad()
def tokens(
    model: Any,
    rows: Sequence[Encoded],
    batch_size: int,
    pad: int,
    vocabulary: int | None = None,
    token_loss: Any = None,
    progress: float = 0.0,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Tokens:
    """Measure the target tokens of rows; `token_loss` at `progress` is what `mass` asks.

    Fewer temperatures than `TEMPERATURES` save time; `loss` is infinite at the others.
    """
    model.eval()
    ranked = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(rows[i].answer))
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, len(ranked), batch_size):
        chosen = ranked[start : start + batch_size]
        batch = to(collate([rows[i] for i in chosen], pad), model.device)
        labels = batch.pop("labels")
        z, y = selected(model(**batch).logits[..., :vocabulary], labels)
        z = z.float()
        owner = torch.tensor(chosen, device=z.device).repeat_interleave((labels != -100).sum(1))
        loss = torch.full((len(TEMPERATURES), len(y)), torch.inf)
        for i, temperature in enumerate(TEMPERATURES):
            if temperature in temperatures:
                loss[i] = torch.nn.functional.cross_entropy(z / temperature, y, reduction="none")
        mass = label_mass(token_loss, z, y, progress)
        values = error_norm(z, y), z.argmax(-1) == y, mass, certainty(z)
        found.append((owner.cpu(), loss, *(value.float().cpu() for value in values)))
    return Tokens(*(torch.cat(part, -1) for part in zip(*found, strict=True)))


def matched(development: Tokens, test: Tokens) -> tuple[float, float]:
    """Give the test loss at the temperature that is best on development data, and that one."""
    best = int(development.loss.mean(1).argmin())
    return test.loss[best].mean().item(), TEMPERATURES[best]


def row_losses(found: Tokens, count: int) -> list[float]:
    """Give the mean loss of each row's tokens."""
    total = torch.zeros(count).index_add(0, found.row, found.plain)
    return (total / torch.bincount(found.row, minlength=count)).tolist()


@dataclass(frozen=True)
class Check:
    """A point of the self-knowledge curve: what tells tokens of noisy pairs from clean ones."""

    progress: float
    loss_auroc: float | None  # of -log p(y); None without noise, or without clean pairs
    norm_auroc: float | None
    noisy_mass: float | None  # left on labels of noisy pairs
    clean_mass: float | None
    noisy_right: float | None  # share of noisy labels the model itself would give: memorised
    development_loss: float
    certainty_low: float  # of development tokens: what a twentieth of them lies below,
    certainty_middle: float  # the median,
    certainty_high: float  # and what a twentieth lies above


def check(found: Tokens, noisy: Sequence[bool], progress: float, development: Tokens) -> Check:
    """Sum up tokens at one moment of training: those of training pairs, some noisy, and others."""
    flags = torch.tensor(noisy)[found.row]

    def mean(values: Tensor, chosen: Tensor) -> float | None:
        return values[chosen].mean().item() if chosen.any() else None

    low, middle, high = np.quantile(development.certain.numpy(), (0.05, 0.5, 0.95)).tolist()
    return Check(
        progress,
        auroc(found.plain, flags),
        auroc(found.norm, flags),
        mean(found.mass, flags),
        mean(found.mass, ~flags),
        mean(found.right, flags),
        development.plain.mean().item(),
        low,
        middle,
        high,
    )
