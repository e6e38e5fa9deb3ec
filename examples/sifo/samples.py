"""Chains of instructions: the official schema read from a path, and written."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_peft import report
from recipes_peft.errors import UserError

__all__ = ["MAX_STEPS", "TASKS", "SifoSample", "json_lines", "opened", "read", "write"]

TASKS = ("text_modification", "qa", "math", "security")
MAX_STEPS = 6  # of the official data


@dataclass(frozen=True)
class SifoSample:
    """Instructions that are followed one by one, what each should give, and what they start from.

    `task` is one of TASKS, or another name, whose answers are compared as those of `qa`.

    Raises:
        UserError: there are no steps, or not as many answers.
    """

    task: str
    steps: tuple[str, ...]
    golds: tuple[str, ...]
    context: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.golds):
            raise UserError(
                f"a sample of {self.task} has {len(self.steps)} instructions and"
                f" {len(self.golds)} answers; give as many of both, at least one"
            )

    def record(self) -> dict[str, Any]:
        """Give the sample in the official schema."""
        row: dict[str, Any] = {"id": self.meta.get("id", 0)}
        if self.context:
            row["context"] = self.context
        for number, (step, gold) in enumerate(zip(self.steps, self.golds, strict=True), 1):
            row |= {f"instruction_{number}": step, f"answer_{number}": gold}
        return row


def read(path: Path) -> dict[str, list[SifoSample]]:
    """Read samples by task: a folder of the official files, or one file of JSON lines.

    A file's name without its ending is the task. A row is of the official schema (`instruction_1`,
    `answer_1`, ..., perhaps `context` and `id`), or has a `prompt` and an `answer`: one step. Files
    may be compressed as `.xz`.

    Raises:
        UserError: nothing is there, it cannot be read, or a row lacks an answer; names the line.
    """
    if not path.is_dir():
        return {_stem(path): _read_file(path)}
    files = [
        file
        for task in TASKS
        for file in (path / f"{task}.jsonl", path / f"{task}.jsonl.xz")
        if file.is_file()
    ]
    if not files:
        raise UserError(
            f"{path} holds none of {', '.join(f'{task}.jsonl' for task in TASKS)}; give the folder"
            " with the official files, or a file of JSON lines"
        )
    return {_stem(file): _read_file(file) for file in files}


def write(path: Path, samples: Sequence[SifoSample]) -> None:
    """Write samples as JSON lines of the official schema."""
    lines = (json.dumps(sample.record(), ensure_ascii=False) for sample in samples)
    report.write(path, ("\n".join(lines) + "\n").encode())


def opened(path: Path) -> str:
    """Give the text of a file, which may be compressed as `.xz`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes()).decode()
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path} ({error}); give a text file in UTF-8") from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the rows of a file of JSON lines, each with where it stands."""
    for number, line in enumerate(opened(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg}); correct it") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is no object; give a line such as {{'prompt': '..'}}")
        yield where, row


def _stem(path: Path) -> str:
    return path.name.removesuffix(".xz").removesuffix(".jsonl")


def _read_file(path: Path) -> list[SifoSample]:
    found = [_sample(_stem(path), row, where) for where, row in json_lines(path)]
    if not found:
        raise UserError(f"{path} is empty; give a line for each sample")
    return found


def _sample(task: str, row: Mapping[str, Any], where: str) -> SifoSample:
    steps, golds = [], []
    if "prompt" in row and "answer" in row:
        row = {**row, "instruction_1": row["prompt"], "answer_1": row["answer"]}
    while (number := len(steps) + 1) and f"instruction_{number}" in row:
        if row.get(f"answer_{number}") is None:
            raise UserError(f"{where} has instruction_{number} without answer_{number}; add it")
        steps.append(str(row[f"instruction_{number}"]))
        golds.append(str(row[f"answer_{number}"]))
    if not steps:
        raise UserError(
            f"{where} has no instruction; give instruction_1 and answer_1, and so on, or prompt"
            " and answer"
        )
    context = str(row.get("context") or "")
    return SifoSample(task, tuple(steps), tuple(golds), context, {"id": row.get("id", where)})
