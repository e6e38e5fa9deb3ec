"""Calibration samples: windows of the tokens of a text, and the batches that a model is given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_TABLE = re.compile(r"(^|\.)(wpe|\w*position\w*)$")  # of learned positions, by its name


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


def tokenised(samples: Any, tokenizer: Any, count: int, length: int, seed: int | None) -> Any:
    """Give token ids for texts, and anything else as it is.

    Raises:
        ValueError: there are texts and no tokenizer, or as in `samples_of`.
    """
    texts = isinstance(samples, str) or (
        not isinstance(samples, Tensor) and len(samples) > 0 and isinstance(samples[0], str)
    )
    if not texts:
        return samples
    if tokenizer is None:
        raise ValueError("samples are texts; give the model's own tokenizer= as well")
    return samples_of(samples, tokenizer, count, length, seed)


def batches_of(samples: Any, model: Any, batch_size: int) -> list[Mapping[str, Tensor]]:
    """Give what the model takes, batch by batch, for token ids or for batches.

    Raises:
        ValueError: there are none, they are no token ids, or they are longer than the model allows.
    """
    if not isinstance(samples, Tensor):
        if not samples:
            raise ValueError("there are no samples; give at least one batch")
        batches = list(samples)
    elif samples.dim() != 2 or samples.is_floating_point() or not samples.numel():
        raise ValueError(
            f"samples have shape {tuple(samples.shape)} and dtype {samples.dtype}; give token ids"
            " (samples, length), or batches as dictionaries of tensors"
        )
    else:
        names = ["input_ids"]
        if getattr(model.config, "is_encoder_decoder", False):
            names.append("decoder_input_ids")
        batches = [dict.fromkeys(names, part) for part in samples.split(batch_size)]
    ids = [b[n] for b in batches for n in ("input_ids", "decoder_input_ids") if n in b]
    check_length(model, max((t.shape[-1] for t in ids), default=0))
    return batches


def check_length(model: nn.Module, length: int) -> None:
    """Refuse samples of more tokens than the model has positions for.

    Raises:
        ValueError: says how many it has.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _TABLE.search(name):
            unused = getattr(module, "offset", 0)  # OPT and BART leave the first two out
            if module.padding_idx is not None:  # and RoBERTa all to that of padding
                unused = module.padding_idx + 1
            positions = module.num_embeddings - unused
            if length > positions:
                raise ValueError(
                    f"samples have {length} tokens, but the model has {positions} positions"
                    f" ({name}); give samples of at most {positions}"
                )
