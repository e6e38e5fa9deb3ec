"""CoCoA-MT: sentences with a formal and an informal translation, and the score of a register.

A folder of the data set holds, for each domain, the sources, both references, and both again with
`[F]..[/F]` around the phrases that carry the register.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes_peft.errors import UserError

_MARKED = re.compile(r"\[F\](.*?)\[/F\]")
REGISTERS = ("formal", "informal")
_WITHOUT_SPACES = ("ja", "zh")


@dataclass(frozen=True)
class Contrast:
    """A source with two translations; the phrases that make each of them what it is."""

    source: str
    formal: str
    informal: str
    formal_phrases: tuple[str, ...]
    informal_phrases: tuple[str, ...]
    domain: str

    def reference(self, register: str) -> str:
        """Give the translation in a register, `formal` or `informal`."""
        return self.formal if register == "formal" else self.informal


def read(folder: Path, language: str) -> list[Contrast]:
    """Read all domains of a folder such as `CoCoA-MT/test/en-de`.

    Raises:
        UserError: the folder has no such files, or they differ in length.
    """
    found: list[Contrast] = []
    for formal in sorted(folder.glob("formality-control.*")):
        stem, mark, ending = formal.name.partition(".formal")
        if not mark or "annotated" in ending:
            continue
        plain = folder / stem
        source = plain if plain.is_file() else folder / f"{stem}.en"
        files = [
            source,
            formal,
            folder / f"{stem}.informal{ending}",
            folder / f"{stem}.formal.annotated{ending}",
            folder / f"{stem}.informal.annotated{ending}",
        ]
        columns = [_lines(file) for file in files]
        if len({len(column) for column in columns}) != 1:
            raise UserError(
                f"{formal} and the files beside it differ in length; fetch them once more"
            )
        domain = stem.split(".")[2] if stem.count(".") > 2 else "all"
        for row in zip(*columns, strict=True):
            phrases = (tuple(_MARKED.findall(text)) for text in row[3:])
            found.append(Contrast(*row[:3], *phrases, domain))
    if not found:
        raise UserError(
            f"{folder} holds no formality-control.*.formal for en-{language}; give a folder of"
            " CoCoA-MT, such as CoCoA-MT/test/en-de"
        )
    return found


def contrasting(rows: Iterable[Contrast], without: Iterable[Contrast] = ()) -> list[Contrast]:
    """Keep rows whose references differ, whose register is marked, and whose source is new."""
    seen = {row.source for row in without}
    return [
        row
        for row in rows
        if row.formal != row.informal
        and row.formal_phrases
        and row.informal_phrases
        and row.source not in seen
    ]


def labels(written: Sequence[str], rows: Sequence[Contrast], language: str) -> list[str]:
    """Say of each translation which register it is in, by the references' phrases that it has.

    `formal` and `informal` for phrases of that register alone, `other` for both, `neutral` for
    none.

    Source:
        The evaluation script of CoCoA-MT (Nadejde et al. 2022).
    """
    return [_label(text, row, language) for text, row in zip(written, rows, strict=True)]


def _label(text: str, row: Contrast, language: str) -> str:
    formal = any(_occurs(p, text, language) for p in row.formal_phrases)
    informal = any(_occurs(p, text, language) for p in row.informal_phrases)
    if formal and informal:
        return "other"
    return "formal" if formal else "informal" if informal else "neutral"


def _occurs(phrase: str, text: str, language: str) -> bool:
    """Tell whether all words of a phrase are among a text's; part of it, where words run on."""
    if language in _WITHOUT_SPACES:
        return phrase in text
    return set(phrase.split()) <= set(text.split())


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} ({error}); fetch CoCoA-MT once more") from error
