"""What the models learn: texts or pairs of texts, each with a class or a number.

`match` and `order` are made of BoolQ, an encyclopedia's paragraphs with questions; the tasks of
GLUE are read from a folder with its files or from the hub; any other is a file of JSON lines.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recipes_peft import assets, boolq, data, tiny
from recipes_peft.errors import UserError, explained

__all__ = ["GLUE", "MADE", "Row", "Task", "constant", "digest", "load", "score"]


class Row(NamedTuple):
    first: str
    second: str | None
    label: float  # the number of a class, or what a regression predicts


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows held out; one output makes it a regression."""

    name: str
    train: list[Row]
    held_out: list[Row]
    outputs: int
    metric: str = "accuracy"


class Columns(NamedTuple):
    """Where a file of GLUE has its columns, from 0, and whether a line of names comes first."""

    first: int
    second: int | None
    label: int
    named: bool = True
    metric: str = "accuracy"
    keys: tuple[str, ...] = ("sentence",)  # of the texts on the hub


GLUE = {
    "sst2": Columns(0, None, 1),
    "rte": Columns(1, 2, 3, keys=("sentence1", "sentence2")),
    "mrpc": Columns(3, 4, 0, keys=("sentence1", "sentence2")),
    "stsb": Columns(7, 8, 9, metric="pearson", keys=("sentence1", "sentence2")),
    "cola": Columns(3, None, 1, named=False, metric="matthews"),
}
FOLDERS = {"sst2": "SST-2", "rte": "RTE", "mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA"}
MADE = ("match", "order")


def load(source: str, name: str, train_size: int | None, held_out: int | None, seed: int) -> Task:
    """Give the task `name` of a source: boolq, glue (the hub), a folder of GLUE, tiny, or a file.

    `seed` picks and orders what is trained on; what is held out is always the same. The last two
    sources hold one task, whatever its name.

    Raises:
        UserError: there is no such task or file, or it has too few rows.
    """
    if source == "boolq":
        if name not in MADE:
            raise UserError(f"boolq has no task {name!r}; choose from {', '.join(MADE)}")
        task = _made(name, train_size, held_out or 400, seed)
    elif source == "glue" or Path(source).is_dir():
        if name not in GLUE:
            raise UserError(f"{source} has no task {name!r}; choose from {', '.join(GLUE)}")
        task = _glue(source, name, seed)
    else:
        task = _file(source, held_out or 400, seed)
    train, kept = task.train[:train_size], task.held_out[:held_out]
    if len(kept) < 4:
        raise UserError(
            f"{task.name} holds out {len(kept)} rows, but half of them choose between learning"
            " rates and half test; give at least 16 rows"
        )
    return Task(task.name, train, kept, task.outputs, task.metric)


def score(metric: str, outputs: Tensor, labels: Tensor) -> float:
    """Give accuracy, Matthews' correlation (of two classes) or Pearson's; 0 if undefined.

    Shapes:
        outputs: (n, classes), or (n, 1) of a regression. labels: (n,).
    """
    if metric == "accuracy":
        return (outputs.argmax(1) == labels).double().mean().item()
    found = outputs[:, 0] if metric == "pearson" else outputs.argmax(1)
    # Matthews' correlation is Pearson's of two binary variables.
    pair = torch.stack([found.double(), labels.double()])
    if bool((pair == pair[:, :1]).all(1).any()):
        return 0.0
    return torch.corrcoef(pair)[0, 1].item()


def digest(task: Task) -> str:
    """Give a checksum of the rows, to know them again."""
    return hashlib.sha256(repr((task.train, task.held_out)).encode()).hexdigest()[:16]


def constant(task: Task) -> float:
    """Give the score of the best constant answer: the share of the most frequent class, or 0."""
    if task.metric != "accuracy":
        return 0.0
    labels = [row.label for row in task.held_out]
    return max(labels.count(label) for label in labels) / len(labels)


def _made(name: str, train_size: int | None, held_out: int, seed: int) -> Task:
    file = assets.fetch("boolq")
    if name == "match":
        train, kept = data.split(boolq.questions(file, ""), held_out, seed)
        make = matches
    else:
        train, kept = data.split(boolq.passages(file), held_out, seed)
        make = orders
    return Task(name, list(make(train[:train_size])), list(make(kept)), 2)


def matches(examples: Sequence[data.Example]) -> Iterator[Row]:
    """Pair each question with its own paragraph (1) or, every other time, another article's (0)."""
    parts = [e.prompt.rpartition("\n\nQuestion: ") for e in examples]
    for i, (own, _, question) in enumerate(parts):
        around = (k % len(parts) for k in range(i + 1, i + len(parts)))
        other = next((k for k in around if examples[k].group != examples[i].group), i)
        yield Row(question, own if i % 2 else parts[other][0], i % 2)


def orders(examples: Sequence[data.Example], words: int = 20) -> Iterator[Row]:
    """Give the first words of each paragraph as they are (1) or with all neighbours swapped (0)."""
    for i, example in enumerate(examples):
        found = (example.answer.partition(" -- ")[2] or example.answer).split()[:words]
        if not i % 2:
            pairs = [found[k : k + 2][::-1] for k in range(0, len(found), 2)]
            found = [word for pair in pairs for word in pair]
        yield Row(" ".join(found), None, i % 2)


def _glue(source: str, name: str, seed: int) -> Task:
    columns = GLUE[name]
    parts = [
        _hub(name, s) if source == "glue" else _table(Path(source), name, s)
        for s in ("train", "dev")
    ]
    train, kept = parts
    random.Random(seed).shuffle(train)
    return Task(name, train, kept, 1 if columns.metric == "pearson" else 2, columns.metric)


def _table(folder: Path, name: str, part: str) -> list[Row]:
    columns, file = GLUE[name], folder / FOLDERS[name] / f"{part}.tsv"
    hint = f"; give a folder that has {FOLDERS[name]}/{part}.tsv as GLUE comes"
    words = {"entailment": 0.0, "not_entailment": 1.0}
    with explained(OSError, IndexError, ValueError, before=f"cannot read {file}: ", after=hint):
        lines = file.read_text(encoding="utf-8").split("\n")[1 if columns.named else 0 :]
        rows = [line.rstrip("\r").split("\t") for line in lines if line]
        return [
            Row(
                row[columns.first],
                None if columns.second is None else row[columns.second],
                words[row[columns.label]]
                if row[columns.label] in words
                else float(row[columns.label]),
            )
            for row in rows
        ]


def _hub(name: str, part: str) -> list[Row]:
    hint = "; give --data a folder with the files of GLUE instead"
    with explained(ImportError, OSError, ValueError, before="cannot load GLUE: ", after=hint):
        from datasets import load_dataset

        found: Any = load_dataset(
            "nyu-mll/glue", name, split="validation" if part == "dev" else part
        )
    keys = GLUE[name].keys
    return [
        Row(row[keys[0]], row[keys[1]] if len(keys) > 1 else None, float(row["label"]))
        for row in found
    ]


def _file(source: str, held_out: int, seed: int) -> Task:
    examples = tiny.examples(64) if source == "tiny" else data.read(Path(source))
    classes = {word: i for i, word in enumerate(sorted({e.answer for e in examples}))}
    if len(classes) < 2:
        raise UserError(f"{source} has one answer only; give rows of two classes or more")
    parts = data.split(examples, held_out, seed)
    rows = [[Row(e.prompt, e.instruction or None, classes[e.answer]) for e in p] for p in parts]
    return Task(Path(source).stem, rows[0], rows[1], len(classes))
