"""Instances of two segments that exist, row by row, in several languages.

The two segments of an instance may then be taken from two different languages: meaning and label
stay, shortcuts that work inside every language break.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from recipes_peft.errors import UserError

__all__ = [
    "Answer",
    "Items",
    "ParallelPairs",
    "Row",
    "connected",
    "hard_others",
    "matching",
    "random_others",
]


class Answer(NamedTuple):
    """An answer in a context: its text, and the character at which it begins."""

    text: str
    start: int


class Row(NamedTuple):
    """An instance of a cell: its number, segments a and b, and what is to be found."""

    index: int
    first: str
    second: str
    target: Any


@dataclass(frozen=True)
class ParallelPairs:
    """Segments a and b by language, aligned by row; what is to be found; what rows belong together.

    A target is a class, or an `Answer` in the first segment; None where a language lacks the row.
    A row counts in a cell if both languages have it and, for classes, give it the same one.

    Raises:
        UserError: the sides are not of the same languages, or not of the same length.
    """

    first: Mapping[str, Sequence[str]]
    second: Mapping[str, Sequence[str]]
    targets: Mapping[str, Sequence[Any]]
    groups: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("second", "targets"):
            if list(getattr(self, name)) != list(self.first):
                raise UserError(
                    f"{name} has the languages {', '.join(getattr(self, name))}, the first segment"
                    f" {', '.join(self.first)}; give both in the same ones"
                )
        for language in self.first:
            for side in (self.first, self.second, self.targets):
                if len(side[language]) != len(self.groups):
                    raise UserError(
                        f"{language} has {len(side[language])} rows where others have"
                        f" {len(self.groups)}; parallel text has as many in every language, in the"
                        " same order"
                    )

    @property
    def languages(self) -> list[str]:
        return list(self.first)

    def __len__(self) -> int:
        return len(self.groups)

    def cell(self, first: str, second: str) -> list[Row]:
        """Give the instances with segment a in one language and b in another, or in the same."""
        a, b = self.targets[first], self.targets[second]
        return [
            Row(i, self.first[first][i], self.second[second][i], a[i])
            for i in range(len(self))
            if a[i] is not None and b[i] is not None and (isinstance(a[i], Answer) or a[i] == b[i])
        ]

    def conflicts(self, first: str, second: str) -> int:
        """Count the rows that both languages have, with different classes: no cell has them."""
        both = zip(self.targets[first], self.targets[second], strict=True)
        return sum(
            a is not None and b is not None and not isinstance(a, Answer) and a != b
            for a, b in both
        )

    def where(self, keep: Callable[[str], bool], most: int | None = None) -> ParallelPairs:
        """Give the rows of the groups that `keep` wants, the first `most` of them."""
        rows = [i for i, group in enumerate(self.groups) if keep(group)][:most]
        sides = (
            {language: [side[language][i] for i in rows] for language in side}
            for side in (self.first, self.second, self.targets)
        )
        return ParallelPairs(*sides, [self.groups[i] for i in rows])

    def only(self, languages: Sequence[str]) -> ParallelPairs:
        """Give the rows in these languages, in this order.

        Raises:
            UserError: a language is not there.
        """
        if missing := [name for name in languages if name not in self.first]:
            raise UserError(
                f"there is no text in {missing[0]!r}; there is {', '.join(self.first)}:"
                " choose with --languages"
            )
        sides = (
            {language: side[language] for language in languages}
            for side in (self.first, self.second, self.targets)
        )
        return ParallelPairs(*sides, self.groups)


def connected(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Give the group of each row: rows that share a text, on either side, are of one.

    So are rows that are connected by others. A group's name is the first text of it.
    """
    above: dict[str, str] = {}

    def top(text: str) -> str:
        while above.setdefault(text, text) != text:
            above[text] = text = above[above[text]]
        return text

    for a, b in zip(first, second, strict=True):
        a, b = top(a), top(b)
        above[b] = a
    names: dict[str, str] = {}
    return [names.setdefault(top(text), text) for text in first]


@dataclass(frozen=True)
class Items:
    """Things that have two texts in every language, such as a short and an official name.

    A language that lacks an item has None in its place.
    """

    keys: Sequence[str]
    texts: Mapping[str, Sequence[tuple[str, str] | None]]

    def where(self, keep: Callable[[str], bool]) -> Items:
        """Give the items whose key `keep` wants."""
        rows = [i for i, key in enumerate(self.keys) if keep(key)]
        texts = {name: [side[i] for i in rows] for name, side in self.texts.items()}
        return Items([self.keys[i] for i in rows], texts)


def matching(items: Items, others: Sequence[int | None]) -> ParallelPairs:
    """Ask whether two texts are of one item: for each item once its own (1), once another's (0).

    `others` names the other item; None leaves the item out. The same ones serve all languages.
    """
    first: dict[str, list[str]] = {}
    second: dict[str, list[str]] = {}
    targets: dict[str, list[int | None]] = {}
    chosen = [(i, other) for i, other in enumerate(others) if other is not None]
    for language, texts in items.texts.items():
        sides: tuple[list[str], list[str], list[int | None]] = ([], [], [])
        for i, other in chosen:
            mine, theirs = texts[i], texts[other]
            for label, text in ((1, mine), (0, theirs)):
                sides[0].append(mine[0] if mine else "")
                sides[1].append(text[1] if text else "")
                # both rows or neither, so that the classes are balanced in every cell
                sides[2].append(label if mine and theirs else None)
        first[language], second[language], targets[language] = sides
    return ParallelPairs(first, second, targets, [items.keys[i] for i, _ in chosen for _ in "ab"])


def random_others(count: int, draw: Callable[[int], int]) -> list[int | None]:
    """Name another item for each of `count`; `draw(n)` gives a number below n.

    Raises:
        UserError: there are fewer than two.
    """
    if count < 2:
        raise UserError(f"{count} items make no pairs that do not match; give at least 2 in a part")
    return [(i + 1 + draw(count - 1)) % count for i in range(count)]


def hard_others(
    items: Items, language: str, overlap: Callable[[str, str], float]
) -> list[int | None]:
    """Name for each item the other one whose second text overlaps most with its first."""
    texts = items.texts[language]
    found: list[int | None] = []
    for i, mine in enumerate(texts):
        if mine is None:
            found.append(None)
            continue
        rivals = [(overlap(mine[0], t[1]), -j) for j, t in enumerate(texts) if t and j != i]
        found.append(-max(rivals)[1] if rivals else None)
    return found
