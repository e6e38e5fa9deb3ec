"""Text for both stages: parts by document, longer examples, packed blocks, and prompts."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mixture
import torch

from recipes_peft import data, translation
from recipes_peft.data import Encoded, Example
from recipes_peft.errors import UserError
from recipes_peft.parallel import LANGUAGES, Pair

T = TypeVar("T")

# ---- parts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Text to read (by language), pairs to learn from and pairs to test on, by direction."""

    texts: dict[str, list[str]]
    tuning: dict[str, list[Pair]]
    test: dict[str, list[Pair]]


def assign(sizes: Mapping[str, int], shares: Sequence[float], seed: int) -> list[set[str]]:
    """Give whole documents to parts: the first ones get at least their share, the last the rest.

    Every part gets a document. Large documents, of more than half a share, go to the last part:
    a part of one document would be of one subject.

    Raises:
        UserError: there are fewer documents than parts.
    """
    if len(sizes) <= len(shares):
        raise UserError(
            f"the data has {len(sizes)} documents; give at least {len(shares) + 1}, since no"
            " document is to stand in two parts"
        )
    total = sum(sizes.values())
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    names.sort(key=lambda name: sizes[name] > min(shares) * total / 2)  # stable: large ones last
    parts: list[set[str]] = []
    for share in shares:
        part = {names.pop(0)}
        while sum(sizes[n] for n in part) < share * total and len(names) > len(shares):
            part.add(names.pop(0))
        parts.append(part)
    return [*parts, set(names)]


def parts_of(
    pairs: Mapping[str, Sequence[Pair]],
    tuning: float,
    test: float | Mapping[str, Sequence[Pair]],
    seed: int,
    most: int,
) -> Parts:
    """Part aligned text by document, the same for all directions; a line stands in one part alone.

    `tuning` and `test` are shares of the lines, or `test` is pairs of another text; lines of more
    than `most` characters are left out. No line of the test stands, in its language, in the tuning
    pairs, and none of either in the texts.
    """
    short = _short(pairs, most)
    sizes = Counter(pair.document for found in short.values() for pair in found)
    if isinstance(test, Mapping):
        tested = _short(test, most)
        for_tuning, rest = (set(sizes), set()) if tuning >= 1 else assign(sizes, [tuning], seed)
    else:
        for_test, for_tuning, rest = assign(sizes, [test, tuning], seed)
        tested = {d: [p for p in ps if p.document in for_test] for d, ps in short.items()}

    seen = _lines_of(tested)
    tuned = {
        direction: [p for p in found if p.document in for_tuning and not seen & _sides(p)]
        for direction, found in short.items()
    }
    seen |= _lines_of(tuned)
    texts: dict[str, dict[str, None]] = {}
    for found in short.values():
        for pair in found:
            if pair.document in rest:
                for language, text in sorted(_sides(pair) - seen):
                    texts.setdefault(language, {})[text] = None
    return Parts({name: list(lines) for name, lines in texts.items()}, tuned, tested)


def _short(pairs: Mapping[str, Sequence[Pair]], most: int) -> dict[str, list[Pair]]:
    return {
        direction: [p for p in found if max(len(p.source), len(p.target)) <= most]
        for direction, found in pairs.items()
    }


def held_lines(parts: Parts) -> dict[str, set[str]]:
    """Give, by language and folded, the lines of the pairs: of the test, and to learn from."""
    found: dict[str, set[str]] = {}
    for language, text in _lines_of(parts.test) | _lines_of(parts.tuning):
        found.setdefault(language, set()).add(mixture.folded(text))
    return found


def without_canary(pairs: Sequence[Pair]) -> list[Pair]:
    """Leave out the line that test sets begin with so that training corpora can be searched."""
    return [
        p for p in pairs if "canary" not in f"{p.source} {p.target}".lower() or p is not pairs[0]
    ]


def _lines_of(directions: Mapping[str, Sequence[Pair]]) -> set[tuple[str, str]]:
    return {side for found in directions.values() for pair in found for side in _sides(pair)}


