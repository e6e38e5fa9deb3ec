"""Prompts whose beginnings are computed once: nothing before the intervention ever changes.

Only the last tokens of a prompt are intervened on, and attention is causal. So the keys and values
of the tokens before them are those of the base model, for every adapter and every step: they are
kept, and training and generation start from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

IGNORED = -100  # the label of what has none
AT_ONCE = 16  # prompts to compute

Begun = tuple[int, ...]  # the tokens of a prompt but for the last
States = list[tuple[Tensor, Tensor]]  # keys and values of every layer, (heads, tokens, features)


class Prefixes:
    """Makes batches that begin with the cached prompts, all but their `last` tokens."""

    def __init__(self, model: Any, pad: int, last: int, room: int) -> None:
        """Keep the `room` prompts that were used last; others are computed again."""
        self.model, self.pad, self.last, self.room = model, pad, last, room
        self._kept: dict[Begun, States] = {}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of rows with a `prompt` and an `answer`.

        Shapes:
            input_ids: (rows, last + longest answer - 1). labels: (rows, longest answer), which
            the logits of the last so many columns predict.
        """
        cache, mask = self._start([row["prompt"] for row in rows])
        ends = torch.tensor([row["prompt"][-self.last :] for row in rows])
        longest = max(len(row["answer"]) for row in rows)
        answers = torch.full((len(rows), longest), IGNORED)
        for line, row in zip(answers, rows, strict=True):
            line[: len(row["answer"])] = torch.tensor(row["answer"])
        given = answers[:, :-1]  # nothing follows the last token
        prompt = F.pad(mask, (0, self.last), value=1)
        attention = torch.cat((prompt, (given != IGNORED).long()), 1)
        ids = torch.cat((ends, given.masked_fill(given == IGNORED, self.pad)), 1)
        places = (attention.cumsum(1) - 1)[:, -ids.shape[1] :]
        tensors = {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": places,
            "prompt_mask": prompt,
            "labels": answers,
        }
        device = self.model.device
        return {"past_key_values": cache, **{k: v.to(device) for k, v in tensors.items()}}

    @torch.no_grad()
    def generate(
        self, model: Any, prompts: Sequence[list[int]], subspaces: list[list[str]], **how: Any
    ) -> Tensor:
        """Generate greedily for all rows in one batch, each with subspaces of its own.

        Shapes:
            Returns (rows, new tokens).
        """
        cache, mask = self._start(prompts)
        mask = F.pad(mask, (0, self.last), value=1).to(self.model.device)
        ids = torch.full(mask.shape, self.pad)
        for line, prompt in zip(ids, prompts, strict=True):
            line[-len(prompt) :] = torch.tensor(prompt)
        output = model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask,
            past_key_values=cache,
            subspaces=subspaces,
            do_sample=False,
            pad_token_id=self.pad,
            **how,
        )
        return output[:, ids.shape[1] :].cpu()

    def _start(self, prompts: Sequence[list[int]]) -> tuple[DynamicCache, Tensor]:
        """Give the cache of the beginnings, padded on the left, and the mask of their tokens."""
        begun = [tuple(prompt[: -self.last]) for prompt in prompts]
        states = self._states(begun)
        longest = max(map(len, begun))
        mask = torch.zeros(len(begun), longest, dtype=torch.long)
        for line, tokens in zip(mask, begun, strict=True):
            line[longest - len(tokens) :] = 1
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(states[begun[0]])):
            keys, values = (
                torch.stack(
                    [F.pad(states[t][layer][i], (0, 0, longest - len(t), 0)) for t in begun]
                )
                for i in (0, 1)
            )
            cache.update(keys, values, layer)
        return cache, mask

    def _states(self, begun: Sequence[Begun]) -> dict[Begun, States]:
        missing = sorted(set(begun) - self._kept.keys(), key=len)
        for start in range(0, len(missing), AT_ONCE):
            self._compute(missing[start : start + AT_ONCE])
        found = {tokens: self._kept.pop(tokens) for tokens in dict.fromkeys(begun)}
        self._kept |= found  # the last used stand last
        for tokens in list(self._kept)[: max(0, len(self._kept) - self.room)]:
            del self._kept[tokens]
        return found

    @torch.no_grad()
    def _compute(self, missing: Sequence[Begun]) -> None:
        longest = max(map(len, missing))
        ids = torch.full((len(missing), longest), self.pad)
        for line, tokens in zip(ids, missing, strict=True):
            line[: len(tokens)] = torch.tensor(tokens)
        # padded on the right, which no token before it sees
        output = self.model(
            input_ids=ids.to(self.model.device),
            past_key_values=DynamicCache(config=self.model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        for row, tokens in enumerate(missing):
            n = len(tokens)
            self._kept[tokens] = [
                (layer.keys[row, :, :n].clone(), layer.values[row, :, :n].clone())
                for layer in output.past_key_values.layers
            ]


def answer_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Give the mean loss per token of the answers, in nats."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits = model(**inputs, logits_to_keep=labels.shape[1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
