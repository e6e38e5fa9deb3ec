"""Translate the fields of a test set, labels copied, rows kept; keep a cache; look for trouble.

MT_L = {(MT(field) for every text field of item i, y_i)}: rows stay aligned with English, so nothing
is dropped here, however bad; the report says how bad.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from language_table import Language
from sacrebleu.metrics import CHRF
from tqdm.auto import tqdm
from translators import Translator

from recipes_peft import report
from recipes_peft.errors import UserError, explained

__all__ = ["FLAGGED", "Item", "Sanity", "chrf", "copy_rate", "sanity", "translate_dataset", "words"]

FLAGGED = 0.10  # a share of copied tokens above this is an artefact
_CHUNK = 16  # texts between two writes of the cache


@dataclass(frozen=True)
class Item:
    """A row of a test set: its texts, its label, and a key that its translations share."""

    key: str
    fields: tuple[str, ...]
    label: int
    cluster: str = ""  # rows of one cluster are drawn together in a bootstrap


@dataclass(frozen=True)
class Sanity:
    """What looks wrong in translations: numbers of fields, but for the pairs and the shares."""

    fields: int
    empty: int
    copied: int  # equal to the source
    repeated: int  # equal to the translation of another source
    looping: int  # some four words in a row occur three times
    length_outliers: int  # characters per source character, 3 times off the median
    identical_pairs: int  # rows whose different fields became one text
    copy_rate: float  # share of output tokens that stand in the source

    @property
    def flagged(self) -> bool:
        """Say whether too much was copied for a score to mean anything."""
        return self.copy_rate > FLAGGED


def translate_dataset(
    items: Sequence[Item], translator: Translator, language: Language, folder: Path
) -> list[Item]:
    """Give the items in another language: every field translated on its own, labels copied.

    Translations are kept in `folder` by system, language and text. A call that was interrupted goes
    on where it stopped.

    Raises:
        UserError: the translator fails, or gives another number of texts.
    """
    target = language.flores or language.code
    about = {"system": translator.system, "language": f"{language.code} {target}"}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"{language.code}-{name}.json"
    known: dict[str, str] = {}
    if file.exists():
        with explained(OSError, ValueError, before=f"cannot go on from {file}: "):
            known = json.loads(file.read_text(encoding="utf-8"))["translations"]
    texts = list(dict.fromkeys(field for item in items for field in item.fields))
    missing = [text for text in texts if text not in known]
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(missing), _CHUNK)
    for start in tqdm(starts, desc=f"translating to {language.code}", disable=not missing):
        some = missing[start : start + _CHUNK]
        answers = translator.translate(some, language)
        if len(answers) != len(some):
            raise UserError(
                f"{translator.system} gave {len(answers)} translations of {len(some)} texts; it"
                " must give one for each"
            )
        known |= dict(zip(some, answers, strict=True))
        report.write_json(file, {**about, "translations": known})
    return [replace(item, fields=tuple(known[field] for field in item.fields)) for item in items]


def words(text: str) -> list[str]:
    """Give the tokens that count for copying: more than three letters, in lower case."""
    return [word for word in re.findall(r"[^\W\d_]+", text.lower()) if len(word) > 3]


def copy_rate(sources: Sequence[str], translations: Sequence[str]) -> float:
    """Give the share of tokens of the translations that stand in their own source."""
    copied = total = 0
    for source, translation in zip(sources, translations, strict=True):
        known = set(words(source))
        found = words(translation)
        copied += sum(word in known for word in found)
        total += len(found)
    return copied / total if total else 0.0


def sanity(items: Sequence[Item], translated: Sequence[Item]) -> Sanity:
    """Look at translations of a test set, which are as many, in the same order.

    Raises:
        ValueError: they are not the same rows.
    """
    if [item.key for item in items] != [item.key for item in translated]:
        raise ValueError("the translated rows are not those of the source; keep keys and order")
    rows = {
        source: target
        for before, after in zip(items, translated, strict=True)
        for source, target in zip(before.fields, after.fields, strict=True)
    }
    ratios = [len(target) / max(1, len(source)) for source, target in rows.items() if target]
    middle = statistics.median(ratios) if ratios else 1.0
    counts = Counter(target for target in rows.values() if target.strip())
    pairs = zip(items, translated, strict=True)
    return Sanity(
        fields=len(rows),
        empty=sum(not target.strip() for target in rows.values()),
        copied=sum(_bare(source) == _bare(target) for source, target in rows.items()),
        repeated=sum(count for count in counts.values() if count > 1),
        looping=sum(_loops(target) for target in rows.values()),
        length_outliers=sum(not middle / 3 <= ratio <= 3 * middle for ratio in ratios),
        identical_pairs=sum(
            len(set(before.fields)) > len(set(after.fields)) for before, after in pairs
        ),
        copy_rate=copy_rate(list(rows), list(rows.values())),
    )


def chrf(translated: Sequence[Item], human: Sequence[Item]) -> dict[str, Any] | None:
    """Score translations against human ones: chrF++ of the rows that both have, and its signature.

    Rows are joined by key; None if no key is shared.
    """
    wanted: Mapping[str, Item] = {item.key: item for item in human}
    pairs = [(item, wanted[item.key]) for item in translated if item.key in wanted]
    if not pairs:
        return None
    said = [field for item, _ in pairs for field in item.fields]
    gold = [field for _, item in pairs for field in item.fields]
    metric = CHRF(word_order=2)
    score = metric.corpus_score(said, [gold]).score
    return {"chrf": score, "rows": len(pairs), "signature": str(metric.get_signature())}


def _bare(text: str) -> str:
    return " ".join(text.casefold().split())


def _loops(text: str) -> bool:
    found = text.split()
    grams = Counter(tuple(found[i : i + 4]) for i in range(len(found) - 3))
    return any(count >= 3 for count in grams.values())