def join_lines(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """Make examples of up to `most` consecutive lines of a document, for tests on paragraphs.

    The first example of a document has one line, the next two, and so on, then one again. A model
    that saw single lines only leaves out the end of longer texts.
    """
    made: list[Pair] = []
    run: list[Pair] = []
    wanted = 1

    def close() -> None:
        if run:
            source, target = (
                " ".join(lines) for lines in zip(*((p.source, p.target) for p in run), strict=True)
            )
            one = run[0]
            made.append(
                Pair(source, target, one.source_language, one.target_language, one.document)
            )
            run.clear()

    for pair in pairs:
        if run and run[-1].document != pair.document:
            close()
            wanted = 1
        run.append(pair)
        if len(run) == wanted:
            close()
            wanted = wanted % most + 1
    close()
    return made


def _sides(pair: Pair) -> set[tuple[str, str]]:
    return {(pair.source_language, pair.source), (pair.target_language, pair.target)}


# ---- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Token ids of texts end to end, and for each the number of its text."""

    ids: list[int]
    documents: list[int]


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """Give the tokens of a text, with the beginning the tokenizer knows, if any, and an end."""
    ids = list(tokenizer(text).input_ids)
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def pack_blocks(documents: Iterable[Sequence[int]], length: int) -> Iterator[Block]:
    """Cut documents, laid end to end, into blocks of `length`; what fills none is dropped."""
    ids: list[int] = []
    owners: list[int] = []
    for number, document in enumerate(documents):
        ids += document
        owners += [number] * len(document)
        while len(ids) >= length:
            yield Block(ids[:length], owners[:length])
            ids, owners = ids[length:], owners[length:]


def block_batch(blocks: Sequence[Block], within: bool) -> dict[str, torch.Tensor]:
    """Make a batch whose loss is that of all next tokens: -sum_t log p(w_t | w_<t).

    With `within` a token sees its own document alone, whose positions count from 0; the first token
    of a document is then not predicted.

    Shapes:
        input_ids, labels, position_ids: (blocks, length). attention_mask: (blocks, 1, length,
        length), true where a token (row) sees another (column); absent without `within`.
    """
    ids = torch.tensor([block.ids for block in blocks])
    if not within:
        return {"input_ids": ids, "labels": ids.clone()}
    owners = torch.tensor([block.documents for block in blocks])
    same = owners[:, :, None] == owners[:, None, :]
    seen = same & torch.ones_like(same).tril()
    first = torch.ones_like(owners, dtype=torch.bool)
    first[:, 1:] = owners[:, 1:] != owners[:, :-1]
    return {
        "input_ids": ids,
        "attention_mask": seen[:, None],
        "position_ids": seen.sum(-1) - 1,
        "labels": ids.masked_fill(first, -100),
    }


def prompt(pair: Pair) -> str:
    """Give the text whose continuation is the translation. The paper's own is not known."""
    one, other = (
        LANGUAGES[code].name if code in LANGUAGES else code
        for code in (pair.source_language, pair.target_language)
    )
    return f"Translate this from {one} to {other}:\n{translation.prompt(pair)}"


def pair_row(pair: Pair, tokenizer: Any) -> Encoded:
    """Give the tokens of a prompt and, learnt alone, of its translation and the end after it."""
    example = Example(prompt(pair), f" {pair.target}", pair.document, raw=True)
    return data.encode(example, tokenizer, sys.maxsize)


def text_row(text: str, tokenizer: Any) -> Encoded:
    """Give the tokens of a text as they stand in a block: after a beginning, or another's end."""
    ids = document_ids(tokenizer, text)
    if ids[0] == tokenizer.bos_token_id:
        return Encoded(ids[:1], ids[1:])
    return Encoded([tokenizer.eos_token_id], ids)


def fitting(
    row: Callable[[T, Any], Encoded], items: Iterable[T], tokenizers: Sequence[Any], most: int
) -> list[T]:
    """Give the items whose row has at most `most` tokens by every tokenizer; none is ever cut.

    So models of different vocabularies learn and are measured on the same.
    """
    return [
        item
        for item in items
        if all(sum(map(len, row(item, tokenizer))) <= most for tokenizer in tokenizers)
    ]
