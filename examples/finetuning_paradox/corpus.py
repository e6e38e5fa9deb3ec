"""What is trained on and what abilities are measured on, without anything on both sides."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import overlap
import pronouns
from formality import Contrast, contrasting
from formality import read as read_formality
from pronouns import Pronoun

from recipes_peft import assets, boolq, data, parallel
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair


@dataclass(frozen=True)
class Corpus:
    """All texts. Those of optional probes are empty where no data was named."""

    train: list[Pair]
    more: list[Pair]  # for the control, not trained on otherwise
    held_out: list[Pair]
    in_order: list[list[Pair]]  # what is held out, long pairs too: stretches without a gap
    examples: list[Pair]  # to show in a prompt
    domain: list[Pair]  # of the same domain as the examples
    running: list[str]
    held_out_text: dict[str, list[str]]  # of either side
    register_examples: list[Contrast]
    registers: list[Contrast]
    pronouns: list[Pronoun]
    dictionary: dict[str, list[str]]
    dropped: tuple[int, int]  # pairs and passages that were to train on, but are tested on


def read_corpus(given: Any) -> Corpus:
    """Read what the settings name.

    Documents of the pairs are parted in three: held out, trained on, and read as running text in
    the target language; the first and the last come from files of their own where these are named.
    Running text of a file is parted by article or paragraph.

    Raises:
        UserError: something cannot be read, or there is too little of it.
    """
    pairs = parallel.read(given.data, given.source, given.target)
    held_out, in_order, rest = _held_out(pairs, given)
    source_text, held_source = _running(given.text, given.source, given)
    target_text, held_target = [], _passages(in_order, given.text_characters)[: given.items]
    if given.target_text:
        target_text, held_target = _running(given.target_text, given.target, given)
    examples, domain = _domain(given)
    register_examples, registers = _registers(given)
    items = _pronouns(given)
    sides = (held_out, *in_order, domain, [item.pair for item in items])
    tested = overlap.lines(
        [text for some in sides for pair in some for text in (pair.source, pair.target)]
        + [text for row in registers for text in (row.source, row.formal, row.informal)]
        + held_source
        + held_target
    )
    new = [pair for pair in rest if not overlap.pair_among(pair, tested)]
    usable = _short(new, given.longest)
    if given.target_text:
        random.Random(1).shuffle(usable)
        train, more = usable[: given.pairs], usable[given.pairs :]
    else:
        train, more = _parted(usable, given)
        chosen = {pair.document for pair in more}
        stretches = _stretches(pairs, chosen, without=tested)
        target_text = _passages(stretches, given.text_characters)
    kept = [
        [text[: given.text_characters] for text in side if not overlap.text_among(text, tested)]
        for side in (source_text, target_text)
    ]
    if not train or not all(kept):
        raise UserError(
            f"{given.data} and the running text leave {len(train)} pairs and"
            f" {' and '.join(str(len(side)) for side in kept)} passages of either language to train"
            " on; give more, or raise --longest"
        )
    dropped = len(source_text) + len(target_text) - sum(map(len, kept))
    # both languages in turn, as many rows of one as of the other
    both = [row for rows in zip(*kept, strict=False) for row in rows]
    cut = {
        "source": [text[: given.text_characters] for text in held_source],
        "target": [text[: given.text_characters] for text in held_target],
    }
    return Corpus(
        train,
        more,
        held_out,
        in_order,
        examples,
        domain,
        both,
        cut,
        register_examples,
        registers,
        items,
        _dictionary(given.dictionary),
        (len(rest) - len(new), dropped),
    )


def _short(pairs: Iterable[Pair], longest: int) -> list[Pair]:
    return [p for p in pairs if max(len(p.source), len(p.target)) <= longest]


def _held_out(pairs: list[Pair], given: Any) -> tuple[list[Pair], list[list[Pair]], list[Pair]]:
    """Give the pairs held out, the documents that they are in, and all pairs of other documents."""
    if given.test_data:
        tests = parallel.read(given.test_data, given.source, given.target)
        short = _short(tests, given.longest)
        random.Random(0).shuffle(short)
        if not short:
            raise UserError(
                f"{given.test_data} has no pairs of at most {given.longest} characters; raise"
                " --longest"
            )
        return short[: given.items], _stretches(tests, {p.document for p in tests}), pairs
    train, held = parallel.split_by_document(_short(pairs, given.longest), given.items, 0)
    stretches = _stretches(pairs, {pair.document for pair in held})
    trained = {pair.document for pair in train}
    return held, stretches, [pair for pair in pairs if pair.document in trained]


def _parted(usable: list[Pair], given: Any) -> tuple[list[Pair], list[Pair]]:
    """Give pairs to train on, and pairs of documents that are not trained on."""
    wanted = len(usable) - given.pairs
    if wanted < 1:
        raise UserError(
            f"{given.data} leaves {len(usable)} pairs of at most {given.longest} characters to"
            f" train on, and other documents are the text of the target language; lower --pairs"
            f" below {len(usable)}, raise --longest, or name --target-text"
        )
    train, others = parallel.split_by_document(usable, wanted, 1)
    return train[: given.pairs], others


def _stretches(
    pairs: Sequence[Pair], documents: set[str], without: set[str] | None = None
) -> list[list[Pair]]:
    """Give what stands together in the file and in a document, parted at lines of `without`."""

    def key(pair: Pair) -> tuple[str, bool]:
        return pair.document, overlap.pair_among(pair, without or ())

    groups = groupby(pairs, key)
    return [list(some) for (name, among), some in groups if name in documents and not among]


def _passages(stretches: Iterable[Iterable[Pair]], characters: int) -> list[str]:
    """Join what follows on each other, in the target language, to passages of some length."""
    found = []
    for stretch in stretches:
        passage = ""
        for pair in stretch:
            passage = f"{passage} {pair.target}".strip()
            if len(passage) >= characters:
                found.append(passage[:characters])
                passage = ""
        if passage:
            found.append(passage)
    return found


def _running(where: str, language: str, given: Any) -> tuple[list[str], list[str]]:
    """Give running text of a language to train on, and what is held out of it."""
    if where == "tiny":
        pairs = parallel.tiny_pairs(language, language, seed=1)
        passages = _passages(_stretches(pairs, {p.document for p in pairs}), given.text_characters)
        return passages[given.items :], passages[: given.items]
    is_boolq = where == "boolq"
    found = boolq.passages(assets.fetch(where)) if is_boolq else data.read(Path(where))
    parts = data.split(found, given.items, 0)
    train, held = ([e.prompt + e.answer for e in part] for part in parts)
    return [text for text in train if len(text) > 1], [text for text in held if len(text) > 1]


def _domain(given: Any) -> tuple[list[Pair], list[Pair]]:
    """Give pairs to show in a prompt, and others of the domain."""
    if given.domain == "tiny":
        pairs = parallel.tiny_pairs(given.source, given.target, seed=2)
    else:
        pairs = parallel.read(given.domain, given.source, given.target)
    pairs = _short(pairs, given.longest)
    if len(pairs) <= given.shots:
        raise UserError(
            f"{given.domain} has no pairs beside the {given.shots} examples of a prompt; lower"
            " --shots or raise --longest"
        )
    return pairs[: given.shots], pairs[given.shots : given.shots + given.items]


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


def _pronouns(given: Any) -> list[Pronoun]:
    if not given.pronouns:
        return []
    return pronouns.read(Path(given.pronouns), given.source, given.target, given.items)


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
