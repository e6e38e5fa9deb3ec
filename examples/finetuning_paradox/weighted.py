"""A loss in which rows have weights: those of translations, and those of what is mixed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from recipes_peft.data import Encoded, collate


class Weighted(torch.nn.Module):
    """A model whose loss is the mean over tokens, each times the weight of its row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, weights: torch.Tensor, labels: torch.Tensor, **batch: Any) -> CausalLMOutput:
        """Give the loss of a batch of `join`."""
        logits = self.model(**batch).logits[:, :-1].float().transpose(1, 2)
        wanted = labels[:, 1:]
        losses = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="none").sum(1)
        return CausalLMOutput(loss=(losses * weights).sum() / (wanted != -100).sum())


def join(rows: Sequence[tuple[Encoded, float]], pad: int) -> dict[str, Any]:
    """Make a batch of rows with their weights."""
    batch = collate([row for row, _ in rows], pad)
    return batch | {"weights": torch.tensor([weight for _, weight in rows])}
