"""Sentences with a pronoun that the sentences before decide, as ctxpro has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair


@dataclass(frozen=True)
class Pronoun:
    """A sentence after its context; the word expected, and perhaps translations to tell apart."""

    pair: Pair  # the source with the sentences before; the target of the last alone, or nothing
    expected: str
    others: tuple[str, ...] = ()  # the target with other pronouns
    before: tuple[str, ...] = ()  # translations of the context


def read(path: Path, source: str, target: str, items: int) -> list[Pronoun]:
    """Read the first items of a file of JSON lines.

    Raises:
        UserError: it cannot be read, or a row lacks a field.
    """
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines()[:items]:
            row = json.loads(line)
            text = " ".join([*row["context"], row["source"]])
            others = tuple(row.get("others", ()))
            answer = row["target"] if others else ""
            pair = Pair(text, answer, source, target, str(row["document"]))
            found.append(Pronoun(pair, row["expected"], others, tuple(row.get("before", ()))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}); give JSON lines with source,"
            " context (a list of sentences), expected and document; and with target, others (a"
            " list) and perhaps before (a list) for a choice between translations"
        ) from error
    return found
