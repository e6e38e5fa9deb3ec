"""Noise as the web has it: fluent translations of something else, more or less similar.

A part of the pairs gets the target of another pair, whose similarity to its own lies in a band. The
flag of a noisy pair is for diagnosis alone and never reaches a loss.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair

__all__ = [
    "FILTERS",
    "PRESETS",
    "Noisy",
    "auroc",
    "band_of",
    "char_tfidf",
    "embed",
    "filter_scores",
    "keep_best",
    "simulate_misalignment",
    "without_repeats",
]

# of each preset: between which quantiles of all targets' nearest-neighbour similarity the band is
PRESETS: dict[str, tuple[float, float] | None] = {
    "shuffle": None,  # any other target
    "easy": (0.0, 0.25),
    "medium": (0.25, 0.75),
    "hard": (0.75, 1.0),
}
FILTERS = ("length", "similarity", "loss")
MOST_USES = 3  # of one target as a replacement
POOL = 1000  # targets to choose from for a pair, at random where there are more


@dataclass(frozen=True)
class Noisy:
    """A pair to train on, and whether its target is another's."""

    pair: Pair
    noisy: bool
    similarity: float  # of the target to the pair's own; 1 where it is its own


def without_repeats(pairs: Sequence[Pair]) -> list[Pair]:
    """Keep the first pair of each source and of each target: a repeat's target may be right."""
    sources: set[str] = set()
    targets: set[str] = set()
    kept = []
    for pair in pairs:
        if pair.source not in sources and pair.target not in targets:
            kept.append(pair)
        sources.add(pair.source)
        targets.add(pair.target)
    return kept


def char_tfidf(texts: Sequence[str], size: int = 2048) -> Tensor:
    """Give unit vectors (texts, size) of hashed character trigrams and quadrigrams, TF-IDF."""
    counts = torch.zeros(len(texts), size)
    for row, text in enumerate(texts):
        words = [f" {word} " for word in text.casefold().split()]
        grams = Counter(
            zlib.crc32(word[i : i + n].encode()) % size
            for word in words
            for n in (3, 4)
            for i in range(max(1, len(word) - n + 1))
        )
        counts[row, list(grams)] = torch.tensor([float(count) for count in grams.values()])
    frequency = (counts > 0).sum(0)
    inverse = torch.log((1 + len(texts)) / (1 + frequency)) + 1
    return torch.nn.functional.normalize(counts.log1p() * inverse, dim=-1)


@torch.no_grad()
def embed(texts: Sequence[str], encoder: Any, tokenizer: Any, batch_size: int = 32) -> Tensor:
    """Give unit vectors of texts: the mean of an encoder's last states over their tokens."""
    found: dict[int, Tensor] = {}
    ranked = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(ranked), batch_size):
        chosen = ranked[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        ).to(encoder.device)
        states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1)
        found |= dict(zip(chosen, torch.nn.functional.normalize(means.float().cpu()), strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


def band_of(preset: str, vectors: Tensor) -> tuple[float, float]:
    """Give the band of similarity of a preset, from the texts' nearest neighbours."""
    quantiles = PRESETS[preset]
    if quantiles is None:
        return (-1.0, 1.0)
    chosen = range(0, len(vectors), -(-len(vectors) // POOL))  # all, unless they are many
    similar = vectors[list(chosen)] @ vectors.T
    similar[torch.arange(len(chosen)), torch.tensor(chosen)] = -torch.inf
    nearest = similar.max(-1).values
    low, high = torch.quantile(nearest, torch.tensor(quantiles)).tolist()
    return (low, high)


def simulate_misalignment(
    pairs: Sequence[Pair], vectors: Tensor, rate: float, band: tuple[float, float], seed: int
) -> list[Noisy]:
    """Give a share `rate` of the pairs the target of another, similar to its own within the band.

    The other target is another text, half to twice as long if there is one, and used at most three
    times; of many such, a thousand are looked at. Where none lies in the band, the one nearest to
    it is taken. All sources stay, in their order.

    Shapes:
        vectors: (pairs, any), unit vectors of the targets.
    Raises:
        UserError: the rate is not in [0, 1], or no target is left for a pair.
    """
    if not 0 <= rate <= 1:
        raise UserError(f"the rate of noise is {rate}; give a share from 0 to 1")
    chance = random.Random(seed)
    low, high = band
    lengths = torch.tensor([len(pair.target) for pair in pairs])
    number = {text: i for i, text in enumerate(pair.target for pair in pairs)}
    texts = torch.tensor([number[pair.target] for pair in pairs])
    uses = torch.zeros(len(pairs), dtype=torch.long)
    noisy: dict[int, tuple[int, float]] = {}
    for i in sorted(chance.sample(range(len(pairs)), round(rate * len(pairs)))):
        other = (uses < MOST_USES) & (texts != texts[i])
        near = other & (lengths[i] <= 2 * lengths) & (lengths <= 2 * lengths[i])
        candidates = (near if near.any() else other).nonzero().flatten().tolist()
        if not candidates:
            raise UserError(
                f"no other target is left for {pairs[i].target!r}; give more pairs, or a lower rate"
                " of noise"
            )
        if len(candidates) > POOL:
            candidates = chance.sample(candidates, POOL)
        similar = vectors[candidates] @ vectors[i]
        outside = torch.maximum(low - similar, similar - high)
        inside = (outside <= 0).nonzero().flatten().tolist()
        place = chance.choice(inside) if inside else int(outside.argmin())
        uses[candidates[place]] += 1
        noisy[i] = (candidates[place], similar[place].item())
    return [
        Noisy(replace(pair, target=pairs[noisy[i][0]].target), True, noisy[i][1])
        if i in noisy
        else Noisy(pair, False, 1.0)
        for i, pair in enumerate(pairs)
    ]


def filter_scores(
    pairs: Sequence[Pair], loss: list[float] | None, vectors: tuple[Tensor, Tensor]
) -> dict[str, list[float]]:
    """Score pairs as filters before training do, the more doubtful the higher.

    `length`: how far the ratio of lengths is from its median. `loss`: a model's loss per token of
    the target, if it is given. `similarity`: minus the cosine of source and target.
    """
    ratios = torch.tensor([len(p.target) / len(p.source) for p in pairs]).log()
    scores = {
        "length": (ratios - ratios.median()).abs().tolist(),
        "similarity": (-(vectors[0] * vectors[1]).sum(-1)).tolist(),
    }
    return scores if loss is None else {**scores, "loss": loss}


def keep_best(rows: Sequence[Any], scores: Sequence[float], rate: float) -> list[Any]:
    """Drop the share `rate` of the rows that a filter doubts most; the others keep their order."""
    ranked = sorted(range(len(rows)), key=scores.__getitem__)
    kept = set(ranked[: len(rows) - round(rate * len(rows))])
    return [row for i, row in enumerate(rows) if i in kept]


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Give the chance that a positive scores above a negative, ties counting half.

    None where there is no positive or no negative.
    """
    first, second = scores[positive].double(), scores[~positive].double()
    if not len(first) or not len(second):
        return None
    ranked = second.sort().values
    below = torch.searchsorted(ranked, first) + torch.searchsorted(ranked, first, right=True)
    return (below.double().mean() / 2 / len(second)).item()
