"""A causal language model that chooses between options, without training: zero-shot prompting.

The text is the premise, a word for the relation, and an option; the option is chosen whose
characters are the likeliest on average. The words are English in every language; the paper's
prompts are not known to us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from translated import Item

__all__ = ["choose", "option_scores", "prompt"]


def prompt(item: Item) -> str:
    """Give what stands before an option: the premise, and `because` or `so` if the key has one."""
    relation = item.key.partition(" ")[2]
    premise = item.fields[0].rstrip()
    return f"{premise.rstrip('.。')} {relation}" if relation else premise


@torch.no_grad()
def option_scores(model: Any, tokenizer: Any, before: str, options: Sequence[str]) -> list[float]:
    """Give, for each option, the log-likelihood after `before` per byte of the option, in nats."""
    device = next(model.parameters()).device
    start = tokenizer(before).input_ids
    rows = [start + tokenizer(f" {o}", add_special_tokens=False).input_ids for o in options]
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    logp = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counted = mask[:, 1:].bool() & (torch.arange(1, width, device=device) >= len(start))
    sums = (logp * counted).sum(1).tolist()
    return [total / len(o.encode()) for total, o in zip(sums, options, strict=True)]


def choose(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[int]:
    """Give the index of the likeliest option of each item."""
    chosen = []
    for item in items:
        scores = option_scores(model, tokenizer, prompt(item), item.fields[1:])
        chosen.append(max(range(len(scores)), key=scores.__getitem__))
    return chosen
