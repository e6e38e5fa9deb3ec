"""The loss of each row's answer; what many prompts begin with is run through the model once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch.nn import functional as F

from recipes_peft import loop
from recipes_peft.data import Encoded, collate


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[Encoded], batch_size: int, pad: int) -> list[float]:
    """Give the loss of each row's answer, summed over its tokens, in nats.

    Prompts with the same examples before them have most of their tokens in common: of such rows
    the keys and values of the common part are computed once, and the batches continue from them.
    """
    model.eval()
    found = [0.0] * len(rows)
    for group, common in _alike([row.prompt for row in rows], batch_size):
        before = _run(model, common) if common else None
        chosen = sorted(group, key=lambda i: len(rows[i].prompt) + len(rows[i].answer))
        for first in range(0, len(chosen), batch_size):
            these = chosen[first : first + batch_size]
            rest = [Encoded(rows[i].prompt[len(common) :], rows[i].answer) for i in these]
            losses = _losses(model, collate(rest, pad), before, len(common))
            for i, value in zip(these, losses.tolist(), strict=True):
                found[i] = value
    return found


def _alike(prompts: Sequence[list[int]], least: int) -> list[tuple[list[int], list[int]]]:
    """Group prompts by their beginnings; give each group, and what its prompts begin with.

    In a group of `least` prompts or more, the first shares half of each at least. All others come
    last, in a group that begins with nothing.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        first = prompts[groups[-1][0]] if groups else []
        if 2 * len(_common([first, prompts[i]])) >= len(prompts[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    large = [group for group in groups if len(group) >= max(2, least)]
    found = [(group, _common([prompts[i] for i in group])) for group in large]
    rest = [i for group in groups if len(group) < max(2, least) for i in group]
    return [*found, (rest, [])] if rest else found


def _common(prompts: Sequence[list[int]]) -> list[int]:
    """Give what all prompts begin with, but for the last token of the shortest."""
    columns = list(zip(*prompts, strict=False))[:-1]
    return [column[0] for column in takewhile(lambda c: len(set(c)) == 1, columns)]


def _run(model: Any, tokens: list[int]) -> Any:
    ids = torch.tensor([tokens], device=model.device)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _losses(model: Any, batch: dict[str, Any], before: Any, length: int) -> torch.Tensor:
    """Give the losses of a batch's rows, which come after `length` tokens that `before` holds."""
    if before is not None:
        count = len(batch["input_ids"])
        mask = batch["attention_mask"]
        batch["attention_mask"] = torch.cat([mask.new_ones(count, length), mask], 1)
        batch["position_ids"] = batch["position_ids"] + length
        batch["past_key_values"] = copy.deepcopy(before)  # a forward adds to it
        batch["past_key_values"].batch_repeat_interleave(count)
    batch = loop.to(batch, model.device)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
