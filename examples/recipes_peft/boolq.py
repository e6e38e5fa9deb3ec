"""BoolQ as two tasks: paragraphs of an encyclopedia as text, and questions about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes_peft.data import Example

__all__ = ["passages", "questions"]


def passages(path: Path) -> list[Example]:
    """Give the distinct paragraphs of a file of BoolQ, without a prompt; an article is a group."""
    found = {row["passage"]: _article(row) for row in _rows(path)}
    return [Example("", passage, group, raw=True) for passage, group in found.items()]


def questions(path: Path, instruction: str) -> list[Example]:
    """Make examples (a paragraph and a question about it, yes or no) from a file of BoolQ.

    Rows without an answer are left out; an article is a group.
    """
    return [
        Example(
            f"{row['passage']}\n\nQuestion: {row['question'].rstrip(' ?')}?",
            "yes" if row["label"] else "no",
            _article(row),
            instruction,
        )
        for row in _rows(path)
        if isinstance(row.get("label"), bool)
    ]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


def _article(row: dict[str, Any]) -> str:
    return row["passage"].partition(" -- ")[0].split(" (")[0].strip()
