"""Predictors without multilingual pretraining, and one with no more than word vectors of it.

All learn from English items, but `translate_train`, which learns from their machine translation.
Features are n-grams of characters, weighted by TF-IDF; regressions are softmax regressions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from translated import Item

__all__ = ["CharLstm", "Majority", "Ngrams", "Regression", "grams", "overlap", "word_grams"]


def grams(text: str, sizes: Sequence[int] = (3,)) -> list[str]:
    """Give the n-grams of characters of a text in lower case, spaces at its ends included."""
    padded = f" {' '.join(text.lower().split())} "
    return [padded[i : i + n] for n in sizes for i in range(len(padded) - n + 1)]


def word_grams(text: str) -> list[str]:
    """Give the words of a text in lower case: the features of a bag of words."""
    return text.lower().split()


class Majority:
    """Always the most frequent label, the smallest of equals."""

    def __init__(self, train: Sequence[Item]) -> None:
        counts = Counter(item.label for item in train)
        self.label = min(counts, key=lambda label: (-counts[label], label))

    def predict(self, items: Sequence[Item]) -> list[int]:
        """Give a label for each item."""
        return [self.label for _ in items]


class Ngrams:
    """TF-IDF vectors of known texts: tf x (1 + ln((1 + N) / (1 + df))), of length one."""

    def __init__(self, texts: Sequence[str], features=grams) -> None:  # type: ignore[no-untyped-def]
        self.features = features
        seen = Counter(gram for text in texts for gram in set(features(text)))
        self.place = {gram: i for i, gram in enumerate(sorted(seen))}
        self.idf = {g: 1 + math.log((1 + len(texts)) / (1 + seen[g])) for g in seen}

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Give the vectors (texts, n-grams that were known); those of other n-grams alone are 0."""
        found = torch.zeros(len(texts), max(1, len(self.place)))
        for row, text in enumerate(texts):
            for gram, count in Counter(self.features(text)).items():
                if gram in self.place:
                    found[row, self.place[gram]] = count * self.idf[gram]
        return F.normalize(found, dim=1)


def nearest(vectors: Tensor, known: Tensor, labels: Sequence[int]) -> list[int]:
    """Give the label of the most similar known vector, by cosine, the first of equals."""
    similar = F.normalize(vectors, dim=1) @ F.normalize(known, dim=1).T
    return [labels[i] for i in similar.argmax(1).tolist()]


class Regression(nn.Module):
    """Softmax regression on vectors, with an L2 penalty, fitted by L-BFGS from zero."""

    def __init__(self, x: Tensor, labels: Sequence[int], penalty: float = 1e-3) -> None:
        super().__init__()
        self.labels = sorted(set(labels))
        self.linear = nn.Linear(x.shape[1], len(self.labels))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        y = torch.tensor([self.labels.index(label) for label in labels])
        steps = torch.optim.LBFGS(self.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            steps.zero_grad()
            loss = F.cross_entropy(self.linear(x), y)
            loss = loss + penalty * self.linear.weight.square().sum()
            loss.backward()
            return loss

        steps.step(closure)

    @torch.no_grad()
    def predict(self, x: Tensor) -> list[int]:
        """Give a label for each row."""
        return [self.labels[i] for i in self.linear(x).argmax(1).tolist()]


def marked(fields: Sequence[str]) -> str:
    """Give one text of two: n-grams that both have, and those that one has, as words apart."""
    if len(fields) == 1:
        return fields[0]
    first, second = (set(grams(field)) for field in fields[:2])
    both, one = sorted(first & second), sorted(first ^ second)
    return "\t".join([*(f"={gram}" for gram in both), *(f"/{gram}" for gram in one)])


def split_marked(text: str) -> list[str]:
    """Give the features of what `marked` gave."""
    return text.split("\t") if "\t" in text else grams(text, (2, 3, 4))


def overlap(items: Sequence[Item]) -> list[int]:
    """Choose the option (second field on) that shares the most trigrams with the premise."""
    chosen = []
    for item in items:
        premise = set(grams(item.fields[0]))
        shares = [
            len(premise & set(grams(option))) / max(1, len(set(grams(option))))
            for option in item.fields[1:]
        ]
        chosen.append(max(range(len(shares)), key=shares.__getitem__))
    return chosen


class CharLstm(nn.Module):
    """An LSTM over the characters of a text, trained from nothing on English."""

    def __init__(
        self, texts: Sequence[str], labels: Sequence[int], steps: int, seed: int, width: int = 64
    ) -> None:
        super().__init__()
        self.labels = sorted(set(labels))
        self.signs = {sign: i + 1 for i, sign in enumerate(sorted(set("".join(texts))))}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(len(self.signs) + 1, width)
            self.lstm = nn.LSTM(width, width, batch_first=True, bidirectional=True)
            self.head = nn.Linear(2 * width, len(self.labels))
            y = torch.tensor([self.labels.index(label) for label in labels])
            optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
            for _ in range(steps):
                some = torch.randint(len(texts), (min(32, len(texts)),))
                loss = F.cross_entropy(self([texts[i] for i in some]), y[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Give logits (texts, labels)."""
        rows = [[self.signs.get(s, 0) for s in text] or [0] for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(padded), lengths, batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        real = (torch.arange(states.shape[1]) < lengths[:, None])[..., None]
        return self.head((states * real).sum(1) / lengths[:, None])

    @torch.no_grad()
    def predict(self, texts: Sequence[str]) -> list[int]:
        """Give a label for each text."""
        return [self.labels[i] for i in self(texts).argmax(1).tolist()] if texts else []
