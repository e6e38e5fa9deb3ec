"""What is trained on and what abilities are measured on, without anything on both sides."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from formality import Contrast, contrasting
from formality import read as read_formality

from recipes_peft import assets, boolq, data, parallel
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair


@dataclass(frozen=True)
class Corpus:
    """All texts. Those of optional probes are empty where no data was named."""

    train: list[Pair]
    more: list[Pair]  # for the control, of documents that are not trained on otherwise
    held_out: list[Pair]
    in_order: list[Pair]  # all pairs of the documents held out, one after the other
    examples: list[Pair]  # to show in a prompt
    domain: list[Pair]  # of the same domain as the examples
    running: list[str]
    held_out_text: list[str]
    register_examples: list[Contrast]
    registers: list[Contrast]
    pronouns: list[Pair]
    expected: list[str]
    dictionary: dict[str, list[str]]


def read_corpus(given: Any) -> Corpus:
    """Read what the settings name.

    Documents of the pairs are parted in three: held out, trained on, and read as running text in
    the target language. Running text in the source language is parted by article.

    Raises:
        UserError: something cannot be read, or there is too little of it.
    """
    languages = (given.source, given.target)
    pairs = _short(parallel.read(given.data, *languages), given.longest)
    held_out, in_order, rest = _held_out(pairs, given.items)
    wanted = len(rest) - given.pairs
    if wanted < 1:
        raise UserError(
            f"{given.data} leaves {len(rest)} pairs of at most {given.longest} characters to train"
            f" on; lower --pairs below {len(rest)}, or raise --longest"
        )
    train, others = parallel.split_by_document(rest, wanted, 1)
    chosen = {pair.document for pair in others}
    target_text = _passages([p for p in rest if p.document in chosen], given.text_characters)
    source_text, held_text = _source_text(given)
    domain = _short(_read_domain(given), given.longest)
    examples, domain = domain[: given.shots], domain[given.shots : given.shots + given.items]
    if not domain:
        raise UserError(
            f"{given.domain} has no pairs beside the {given.shots} examples of a prompt; lower"
            " --shots or raise --longest"
        )
    # both languages in turn, as many rows of one as of the other
    count = min(len(source_text), len(target_text))
    both = [row for rows in zip(source_text, target_text, strict=False) for row in rows]
    return Corpus(
        train[: given.pairs],
        others,
        held_out,
        in_order,
        examples,
        domain,
        both[: 2 * count],
        held_text,
        *_registers(given),
        *_pronouns(given),
        _dictionary(given.dictionary),
    )


def _short(pairs: Iterable[Pair], longest: int) -> list[Pair]:
    return [p for p in pairs if max(len(p.source), len(p.target)) <= longest]


def _held_out(pairs: list[Pair], items: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    train, held = parallel.split_by_document(pairs, items, 0)
    documents = {pair.document for pair in held}
    trained = {pair.document for pair in train}
    in_order = [p for p in pairs if p.document in documents]
    return held, in_order, [p for p in pairs if p.document in trained]


def _passages(pairs: Sequence[Pair], characters: int) -> list[str]:
    """Join what follows on each other in a document, in the target language, to long passages."""
    found = []
    for _, document in groupby(pairs, key=lambda pair: pair.document):
        passage = ""
        for pair in document:
            passage = f"{passage} {pair.target}".strip()
            if len(passage) >= characters:
                found.append(passage[:characters])
                passage = ""
        if passage:
            found.append(passage)
    return found


def _source_text(given: Any) -> tuple[list[str], list[str]]:
    if given.text == "tiny":
        pairs = parallel.tiny_pairs(given.source, given.target, seed=1)
        sides = [replace(p, target=p.source) for p in pairs]
        passages = _passages(sides, given.text_characters)
        return passages[given.items :], passages[: given.items]
    if given.text == "boolq":
        found = boolq.passages(assets.fetch("boolq"))
    else:
        found = data.read(Path(given.text))
    train, held = data.split(found, given.items, 0)
    texts = ([f"{e.prompt}{e.answer}" for e in part] for part in (train, held))
    left, right = ([t[: given.text_characters] for t in part if len(t) > 1] for part in texts)
    return left, right


def _read_domain(given: Any) -> list[Pair]:
    if given.domain == "tiny":
        return parallel.tiny_pairs(given.source, given.target, seed=2)
    return parallel.read(given.domain, given.source, given.target)


def _registers(given: Any) -> tuple[list[Contrast], list[Contrast]]:
    """Give examples from the part to train on, and rows of the test with other sources."""
    if not given.formality:
        return [], []
    both = [
        read_formality(
            Path(given.formality) / part / f"{given.source}-{given.target}", given.target
        )
        for part in ("train", "test")
    ]
    train = contrasting(both[0])
    rows = contrasting(both[1], without=both[0])
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(rows)
    return train[: given.shots], rows[: given.items]


def _pronouns(given: Any) -> tuple[list[Pair], list[str]]:
    if not given.pronouns:
        return [], []
    pairs, expected = [], []
    path = Path(given.pronouns)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines[: given.items]:
            row = json.loads(line)
            source = " ".join([*row["context"], row["source"]])
            pairs.append(Pair(source, "", given.source, given.target, str(row["document"])))
            expected.append(row["expected"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}); give JSON lines with source,"
            " context (a list of sentences), expected and document"
        ) from error
    return pairs, expected


def _dictionary(path: str | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if path:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the dictionary {path} ({error})") from error
        for number, line in enumerate(lines, 1):
            word, tab, translated = line.partition("\t")
            if line.strip() and not tab:
                raise UserError(f"{path}, line {number} has no tab between word and translation")
            found.setdefault(word.lower(), []).extend(translated.split("\t"))
    return found
