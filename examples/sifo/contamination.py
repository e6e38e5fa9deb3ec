"""Contamination: texts to train on that stand in samples which are tested."""

from __future__ import annotations

from collections.abc import Iterable

from samples import SifoSample
from text_chains import SENTENCE_END

__all__ = ["Tested"]

_LEAST = 5  # words of a sentence or a context that tells a text; shorter ones stand anywhere


class Tested:
    """What samples say that are tested: without case, spaces collapsed."""

    def __init__(self, samples: Iterable[SifoSample]) -> None:
        rows = [[_plain(t) for t in (s.context, *s.steps, *s.golds)] for s in samples]
        self.everything = "\n".join(dict.fromkeys(text for row in rows for text in row))
        self.contexts = {row[0] for row in rows if len(row[0].split()) >= _LEAST}

    def has(self, text: str) -> bool:
        """Say whether a text or a sentence of it is in the samples, or one of their contexts in it.

        Of sentences and contexts those of five words or more count.
        """
        whole = _plain(text)
        long = (s for s in map(_plain, SENTENCE_END.split(text)) if len(s.split()) >= _LEAST)
        return any(part in self.everything for part in (whole, *long)) or any(
            context in whole for context in self.contexts
        )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
