"""Translate what can be translated, let every arm answer every item, and keep the answers.

Answers of an arm, seed, language and side are one file, with a checksum of the items that they are
to. A run that was interrupted goes on from the last one; an arm without anything left to answer is
not even loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import translators
from agreement import Mark, Marks
from arms import ARMS, Start, seeded, usable
from benchmark_tasks import Task
from language_table import Language
from tqdm.auto import tqdm
from translated import Item, chrf, sanity, translate_dataset

from recipes_peft import report
from recipes_peft.errors import UserError, explained

__all__ = ["SIDES", "Answers", "answer", "answer_all", "translate"]

SIDES = ("human", "machine")
Answers = dict[str, dict[str, Marks]]  # by side and language
Items = dict[str, list[Item]]  # by language


def translate(
    given: Any, task: Task, languages: Sequence[Language], folder: Path
) -> tuple[Items, Items, dict[str, dict[str, Any]], dict[str, str]]:
    """Give the machine-translated items by language, what they look like, and what was left out.

    Second comes the translation of the English training items, if an arm learns from it.

    Raises:
        UserError: a translator fails; or is not here, if the settings say so.
    """
    words = dict(translators.make(word) for word in given.translations)
    machine: Items = {}
    training: Items = {}
    learns = "translate-train" in usable(given.arms, task.kind)
    reports: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    made: dict[Any, translators.Translator] = {}
    for language in languages:
        make = words.get(language.code, words.get("*"))
        if make is None:
            continue
        try:
            if make not in made:
                made[make] = make()
            rows = translate_dataset(task.english, made[make], language, folder)
            if learns:
                found = translate_dataset(task.train, made[make], language, folder)
                training[language.code] = found
        except translators.MissingError as error:
            if given.missing == "fail":
                raise
            left_out[language.code] = str(error)
            continue
        machine[language.code] = rows
        looks = sanity(task.english, rows)
        reports[language.code] = {
            "system": made[make].system,
            **asdict(looks),
            "flagged": looks.flagged,
            "quality": chrf(rows, task.human.get(language.code, [])),
        }
    return machine, training, reports, left_out


def answer(start: Start, name: str, seed: int, languages: Sequence[str]) -> Answers:
    """Give an arm's answers to all items of the languages, in human and machine translation."""
    todo = {
        (side, code): list(rows)
        for side, sets in zip(SIDES, (start.task.human, start.machine), strict=True)
        for code, rows in sets.items()
        if code in languages
    }
    found: Answers = {side: {} for side in SIDES}
    start.seed = seed
    predict = None
    for (side, code), rows in tqdm(todo.items(), desc=f"{name}, seed {seed}"):
        file = start.folder / f"{name}-{seed}" / f"{code}-{side}.json"
        # what it learns from is a part of it
        learnt = [*start.task.train, *start.task.calibration]
        if name == "translate-train":
            learnt = list(start.training.get(code, []))
        checksum = _checksum([*rows, *learnt])
        predicted = _read(file, checksum)
        if predicted is None:
            if predict is None:
                predict = ARMS[name].make(start, name)
            predicted = predict(rows, code)
            if predicted is None:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            report.write_json(file, {"checksum": checksum, "predicted": predicted})
        found[side][code] = {
            item.key: Mark(label, label == item.label, item.cluster or item.key)
            for item, label in zip(rows, predicted, strict=True)
        }
    return found


def answer_all(start: Start, languages: Sequence[str]) -> dict[str, list[Answers]]:
    """Give the answers of every arm that can do the task, for each of its seeds.

    Raises:
        UserError: no arm can.
    """
    given = start.given
    names = usable(given.arms, start.task.kind)
    if not names:
        able = ", ".join(usable(list(ARMS), start.task.kind))
        raise UserError(f"none of the arms can do {given.task}; choose from {able}")
    return {
        name: [
            answer(start, name, seed, languages)
            for seed in range(given.seeds if seeded(name) else 1)
        ]
        for name in names
    }


def _checksum(items: Sequence[Item]) -> str:
    content = [[item.key, *item.fields, item.label] for item in items]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read(file: Path, checksum: str) -> list[int] | None:
    if not file.exists():
        return None
    with explained(OSError, ValueError, before=f"cannot go on from {file}: "):
        content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content["predicted"] if content.get("checksum") == checksum else None
