"""A translator of the toy languages, right for most words: what a smoke run translates with."""

from __future__ import annotations

from recipes_peft.parallel import tiny_pairs

__all__ = ["to_xa", "to_xb"]


def to_xa(text: str) -> str:
    """Translate toy English to the toy language `xa`, but for one word in twenty."""
    return _translate(text, "xa")


def to_xb(text: str) -> str:
    """Translate toy English to the toy language `xb`, but for one word in twenty."""
    return _translate(text, "xb")


def _translate(text: str, language: str) -> str:
    known = {}
    for pair in tiny_pairs("en", language):
        known |= dict(zip(pair.source.split(), pair.target.split(), strict=True))
    known.pop(min(known))  # a word that it does not know stays as it is
    return " ".join(known.get(word, word) for word in text.split())
