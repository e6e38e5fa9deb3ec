"""Languages in balance: the share of each, and texts in that proportion, of files or streams."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from recipes_peft.errors import UserError, explained


def shares(sizes: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Give the share of each language: p_l is proportional to n_l ** (1 / temperature).

    1 leaves the languages as large as they are, infinity makes them equal.
    """
    powers = {name: size ** (1 / temperature) for name, size in sizes.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def quotas(
    sizes: Mapping[str, float], total: float, temperature: float, max_epochs: float
) -> dict[str, float]:
    """Give how much to take of each language, at most `max_epochs` times what it has.

    What the limit takes from one language goes to those below theirs, in proportion.
    """
    found: dict[str, float] = {}
    open_sizes, left = dict(sizes), min(total, max_epochs * sum(sizes.values()))
    while open_sizes:
        part = shares(open_sizes, temperature)
        full = [n for n in open_sizes if part[n] * left >= max_epochs * open_sizes[n]]
        if not full:
            return found | {name: share * left for name, share in part.items()}
        for name in full:
            found[name] = max_epochs * open_sizes.pop(name)
            left -= found[name]
    return found


def mixture(
    texts: Mapping[str, Iterable[str]], wanted: Mapping[str, float]
) -> Iterator[tuple[str, str]]:
    """Give (language, text) until each language has the characters wanted of it.

    The next text is of the language that is furthest behind. Texts are read as they are taken, and
    from the beginning once they end.
    """
    sources = {name: _again(texts[name]) for name in wanted if wanted[name] > 0}
    taken = dict.fromkeys(sources, 0)
    while behind := [n for n in sources if taken[n] < wanted[n]]:
        name = min(behind, key=lambda n: taken[n] / wanted[n])
        text = next(sources[name])
        taken[name] += len(text)
        yield name, text


def monolingual(where: str, subset: str, languages: Sequence[str], seed: int) -> dict[str, Any]:
    """Give texts by language: of a folder with a file `LANGUAGE.txt` each, or of a data set.

    A data set is named as `datasets` loads it (a hub id, or a folder of its files) and streamed;
    `subset` is the folder in it that a language has, with `{language}` in it. Its texts stand in
    the column `text` or `content`.

    Raises:
        UserError: there are no such files, or no such data set.
    """
    folder = Path(where).expanduser()
    files = {name: folder / f"{name}.txt" for name in languages}
    if all(file.is_file() for file in files.values()):
        found = {n: file.read_text(encoding="utf-8").split("\n") for n, file in files.items()}
        for lines in found.values():
            random.Random(seed).shuffle(lines)
        return {name: [line for line in lines if line.strip()] for name, lines in found.items()}
    with explained(ImportError, before="a data set needs the package datasets: "):
        from datasets import load_dataset
    streams = {}
    for name in languages:
        with explained(OSError, ValueError, before=f"cannot open the data set {where!r}: "):
            stream = load_dataset(
                where, data_dir=subset.format(language=name), split="train", streaming=True
            )
        streams[name] = _Column(stream.shuffle(seed=seed, buffer_size=1000))
    return streams


def folded(line: str) -> str:
    """Give a line in small letters, with single spaces."""
    return " ".join(line.lower().split())


def without(texts: Iterable[str], lines: Set[str], met: set[str]) -> list[str] | Iterable[str]:
    """Leave lines, given folded, out of texts, and add those that were there to `met`.

    A list is read at once and gives a list; a stream is filtered as it is read.
    """
    kept = _Without(texts, lines, met)
    return list(kept) if isinstance(texts, list) else kept


@dataclass(frozen=True)
class _Without:
    """Texts without some of their lines, from the beginning every time they are asked for."""

    texts: Iterable[str]
    lines: Set[str]
    met: set[str]

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            found = [(line, folded(line)) for line in text.split("\n")]
            self.met.update(same for _, same in found if same in self.lines)
            if kept := [line for line, same in found if same not in self.lines]:
                yield "\n".join(kept)


@dataclass(frozen=True)
class _Column:
    """The texts of a stream of rows, from its beginning every time they are asked for."""

    rows: Any

    def __iter__(self) -> Iterator[str]:
        return (row.get("text") or row.get("content") or "" for row in self.rows)


def _again(texts: Iterable[str]) -> Iterator[str]:
    for _ in cycle([None]):
        some = False
        for text in texts:
            some = some or bool(text)
            yield text
        if not some:
            raise UserError("a language of the first stage has no text; give text for all of them")
