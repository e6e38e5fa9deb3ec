"""What needs no knowledge of a language: overlap, nearness, and text without an order.

Two baselines are made of it. Both are fitted on the training language alone, and both "transfer"
to every language as long as the two segments are in the same one.
"""

from __future__ import annotations

import random
import statistics
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from parallel_pairs import Answer, Row

__all__ = [
    "ABSENT",
    "BINS",
    "OverlapBaseline",
    "ProximityBaseline",
    "answer_distance",
    "bin_of",
    "overlap",
    "script",
    "shuffle_words",
    "shuffled",
    "spans",
    "words",
]

ABSENT = 400.0  # the distance of an answer from a question that shares no token with its context
BINS = ("none", "(0, .2)", "[.2, .4)", "[.4, .6)", "[.6, .8)", "[.8, 1)", "all")
# Scripts without spaces between words, whose signs are words here.
_DENSE = ("CJK", "HIRAGANA", "KATAKANA", "THAI")


@cache
def _kind(sign: str) -> str:
    """Give what a sign is: of a word, a word of its own, or neither."""
    if unicodedata.category(sign)[0] not in "LMN":  # marks are vowels in many scripts
        return ""
    return "own" if unicodedata.name(sign, "").split()[0:1] in [[s] for s in _DENSE] else "in"


def spans(text: str, dense: bool = False) -> list[tuple[int, int]]:
    """Give where the words of a text begin and end; with `dense`, each Han or Thai sign is one."""
    found: list[tuple[int, int]] = []
    open_word = False
    for i, sign in enumerate(text):
        kind = _kind(sign)
        alone = dense and kind == "own"
        if kind and open_word and not alone:
            found[-1] = (found[-1][0], i + 1)
        elif kind:
            found.append((i, i + 1))
        open_word = bool(kind) and not alone
    return found


def words(text: str, dense: bool = False) -> list[str]:
    """Give the words of a text, without case."""
    text = unicodedata.normalize("NFC", text.casefold())
    return [text[a:b] for a, b in spans(text, dense)]


@lru_cache(maxsize=2**16)
def _trigrams(text: str) -> frozenset[str]:
    return frozenset(word[i : i + 3] for word in words(text) for i in range(max(1, len(word) - 2)))


def overlap(first: str, second: str) -> float:
    """Give the share of three-sign runs that two texts have in common.

    |A and B| / min(|A|, |B|), with the sets of runs inside words; a shorter word is a run itself.
    """
    a, b = _trigrams(first), _trigrams(second)
    return len(a & b) / min(len(a), len(b)) if a and b else 0.0


def bin_of(value: float) -> str:
    """Name the bin of an overlap: those of the motivating figure."""
    if value <= 0:
        return BINS[0]
    return BINS[-1] if value >= 1 else BINS[1 + int(5 * value + 1e-9)]


@dataclass(frozen=True)
class OverlapBaseline:
    """Answers one class at or above a threshold of overlap, another one below."""

    threshold: float
    above: int
    below: int

    @classmethod
    def fit(cls, rows: Sequence[Row]) -> OverlapBaseline:
        """Take the threshold and the classes that are right most often on these rows.

        Among equals the threshold in the middle; it lies between two overlaps that occur.
        """
        ranked = sorted((overlap(row.first, row.second), row.target) for row in rows)
        above, below = Counter(target for _, target in ranked), Counter[int]()
        found: list[tuple[int, float, int, int]] = []
        last = -1.0
        for value, target in ranked:
            if value > last:
                high, low = above.most_common(1)[0], (below or above).most_common(1)[0]
                right = high[1] + (low[1] if below else 0)
                found.append((right, (value + max(last, 0.0)) / 2, high[0], low[0]))
            last = value
            above[target] -= 1
            below[target] += 1
        most = max(right for right, *_ in found)
        best = [rest for right, *rest in found if right == most]
        threshold, high_class, low_class = best[len(best) // 2]
        return cls(threshold, int(high_class), int(low_class))

    def __call__(self, row: Row) -> int:
        return self.above if overlap(row.first, row.second) >= self.threshold else self.below


def answer_distance(
    question: Sequence[Hashable], context: Sequence[Hashable], span: tuple[int, int] | None
) -> float:
    """Give how far a question's tokens stand from the answer: d of the specification.

    For each kind of token of the question that occurs in the context, the least distance to the
    centre of the span, in tokens; the mean over kinds. ABSENT if none occurs or there is no span.
    `span` is the first token and the last one.
    """
    if span is None:
        return ABSENT
    centre = (span[0] + span[1]) / 2
    places: dict[Hashable, float] = {}
    wanted = set(question)
    for i, token in enumerate(context):
        if token in wanted:
            places[token] = min(abs(i - centre), places.get(token, ABSENT))
    return statistics.mean(places.values()) if places else ABSENT


@dataclass(frozen=True)
class ProximityBaseline:
    """Answers with the words of the context that stand nearest to those of the question."""

    length: int  # words of an answer

    @classmethod
    def fit(cls, rows: Sequence[Row]) -> ProximityBaseline:
        """Take the median length of an answer."""
        lengths = [len(spans(row.target.text, dense=True)) for row in rows]
        return cls(max(1, round(statistics.median(lengths))))

    def __call__(self, row: Row) -> str:
        """Give the span of least `answer_distance` without a word of the question, if any."""
        where, asked = spans(row.first, dense=True), set(words(row.second, dense=True))
        tokens = [row.first[a:b].casefold() for a, b in where]
        if not tokens:
            return ""
        length = min(self.length, len(tokens))
        shared = [i for i, token in enumerate(tokens) if token in asked]
        kinds: dict[str, list[int]] = {}
        for i in shared:
            kinds.setdefault(tokens[i], []).append(i)
        starts = [
            s
            for s in range(len(tokens) - length + 1)
            if not any(s <= i < s + length for i in shared)
        ] or range(len(tokens) - length + 1)

        def distance(start: int) -> float:
            centre = start + (length - 1) / 2
            return sum(min(abs(i - centre) for i in places) for places in kinds.values())

        start = min(starts, key=distance)
        return row.first[where[start][0] : where[start + length - 1][1]]


def shuffle_words(text: str, seed: int | str) -> str:
    """Give a text with its words, parted by spaces, in a random order of the seed."""
    parts = text.split()
    random.Random(f"{seed} {text}").shuffle(parts)
    return " ".join(parts)


def script(texts: Sequence[str]) -> str:
    """Name the script that most letters of the texts are of, as Unicode does: LATIN, GREEK."""
    names = Counter(
        unicodedata.name(sign, "none").split()[0]
        for text in texts
        for sign in text
        if unicodedata.category(sign)[0] == "L"
    )
    return names.most_common(1)[0][0] if names else "none"


def shuffled(row: Row, seed: int) -> Row:
    """Shuffle both segments, or of a question and its context the question only."""
    second = shuffle_words(row.second, seed)
    if isinstance(row.target, Answer):
        return row._replace(second=second)
    return row._replace(first=shuffle_words(row.first, seed), second=second)
