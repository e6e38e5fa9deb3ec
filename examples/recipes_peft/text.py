"""Texts to learn, by name or file, as rows: with answers, or packed into windows of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from recipes_peft import assets, boolq, data, tiny
from recipes_peft.data import Encoded, Example, encode
from recipes_peft.errors import UserError

__all__ = ["read", "rows", "samples", "windows"]


def read(
    name: str, test: str | None, held_out: int, seed: int, packed: bool, instruction: str = ""
) -> tuple[list[Example], list[Example]]:
    """Give what to train on and what is held out, by name: `boolq`, `tiny`, or a file's.

    Of BoolQ it is the paragraphs if `packed`, else the questions. At most `held_out` examples are
    held out: the first of `test` if that is given, else a part of the data.

    Raises:
        UserError: there is no such file, it cannot be read, or it has too few examples.
    """
    found = _read(name, packed, instruction)
    if test is None:
        return data.split(found, held_out, seed)
    return found, _read(test, packed, instruction)[:held_out]


def _read(name: str, packed: bool, instruction: str) -> list[Example]:
    if name == "tiny":
        return tiny.examples()
    if name != "boolq":
        return data.read(Path(name), instruction)
    file = assets.fetch(name)
    return boolq.passages(file) if packed else boolq.questions(file, instruction)


def rows(
    examples: Iterable[Example], tokenizer: Any, length: int, packed: bool
) -> Iterator[Encoded]:
    """Give the rows of examples as they are taken: windows if `packed`, else one for each."""
    if packed:
        return windows(examples, tokenizer, length)
    return (encode(example, tokenizer, length) for example in examples)


def windows(examples: Iterable[Example], tokenizer: Any, length: int) -> Iterator[Encoded]:
    """Cut texts, with a blank line after each, into windows of `length` tokens side by side.

    A window begins with what the tokenizer begins a text with; if that is nothing, its first token
    is not predicted. What does not fill a window at the end is dropped. Texts are read as windows
    are taken, so a few windows of a large collection cost little.
    """
    first = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
    inside = length - len(first)
    ids: list[int] = []
    for example in examples:
        between = "" if example.raw else "\n"
        text = f"{example.prompt}{between}{example.answer}\n\n"
        ids += tokenizer(text, add_special_tokens=False).input_ids
        while len(ids) >= inside:
            window, ids = first + ids[:inside], ids[inside:]
            yield Encoded(window[:1], window[1:])


def samples(rows: Iterable[Encoded], count: int, length: int) -> torch.Tensor:
    """Cut rows, laid end to end, into samples; give their token ids (count, length).

    Raises:
        UserError: the rows have too few tokens.
    """
    ids: list[int] = []
    for row in rows:
        ids += row.prompt + row.answer
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise UserError(
        f"the data to train on has {len(ids)} tokens, but {count} samples of {length} need"
        f" {count * length}; give more data, or fewer or shorter samples"
    )
