"""BoolQ's rows as text and as questions, whose articles keep together."""

from __future__ import annotations

import json
from pathlib import Path

from recipes_peft.boolq import passages, questions

ROWS = [
    {"question": "is it green", "passage": "Tea (plant) -- Tea is green.", "label": True},
    {"question": "is it blue?", "passage": "Tea (plant) -- Tea is green.", "label": False},
    {"question": "does it fly", "passage": "Tea (plant) -- Another paragraph."},
    {"question": "is it hot", "passage": "Chili -- Chili is hot.", "label": True},
]


def file_of(folder: Path) -> Path:
    file = folder / "boolq.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    return file


def test_every_paragraph_comes_once_with_its_article(tmp_path: Path) -> None:
    found = passages(file_of(tmp_path))
    assert [(e.answer, e.group) for e in found] == [
        ("Tea (plant) -- Tea is green.", "Tea"),
        ("Tea (plant) -- Another paragraph.", "Tea"),
        ("Chili -- Chili is hot.", "Chili"),
    ]
    assert all(e.raw and not e.prompt for e in found)


def test_questions_without_an_answer_are_left_out(tmp_path: Path) -> None:
    found = questions(file_of(tmp_path), "Yes or no?")
    assert [(e.answer, e.group) for e in found] == [("yes", "Tea"), ("no", "Tea"), ("yes", "Chili")]
    assert found[1].prompt == "Tea (plant) -- Tea is green.\n\nQuestion: is it blue?"
    assert found[0].prompt.endswith("green?")
    assert {e.instruction for e in found} == {"Yes or no?"}
