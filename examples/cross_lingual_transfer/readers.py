"""Read test grids and training sets: XNLI, PAWS-X and XQuAD as files or from the hub, and own rows.

A place is a folder, a file, a name of files in which `{language}` stands for the language, or
`hub:NAME`. Files may be compressed (`.xz`). Rows of all languages are in the same order, and are
joined by nothing else.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_pairs import Answer, Items, ParallelPairs, connected

from recipes_peft.errors import UserError, explained

__all__ = ["SOURCES", "aligned", "own", "read", "toy"]

Record = tuple[str, str, Any]  # segments a and b, and what is to be found
NLI = {"entailment": 0, "neutral": 1, "contradiction": 2, "contradictory": 2}


@dataclass(frozen=True)
class Source:
    """A data set: its files in a folder, how they are read, and what it is on the hub."""

    pattern: str
    parse: Callable[[str, str, str], list[Record]]  # text, language, where it is from
    hub_name: str  # of a language
    hub_split: str
    hub_columns: tuple[str, str, str]
    alike: bool = False  # both segments are of one kind, and may be the same in several rows


def read(task: str, where: str, language: str, training: bool = False) -> list[Record]:
    """Give the rows of a task in a language.

    Raises:
        UserError: they cannot be read, or are not of this task.
    """
    source = SOURCES[task]
    if where.startswith("hub:"):
        return _hub(source, where.removeprefix("hub:"), language, training)
    path = Path(where.replace("{language}", language)).expanduser()
    if path.is_dir():
        path = path / source.pattern.replace("{language}", language)
    rows = source.parse(_text(path), language, str(path))
    if not rows:
        raise UserError(f"{path} has no rows in {language!r}; give another file or language")
    return rows


def aligned(records: dict[str, list[Record]], alike: bool = False) -> ParallelPairs:
    """Join the rows of languages by their order; rows with one first segment are a group.

    With `alike`, rows that share either segment are, and rows that are connected by others. Texts
    are compared in the first language.
    """
    columns = {name: list(zip(*rows, strict=True)) for name, rows in records.items()}
    first, second, targets = ({name: list(c[i]) for name, c in columns.items()} for i in range(3))
    a, b = (next(iter(side.values())) for side in (first, second))
    return ParallelPairs(first, second, targets, connected(a, b) if alike else a)


def _text(path: Path) -> str:
    packed = path.with_name(f"{path.name}.xz")
    file = packed if packed.exists() and not path.exists() else path
    advice = "; give a folder, a file, or a name with {language} in it"
    with explained(
        OSError, UnicodeDecodeError, lzma.LZMAError, before=f"cannot read {path}: ", after=advice
    ):
        data = file.read_bytes()
        return (lzma.decompress(data) if file.suffix == ".xz" else data).decode("utf-8")


def _lines(text: str) -> list[list[str]]:
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r").split("\t") for line in lines]


def _number(label: str, where: str) -> int:
    if not label.strip().isdigit():
        raise UserError(f"{where} has the label {label!r}; a number is wanted in the last column")
    return int(label)


def _unquoted(text: str) -> str:
    """Undo the quotation marks that a CSV writer put around a text that has some."""
    inner = text[1:-1]
    quoted = text[:1] == text[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else text


def _pawsx(text: str, language: str, where: str) -> list[Record]:
    """Read two sentences and a label a line, perhaps after an id: 1 is a paraphrase."""
    found: list[Record] = []
    for number, cells in enumerate(_lines(text), 1):
        if number == 1 and cells[-1] == "label":
            continue
        if len(cells) not in (3, 4):
            raise UserError(
                f"{where}, line {number} has {len(cells)} columns; PAWS-X has two sentences and a"
                " label (the packaging of XTREME has test sets without labels: take dev)"
            )
        first, second, label = cells[-3:]
        label_here = f"{where}, line {number}"
        found.append((_unquoted(first), _unquoted(second), _number(label, label_here)))
    return found


def _xnli(text: str, language: str, where: str) -> list[Record]:
    """Read XNLI 1.0, all languages in a file with names of columns, or a file of a language."""
    rows = _lines(text)
    names = rows[0]
    if "gold_label" in names:
        wanted = [names.index(n) for n in ("sentence1", "sentence2", "gold_label", "language")]
        cells = [[row[i] for i in wanted] for row in rows[1:]]
        rows = [row[:3] for row in cells if row[3] == language]
    elif names[-1] == "label" or names[0] == "premise":
        rows = rows[1:]
    found: list[Record] = []
    for row in rows:
        if len(row) != 3 or row[2] not in NLI:
            raise UserError(
                f"{where} has the line {' | '.join(row)[:60]!r}; a premise, a hypothesis and"
                f" one of {', '.join(NLI)} are wanted, or XNLI 1.0's columns"
            )
        found.append((row[0], row[1], NLI[row[2]]))
    return found


def _squad(text: str, language: str, where: str) -> list[Record]:
    """Read SQuAD 1.1: a context, a question, and the first of the answers."""
    found: list[Record] = []
    with explained(ValueError, KeyError, TypeError, before=f"{where} is not SQuAD 1.1's JSON: "):
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answer = question["answers"][0]
                    target = Answer(answer["text"], answer["answer_start"])
                    found.append((paragraph["context"], question["question"], target))
    for context, _, (answer, start) in found:
        if context[start : start + len(answer)] != answer:
            raise UserError(f"{where}: the answer {answer!r} is not at character {start}")
    return found


def _hub(source: Source, name: str, language: str, training: bool) -> list[Record]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hub:{name} needs the package datasets; run: pip install datasets") from (
            error
        )
    subset = source.hub_name.replace("{language}", language)
    split = "train" if training else source.hub_split
    kinds = (OSError, ValueError, datasets.exceptions.DatasetsError)
    with explained(*kinds, before=f"cannot load {subset} of {name}: "):
        known = datasets.get_dataset_config_names(name)
        rows = datasets.load_dataset(name, subset if subset in known else None, split=split)
    first, second, target = source.hub_columns
    if missing := [c for c in source.hub_columns if c not in rows.column_names]:
        raise UserError(
            f"hub:{name} has no column {missing[0]!r}, but {', '.join(rows.column_names)}"
        )

    def found(value: Any) -> Any:
        return Answer(value["text"][0], value["answer_start"][0]) if target == "answers" else value

    return [(row[first], row[second], found(row[target])) for row in rows]


SOURCES = {
    "pawsx": Source(
        "dev-{language}.tsv",
        _pawsx,
        "{language}",
        "test",
        ("sentence1", "sentence2", "label"),
        alike=True,
    ),
    "xnli": Source(
        "test-{language}.tsv", _xnli, "{language}", "test", ("premise", "hypothesis", "label")
    ),
    "xquad": Source(
        "xquad.{language}.json",
        _squad,
        "xquad.{language}",
        "validation",
        ("context", "question", "answers"),
    ),
}


def own(path: Path) -> ParallelPairs | Items:
    """Read JSON lines of one's own.

    A row with `label` has two segments for each of its languages: {"label": 1, "en": ["a", "b"],
    "de": ["c", "d"]}. Rows with `source` and `target`, a text and its translation, become a
    question: are two texts the same sentence? Within a language that is equality.

    Raises:
        UserError: the file cannot be read, or a row is neither.
    """
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            with explained(ValueError, before=f"{path}, line {number} is not JSON: "):
                rows.append((f"{path}, line {number}", json.loads(line)))
    if not rows:
        raise UserError(f"{path} is empty; give a line such as {OWN_ROW}")
    if all(isinstance(row, dict) and "source" in row and "target" in row for _, row in rows):
        sides = {name: [(row[name], row[name]) for _, row in rows] for name in ("source", "target")}
        return Items([row["source"] for _, row in rows], sides)
    records: dict[str, list[Record]] = {}
    languages = _languages(*rows[0])
    for where, row in rows:
        if _languages(where, row) != languages:
            raise UserError(f"{where} has other languages than the first row; give the same ones")
        for name in languages:
            records.setdefault(name, []).append((*row[name], row["label"]))
    return aligned(records)


OWN_ROW = '{"label": 1, "en": ["first", "second"], "de": ["first", "second"]}'


def _languages(where: str, row: Any) -> list[str]:
    found = [name for name in row if name != "label"] if isinstance(row, dict) else []
    pairs = all(isinstance(row[n], list) and list(map(type, row[n])) == [str] * 2 for n in found)
    if not found or not pairs or type(row.get("label")) is not int or row["label"] < 0:
        raise UserError(
            f"{where} is no row of a grid; give {OWN_ROW}, or text as source and target"
        )
    return found


def toy(count: int = 24) -> Items:
    """Make things with two names in three languages of different signs, `l`, `c` and `g`."""
    letters = "abdeiklmnoprst"
    signs = {"l": letters, "c": "абдеиклмнопрст", "g": "αβδεικλμνοπρστ"}
    keys = ["".join(random.Random(i).sample(letters, 6)) for i in range(count)]
    texts: dict[str, Sequence[tuple[str, str] | None]] = {}
    for name, alphabet in signs.items():
        table = str.maketrans(letters, alphabet)
        texts[name] = [
            (k.translate(table), f"{'republik' if i % 2 else 'state'} {k}".translate(table))
            for i, k in enumerate(keys)
        ]
    return Items(keys, texts)
