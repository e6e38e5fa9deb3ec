"""Compare what a model wrote with what was wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["exact_match", "same_number"]

_QUOTES = " \t\n\"'`"


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Give the share of answers that are right but for case, quotes and a full stop."""

    def bare(text: str) -> str:
        # One full stop only: " ..." marks an answer that was cut off.
        return " ".join(text.casefold().strip(_QUOTES).removesuffix(".").strip(_QUOTES).split())

    same = [bare(a) == bare(b) for a, b in zip(written, wanted, strict=True)]
    return sum(same) / len(same)


def same_number(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Give the share of answers whose last number is that of what was wanted: 1,200.0 is 1200."""

    def last(text: str) -> float | None:
        found = re.findall(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?", text)
        return float(found[-1].replace(",", "")) if found else None

    same = [
        (number := last(a)) is not None and number == last(b)
        for a, b in zip(written, wanted, strict=True)
    ]
    return sum(same) / len(same)
