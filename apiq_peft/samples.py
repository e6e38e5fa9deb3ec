"""Calibration samples from text: windows of tokens, drawn at random or side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tokens_of(texts: str | Iterable[str], tokenizer: Any) -> Tensor:
    """Tokenise texts, joined by blank lines, at once and without special tokens.

    Shapes:
        Returns (length,), token ids.
    Raises:
        TypeError: something among the texts is no text.
    """
    parts = [texts] if isinstance(texts, str) else list(texts)
    for number, part in enumerate(parts):
        if not isinstance(part, str):
            raise TypeError(f"text {number} is {type(part).__name__}; give strings")
    # not verbose: that the whole text is longer than what the model takes is no mistake here
    found = tokenizer("\n\n".join(parts), add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(found, dtype=torch.long)


def samples_of(
    texts: str | Iterable[str],
    tokenizer: Any,
    count: int,
    length: int,
    seed: int | None = None,
) -> Tensor:
    """Give `count` windows of `length` tokens of the texts.

    Without `seed` they are the first ones, side by side. With it each begins anywhere, drawn from
    that seed, and windows may overlap.

    Shapes:
        Returns (count, length), token ids.
    Raises:
        TypeError: something among the texts is no text.
        ValueError: the texts have too few tokens, or a number is below 1.
    Source:
        ApiQ's published script draws 128 windows of 2048 tokens at random, with the generator of
        Python; here it is torch's, so the windows of a seed are others.
    """
    if count < 1 or length < 1:
        raise ValueError(f"{count} samples of {length} tokens were asked for; give at least 1 of 1")
    tokens = tokens_of(texts, tokenizer)
    windows = count if seed is None else 1  # that must fit side by side
    if len(tokens) < windows * length:
        raise ValueError(
            f"the text has {len(tokens)} tokens, but {windows} x {length} = {windows * length} are"
            " needed; give more text, or fewer or shorter samples"
        )
    if seed is None:
        return tokens[: count * length].view(count, length).clone()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)]
