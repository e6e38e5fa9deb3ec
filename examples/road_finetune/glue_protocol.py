"""GLUE as the paper measures it: tasks, the development set cut in two, and the metrics.

RoAd (arXiv:2409.00119), appendix C: half of the development set chooses the checkpoint and half is
the test; of the largest tasks a thousand examples choose. Every seed has a cut of its own.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes_peft import assets, data
from recipes_peft.errors import UserError, explained

__all__ = ["TASKS", "Pair", "Task", "accuracy", "cut", "matthews", "pairs", "pearson", "read"]


class Pair(NamedTuple):
    """One text or two, and the class, or the value of a regression."""

    first: str
    second: str | None
    label: float


def accuracy(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Give the share of equal labels."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)


def matthews(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Give Matthews' correlation of two classes, 0 if either side has one class only."""
    cells = {(a, b): 0 for a in (0, 1) for b in (0, 1)}
    for a, b in zip(found, wanted, strict=True):
        cells[int(a), int(b)] += 1
    tp, tn, fp, fn = cells[1, 1], cells[0, 0], cells[1, 0], cells[0, 1]
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / scale if scale else 0.0


def pearson(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Give Pearson's correlation, 0 if either side is constant."""
    n = len(wanted)
    if n != len(found):
        raise ValueError(f"{len(found)} values cannot be correlated with {n}; give as many of each")
    a = [value - sum(found) / n for value in found]
    b = [value - sum(wanted) / n for value in wanted]
    scale = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / scale if scale else 0.0


@dataclass(frozen=True)
class Task:
    """A task: its columns, its classes (1: a regression), its metric, and how it is cut."""

    columns: tuple[str, ...]
    classes: int = 2
    metric: Callable[[Sequence[float], Sequence[float]], float] = accuracy
    choosing: int | None = None  # examples that choose the checkpoint; None: half
    development: str = "validation"  # the split that is cut


TASKS = {
    "pairs": Task(("question", "passage")),  # not of GLUE: see `pairs`
    "cola": Task(("sentence",), metric=matthews),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("sentence1", "sentence2")),
    "stsb": Task(("sentence1", "sentence2"), 1, pearson),
    "qqp": Task(("question1", "question2"), choosing=1000),
    "mnli": Task(("premise", "hypothesis"), 3, choosing=1000, development="validation_matched"),
    "qnli": Task(("question", "sentence"), choosing=1000),
    "rte": Task(("sentence1", "sentence2")),
}


def cut(
    development: Sequence[Pair], seed: int, choosing: int | None
) -> tuple[list[Pair], list[Pair]]:
    """Cut a development set into what chooses the checkpoint and what tests it.

    Raises:
        UserError: nothing is left to test on.
    """
    order = list(development)
    random.Random(seed).shuffle(order)
    size = len(order) // 2 if choosing is None else choosing
    if not 0 < size < len(order):
        raise UserError(
            f"the development set has {len(order)} examples, {size} of them to choose the"
            " checkpoint by; give a larger one"
        )
    return order[:size], order[size:]


def read(task: str, source: str, held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Give a task's training and development sets.

    `source` is GLUE's id on the hub, or a folder with a folder for each task: JSON lines named
    `train.jsonl`, `validation.jsonl`, or what `datasets` reads. `pairs` takes `held_out` questions
    of BoolQ as its development set; with the source `tiny` it is a toy.

    Raises:
        UserError: the source cannot be read, or lacks a column.
    """
    if task == "pairs":
        if source == "tiny":
            return toy(48, 0), toy(16, 100)
        return pairs(assets.fetch("boolq"), held_out)
    about = TASKS[task]
    splits = {name: _rows(task, source, name) for name in ("train", about.development)}
    train, development = (
        [_pair(row, about, f"{source}, {task}, {name}") for row in rows]
        for name, rows in splits.items()
    )
    return train, development


def pairs(path: Path, held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Make a task like QNLI of BoolQ: does the passage answer the question, or is it another's?

    Every question occurs once. The development set is split off by article, and its other passages
    come from its own side.
    """
    found = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            title = row["passage"].partition(" -- ")[0].split(" (")[0].strip()
            question = f"{row['question'].rstrip(' ?')}?"
            found.setdefault(question, data.Example(question, row["passage"], title))
    train, development = data.split(list(found.values()), held_out, seed=0)
    return _pairs(train), _pairs(development)


def toy(count: int, first: int) -> list[Pair]:
    """Make pairs of letters: do both sides begin with the same one?"""
    letters = "abcdefgh"
    made = []
    for i in range(first, first + count):
        letter, other = letters[i % 8], letters[(i + 1 + i // 8 % 7) % 8]
        made.append(Pair(f"{letter}?", f"{letter if i // 2 % 2 else other}!", i // 2 % 2))
    return made


def _pairs(examples: Sequence[data.Example]) -> list[Pair]:
    draw = random.Random(0)
    if len({example.group for example in examples}) < 2:
        raise UserError("the questions are of one article; pairs need at least two on either side")
    made = []
    for number, example in enumerate(examples):
        own = number % 2 == 0
        other = example
        while not own and other.group == example.group:
            other = draw.choice(examples)
        made.append(Pair(example.prompt, other.answer, int(own)))
    return made


def _rows(task: str, source: str, split: str) -> Any:
    file = Path(source) / task / f"{split}.jsonl"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").split("\n")
        with explained(json.JSONDecodeError, before=f"{file} is not JSON lines: "):
            return [json.loads(line) for line in lines if line.strip()]
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source} needs the package datasets; run: pip install datasets"
        ) from error
    advice = "; give GLUE's id on the hub, or a folder of its tasks, with --glue"
    kinds = (OSError, ValueError, datasets.exceptions.DatasetsError)
    with explained(*kinds, before=f"cannot read {task} of {source}: ", after=advice):
        if (folder := Path(source) / task).is_dir():
            return datasets.load_dataset(str(folder), split=split)
        return datasets.load_dataset(source, task, split=split)


def _pair(row: Any, task: Task, where: str) -> Pair:
    columns = [*task.columns, "label"]
    if missing := [column for column in columns if column not in row]:
        raise UserError(f"{where}: no column {missing[0]!r}; GLUE has {', '.join(columns)}")
    first, second = (*(row[column] for column in task.columns), None)[:2]
    return Pair(first, second, float(row["label"]))
