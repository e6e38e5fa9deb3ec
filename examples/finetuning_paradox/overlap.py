"""What is tested on is not trained on: lines that are the same but for case and spaces."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from recipes_peft.parallel import Pair

_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+|\n")


def plain(text: str) -> str:
    """Give a text in lower case, with single spaces."""
    return " ".join(text.lower().split())


def lines(texts: Iterable[str]) -> set[str]:
    """Give the lines of texts, to look others up among them."""
    return {plain(line) for text in texts for line in text.split("\n")} - {""}


def pair_among(pair: Pair, tested: Collection[str]) -> bool:
    """Tell whether a side of a pair is such a line."""
    return plain(pair.source) in tested or plain(pair.target) in tested


def text_among(text: str, tested: Collection[str]) -> bool:
    """Tell whether a text is such a line, or one of its lines or sentences is."""
    return any(plain(part) in tested for part in (text, *_SENTENCE_ENDS.split(text)))
