"""How literal translations are: untranslated words, crossing links, literal errors in idioms."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

# with the quotes and dots of print
_SIGNS = string.punctuation + "\u00ab\u00bb\u201e\u201c\u201d\u2018\u2019\u2026"
Links = Collection[tuple[int, int]]  # (position in the source, position in the translation)


def unaligned_share(links: Links, source_words: int) -> float:
    """Give the share of source words that no link touches (USW); higher is less literal.

    Source:
        Raunak et al. 2023, as recalled by the specification of this recipe.
    """
    return 1 - len({i for i, _ in links}) / source_words


def crossing_rate(links: Links) -> float:
    """Give the share of pairs of links that cross (non-monotonicity); 0 with fewer than two."""
    pairs = list(combinations(sorted(links), 2))
    crossed = sum((i - k) * (j - m) < 0 for (i, j), (k, m) in pairs)
    return crossed / len(pairs) if pairs else 0.0


def dictionary_links(
    source: Sequence[str], target: Sequence[str], dictionary: Mapping[str, Collection[str]]
) -> set[tuple[int, int]]:
    """Align words by a bilingual dictionary: each source word to its first free translation.

    Words are compared in lower case and without punctuation; a word that both sentences share
    (a name, a number) is its own translation.
    """
    plain = [_word(word) for word in target]
    links: set[tuple[int, int]] = set()
    taken: set[int] = set()
    for i, word in enumerate(map(_word, source)):
        known = {w.lower() for w in dictionary.get(word, ())} | {word}
        j = next((j for j, t in enumerate(plain) if t and t in known and j not in taken), None)
        if j is not None:
            links.add((i, j))
            taken.add(j)
    return links


def literal_error(
    idiom: Sequence[str],
    reference: str,
    hypothesis: str,
    dictionary: Mapping[str, Collection[str]],
) -> bool:
    """Tell whether an idiom was translated word by word (LitTER of one sentence).

    Each word of the idiom has the list of its dictionary translations; a list is dropped if the
    reference holds a word of it; a word of the others in the hypothesis is an error.

    Source:
        Baziotis, Mathur and Hasler 2023, by a description of the algorithm.
    """
    right = {_word(word) for word in reference.split()}
    written = {_word(word) for word in hypothesis.split()}
    lists = [{w.lower() for w in dictionary.get(_word(word), ())} for word in idiom]
    return any(blocked & written for blocked in lists if not blocked & right)


def contextual_hit(hypothesis: str, expected: str) -> bool:
    """Tell whether the last sentence of a translation has the word that the context asks for.

    Source:
        ctxpro (Wicks and Post 2023): lower case, ASCII punctuation deleted, whole words.
    """
    text = hypothesis.strip()
    for mark in "!?":
        text = text.replace(mark, ".")
    last = [s for s in text.split(".") if s.strip()][-1:] or [""]
    plain = last[0].lower().translate(str.maketrans("", "", string.punctuation))
    return f" {expected.lower()} " in f" {' '.join(plain.split())} "


def _word(word: str) -> str:
    return word.lower().strip(_SIGNS)
