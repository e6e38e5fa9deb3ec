"""Compare what a model wrote with what was wanted."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["exact_match"]

_QUOTES = " \t\n\"'`"


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Give the share of answers that are right but for case, quotes and a full stop."""

    def bare(text: str) -> str:
        # One full stop only: " ..." marks an answer that was cut off.
        return " ".join(text.casefold().strip(_QUOTES).removesuffix(".").strip(_QUOTES).split())

    same = [bare(a) == bare(b) for a, b in zip(written, wanted, strict=True)]
    return sum(same) / len(same)
