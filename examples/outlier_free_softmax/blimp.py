"""Minimal pairs of BLiMP: how often the good sentence is likelier than the bad one.

A causal model gives a sentence's likelihood; of a masked one it is the pseudo-likelihood, every
token predicted with it alone masked.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pretrain import Text
from torch.nn import functional as F
from transfer import collate

from recipes_peft import loop
from recipes_peft.errors import UserError

__all__ = ["accuracy", "likelihood", "read"]

Pair = tuple[list[int], list[int]]  # tokens of the good sentence and of the bad one


def read(folder: Path, most: int, text: Text, length: int) -> dict[str, list[Pair]]:
    """Give up to `most` pairs of each phenomenon whose sentences fit into `length` tokens.

    Raises:
        UserError: the folder holds no file of BLiMP, or no pair fits.
    """
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.xz")])
    found: dict[str, list[Pair]] = {}
    for path in paths:
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        pairs = (
            tuple(_ids(text, row[key]) for key in ("sentence_good", "sentence_bad")) for row in rows
        )
        fitting = [pair for pair in pairs if max(map(len, pair)) <= length][:most]
        if fitting:
            found[path.name.partition(".")[0]] = fitting  # type: ignore[assignment]
    if not found:
        raise UserError(
            f"{folder} holds no pair of sentences of at most {length} tokens; give the folder"
            " `data` of BLiMP (.jsonl, perhaps packed as .xz), or raise --length"
        )
    return found


def _ids(text: Text, sentence: str) -> list[int]:
    ids = text.tokenizer(sentence, add_special_tokens=False).input_ids
    return [text.tokenizer.cls_token_id, *ids]


@torch.no_grad()
def accuracy(model: Any, phenomena: dict[str, list[Pair]], text: Text) -> float:
    """Give the share of pairs whose good sentence is likelier, the mean over phenomena."""
    shares = []
    for pairs in phenomena.values():
        good, bad = (likelihood(model, [p[side] for p in pairs], text) for side in (0, 1))
        shares.append(sum(a > b for a, b in zip(good, bad, strict=True)) / len(pairs))
    return sum(shares) / len(shares)


@torch.no_grad()
def likelihood(model: Any, sentences: Sequence[list[int]], text: Text) -> list[float]:
    """Give the log-likelihood of each sentence behind its first token, in nats."""
    pad, model = text.tokenizer.pad_token_id, model.eval()
    if model.config.model_type == "opt":
        batch = loop.to(collate([(ids, 0) for ids in sentences], pad), model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return (-(losses * mask[:, 1:]).sum(1)).tolist()
    found = []
    for ids in sentences:
        places = torch.arange(1, len(ids))
        rows = torch.tensor(ids).repeat(len(places), 1)
        rows[torch.arange(len(places)), places] = text.tokenizer.mask_token_id
        logits = model(input_ids=rows.to(model.device)).logits
        own = logits[torch.arange(len(places)), places].log_softmax(-1).cpu()
        found.append(own[torch.arange(len(places)), torch.tensor(ids[1:])].sum().item())
    return found
