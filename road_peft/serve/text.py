"""From tokens to text, piece by piece: no character is split, and stop strings are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Give the text of tokens, special ones left out and spaces as they are."""
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


class Detokeniser:
    """Gives the text that tokens add, once it can no longer change.

    The text of a token depends on the one before (a leading space, the bytes of one character), so
    each is decoded together with the last that gave text, and what both add is the difference. Text
    that ends in an incomplete character waits for the rest of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._start = self._end = 0  # of the tokens that gave text last

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """Give what is new in the text of all tokens so far; everything if these are the last."""
        before = decode(self._tokenizer, ids[self._start : self._end])
        text = decode(self._tokenizer, ids[self._start :])
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not last):
            return ""
        self._start, self._end = self._end, len(ids)
        return text[len(before) :]


class StopStrings:
    """Ends a text before one of some strings, also if that comes in several pieces.

    The string that is complete first counts, so it does not matter where the pieces part.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""  # may yet turn out to begin a stop string

    def feed(self, piece: str, last: bool = False) -> tuple[str, bool]:
        """Give the text that may be shown now, and whether it ended at a stop string."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - kept
        self._held = text[shown:]
        return text[:shown], False


def _overlap(text: str, stop: str) -> int:
    """Give how many characters at the end of `text` may begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
