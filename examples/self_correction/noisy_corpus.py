"""The pairs of a run: read, cut, split by document, encoded, and made noisy by the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from misalignment import (
    Noisy,
    band_of,
    char_tfidf,
    embed,
    keep_best,
    simulate_misalignment,
    without_repeats,
)
from torch import Tensor

from recipes_peft import encoders, parallel, translation
from recipes_peft.data import Encoded
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair

__all__ = ["Corpus", "apart", "chunks", "misaligned", "part", "prepare", "vectors"]

SPLIT = 0  # seeds of runs differ, what they are tested on does not


@dataclass(frozen=True)
class Corpus:
    """Clean pairs: to train on, to warm up on, for development and to test on.

    `dropped` pairs of the data say what test data of their own say, on one side at least.
    """

    train: list[Pair]
    warm: list[Pair]
    development: list[Pair]
    test: list[Pair]
    dropped: int = 0


def prepare(given: Any, tokenizer: Any) -> Corpus:
    """Read pairs and split them; no document stands in two parts, nor a text of the test data.

    Raises:
        UserError: there are no such pairs, or too few short enough ones.
    """
    pairs, dropped = _read(given.data, given, tokenizer), 0
    if given.test_data:
        test = _read(given.test_data, given, tokenizer)[: given.test_pairs]
        others = apart(pairs, test)
        pairs, dropped = others, len(pairs) - len(others)
        if not pairs:
            raise UserError(
                f"every pair of {given.data} stands in {given.test_data}; give other test data"
            )
    else:
        pairs, test = parallel.split_by_document(pairs, given.test_pairs, SPLIT)
    pairs, development = parallel.split_by_document(pairs, given.development_pairs, SPLIT)
    warm: list[Pair] = []
    if given.warm_steps:
        pairs, warm = parallel.split_by_document(pairs, given.warm_pairs, SPLIT)
    return Corpus(pairs[: given.train_pairs], warm, development, test, dropped)


def apart(pairs: Sequence[Pair], test: Sequence[Pair]) -> list[Pair]:
    """Give the pairs neither side of which is in the test, whatever its case and spaces."""
    sources, targets = {_plain(p.source) for p in test}, {_plain(p.target) for p in test}
    return [
        pair
        for pair in pairs
        if _plain(pair.source) not in sources and _plain(pair.target) not in targets
    ]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _read(where: str, given: Any, tokenizer: Any) -> list[Pair]:
    pairs = parallel.read(where, given.source, given.target)
    if given.words:
        pairs = chunks(pairs, given.words)
    kept = [pair for pair in without_repeats(pairs) if _fits(pair, given, tokenizer)]
    if not kept:
        raise UserError(
            f"no pair of {where} has at most {given.max_length} tokens; raise --max-length"
        )
    return kept


def _fits(pair: Pair, given: Any, tokenizer: Any) -> bool:
    # far too long a text is not worth the tokenizer's time
    if len(pair.source) + len(pair.target) > 8 * given.max_length:
        return False
    row = translation.encode(pair, tokenizer, 10 * given.max_length)
    return len(row.prompt) + len(row.answer) <= given.max_length


def chunks(pairs: list[Pair], words: int) -> list[Pair]:
    """Cut pairs with as many words on both sides into pieces of one to `words` words each.

    For languages that say the same word by word, such as a text and its transcription.
    """
    made = []
    for pair in pairs:
        left, right = pair.source.split(), pair.target.split()
        if len(left) != len(right):
            continue
        start, size = 0, 1
        while start < len(left):
            piece = slice(start, start + size)
            source, target = " ".join(left[piece]), " ".join(right[piece])
            made.append(replace(pair, source=source, target=target))
            start, size = start + size, size % words + 1
    return made


@lru_cache(maxsize=4)  # the same texts serve every seed and arm
def vectors(texts: tuple[str, ...], encoder: str) -> Tensor:
    """Give unit vectors of texts, by `tfidf` or an encoder's name."""
    if encoder == "tfidf":
        return char_tfidf(texts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = encoders.load_encoder(encoder)
    return embed(texts, model.to(device), tokenizer)


def misaligned(pairs: Sequence[Pair], given: Any, rate: float, seed: int) -> list[Noisy]:
    """Make a share of pairs noisy as the settings say."""
    if not rate:
        return [Noisy(pair, False, 1.0) for pair in pairs]
    return list(_misaligned(tuple(pairs), given.encoder, given.noise, rate, seed))


@lru_cache(maxsize=8)  # every arm of a seed has the same noise
def _misaligned(
    pairs: tuple[Pair, ...], encoder: str, noise: str, rate: float, seed: int
) -> list[Noisy]:
    found = vectors(tuple(pair.target for pair in pairs), encoder)
    return simulate_misalignment(pairs, found, rate, band_of(noise, found), seed)


def part(
    name: str, rows: list[Encoded], noisy: list[bool], doubts: Sequence[float], share: float
) -> list[Encoded]:
    """Give the rows of a part: all, the clean ones, or without the `share` that a filter doubts.

    Raises:
        UserError: nothing is left.
    """
    if name == "all":
        return rows
    if name == "clean":
        kept = [row for row, flag in zip(rows, noisy, strict=True) if not flag]
    else:
        kept = keep_best(rows, doubts, share)
    if not kept:
        lower = "--rates" if name == "clean" else "--filtered-share, or --rates if it is not given"
        raise UserError(f"no {name} pair of {len(rows)} is left to train on; lower {lower}")
    return kept
