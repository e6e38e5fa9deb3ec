"""From the settings to what is trained on, chosen by and tested on, and the training conditions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import countries
import readers
from parallel_pairs import Answer, Items, ParallelPairs, Row, hard_others, matching, random_others
from shortcuts import overlap, shuffled

from recipes_peft.errors import UserError

__all__ = ["CONDITIONS", "TASKS", "Data", "prepare", "training_rows"]

TASKS = ("countries", "own", *readers.SOURCES)
CONDITIONS = ("plain", "shuffled", "mixed")


@dataclass(frozen=True)
class Data:
    """Rows to train on and, of the same language, to choose by; the grid; harder rows by language.

    `hard` has each language's negatives of most overlap, where negatives are made here.
    """

    language: str  # that is trained on
    train: ParallelPairs
    held_out: ParallelPairs
    test: ParallelPairs
    hard: Mapping[str, ParallelPairs] = field(default_factory=dict)

    @property
    def answers(self) -> bool:
        """Say whether answers are to be found, and not classes."""
        return any(isinstance(target, Answer) for target in self.train.targets[self.language])

    @property
    def classes(self) -> int:
        """Give how many classes there are."""
        sides = [*self.train.targets.values(), *self.test.targets.values()]
        return 1 + max(target for side in sides for target in side if target is not None)


def prepare(given: Any) -> Data:
    """Read the data and part it by groups: countries, premises, paragraphs, connected sentences.

    Raises:
        UserError: the data cannot be read, or there is too little of it.
    """
    found = _read(given)
    known = found.texts if isinstance(found, Items) else found.first
    languages = given.languages or list(known)
    language = given.train_language or languages[0]
    if len(languages) < 2:
        raise UserError(f"the grid has the language {languages[0]} only; give two or more")
    if isinstance(found, Items):
        found = Items(found.keys, {name: known[name] for name in _checked(languages, known)})
        return _of_items(given, found, language)
    grid = found.only(languages)
    if language not in languages and not given.train_data:
        raise _no_training(language)
    if given.train_data:
        train = _training(given, language, languages)
        chosen, kept = _parted(train.groups, given.held_out)
        return Data(
            language,
            _at_most(train.where(kept.__contains__), given.max_train),
            train.where(chosen.__contains__),
            _at_most(grid, given.max_test),
        )
    train_groups, test_groups = _parted(grid.groups, given.train_groups)
    chosen, kept = _parted(sorted(train_groups), given.held_out)
    return Data(
        language,
        _at_most(grid.where(kept.__contains__), given.max_train),
        grid.where(chosen.__contains__),
        _at_most(grid.where(test_groups.__contains__), given.max_test),
    )


def _read(given: Any) -> ParallelPairs | Items:
    if given.task == "own":
        return readers.toy() if given.data == "tiny" else readers.own(Path(given.data))
    if not given.languages:
        raise UserError(f"the task {given.task} needs its languages; give --languages en de ...")
    if given.task == "countries":
        return countries.read(given.data, given.languages)
    records = {name: readers.read(given.task, given.data, name) for name in given.languages}
    return readers.aligned(records, readers.SOURCES[given.task].alike)


def _checked(languages: Sequence[str], known: Mapping[str, Any]) -> Sequence[str]:
    if missing := [name for name in languages if name not in known]:
        raise UserError(f"there is no text in {missing[0]!r}, but in {', '.join(known)}")
    return languages


def _training(given: Any, language: str, languages: Sequence[str]) -> ParallelPairs:
    """Read the training set, in all languages if its name has a place for them."""
    names = [language]
    if "{language}" in given.train_data:
        names += [name for name in languages if name != language]
    records = {name: readers.read(given.task, given.train_data, name, True) for name in names}
    return readers.aligned(records, readers.SOURCES[given.task].alike)


def _of_items(given: Any, items: Items, language: str) -> Data:
    if language not in items.texts:
        raise _no_training(language)
    train_keys, test_keys = _parted(items.keys, given.train_groups)
    chosen, kept = _parted(sorted(train_keys), given.held_out)
    test_items = items.where(test_keys.__contains__)
    parts = []
    for number, keys in enumerate((kept, chosen, test_keys)):
        part = items.where(keys.__contains__)
        draw = random.Random(number)
        parts.append(matching(part, random_others(len(part.keys), draw.randrange)))
    hard = {}
    for name in items.texts:
        alone = Items(test_items.keys, {name: test_items.texts[name]})
        hard[name] = matching(alone, hard_others(alone, name, overlap))
    train, held_out, test = parts
    return Data(
        language,
        _at_most(train, given.max_train),
        held_out,
        _at_most(test, given.max_test),
        hard,
    )


def _no_training(language: str) -> UserError:
    return UserError(
        f"there is no text to train on in {language!r}; choose --train-language among --languages"
    )


def _rank(group: str) -> str:
    return hashlib.sha256(group.encode()).hexdigest()


def _parted(groups: Sequence[str], count: int) -> tuple[set[str], set[str]]:
    """Part groups by a checksum, always alike: `count` of them, and the rest."""
    ranked = sorted(set(groups), key=_rank)
    if not 0 < count <= len(ranked) - 2:
        raise UserError(
            f"{count} of {len(ranked)} groups cannot be set apart and at least 2 be left; change"
            " --train-groups or --held-out, or give more data"
        )
    return set(ranked[:count]), set(ranked[count:])


def _at_most(pairs: ParallelPairs, most: int | None) -> ParallelPairs:
    """Give whole groups, by a checksum, until there are `most` rows; no more rows than that."""
    if most is None or len(pairs) <= most:
        return pairs
    sizes: dict[str, int] = {}
    for group in pairs.groups:
        sizes[group] = sizes.get(group, 0) + 1
    kept: set[str] = set()
    for group in sorted(sizes, key=_rank):
        if sum(sizes[name] for name in kept) >= most:
            break
        kept.add(group)
    return pairs.where(kept.__contains__, most)


def training_rows(data: Data, condition: str, seed: int) -> list[Row]:
    """Give the rows to train on under a condition: as many under each.

    `plain`: both segments in the training language. `shuffled`: their words in a random order, of
    answers the question's only. `mixed`: each row once, in two different languages that are drawn.

    Raises:
        UserError: there is nothing to train on, or for `mixed` only one language.
    """
    rows = data.train.cell(data.language, data.language)
    if not rows:
        raise UserError(f"there is nothing to train on in {data.language}; give more data")
    if condition == "plain":
        return rows
    if condition == "shuffled":
        return [shuffled(row, seed) for row in rows]
    draw, sides = random.Random(seed), data.train.targets
    found = []
    for i, _, _, _ in rows:
        known = [name for name in data.train.languages if sides[name][i] is not None]
        if len(data.train.languages) < 2:
            raise UserError(
                "mixed-language training needs parallel training text, and there is"
                f" {data.language} only; leave mixed out of --arms and --once, leave out"
                " --train-data, or give one with {language} in its name"
            )
        pairs = [
            (p, h)
            for p in known
            for h in known
            if p != h and (isinstance(sides[p][i], Answer) or sides[p][i] == sides[h][i])
        ]
        p, h = draw.choice(pairs or [(data.language, data.language)])
        found.append(Row(i, data.train.first[p][i], data.train.second[h][i], sides[p][i]))
    return found
