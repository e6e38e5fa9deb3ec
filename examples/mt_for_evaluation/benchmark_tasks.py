"""Test sets in English and in human translation, with labels that do not depend on the language.

Three kinds: `nearest` (which of the English references is a text about?), `pair` (a class for two
texts, learnt from English ones), `choice` (which option goes with a premise?).
"""

from __future__ import annotations

import csv
import json
import lzma
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

from language_table import Language, describe
from translated import Item

from recipes_peft import assets, parallel
from recipes_peft.errors import UserError, explained

__all__ = ["TASKS", "Task", "read"]

XNLI = [
    "arb",
    "bul",
    "deu_1996",
    "ell_monotonic",
    "spa",
    "fra",
    "hin",
    "rus",
    "swh",
    "tha",
    "tur",
    "urd",
    "vie",
    "cmn_hans",
]
PREFERRED = {*XNLI, "por_BR"}  # of several versions of one language and script
_RELATION = {"cause": "because", "effect": "so"}


@dataclass(frozen=True)
class Task:
    """A test set: English items, human translations by language, and what to learn from."""

    kind: str  # nearest, pair or choice
    english: list[Item]
    human: dict[str, list[Item]]
    train: list[Item]  # English: references, or pairs with their classes
    languages: dict[str, Language]
    official: tuple[str, ...]

    @property
    def chance(self) -> float:
        """Give the accuracy of the most frequent label, known beforehand."""
        labels = [item.label for item in self.english]
        return max(labels.count(label) for label in set(labels)) / len(labels)


Read = Callable[[Any, Mapping[str, float]], Task]


def read(given: Any, known: Mapping[str, float]) -> Task:
    """Read the task of the settings.

    Raises:
        UserError: its data cannot be read, or lacks a language that is named.
    """
    task = TASKS[given.task](given, known)
    own_languages = given.task == "articles" and given.data != "udhr"  # they are read by name
    if given.languages != ["all"] and not own_languages:
        if missing := [code for code in given.languages if code not in task.languages]:
            raise UserError(
                f"{given.task} has no language {missing[0]!r}; it has {', '.join(task.languages)}"
            )
        keep = {code: task.languages[code] for code in given.languages}
        human = {code: rows for code, rows in task.human.items() if code in keep}
        task = Task(task.kind, task.english, human, task.train, keep, task.official)
    if given.n_items:
        cut = given.n_items
        human = {code: rows[:cut] for code, rows in task.human.items()}
        english = task.english[:cut]
        task = Task(task.kind, english, human, task.train, task.languages, task.official)
    return task


def articles(given: Any, known: Mapping[str, float]) -> Task:
    """Of which article of the Universal Declaration of Human Rights is a paragraph?

    Labels 0 (the preamble) to 30. A version is taken if it has at least 40 paragraphs and 28 of the
    31 parts; of versions of one language and script the fullest one.
    """
    if given.data not in ("udhr", "tiny"):
        return own(given, known)
    if given.data == "tiny":
        return toy(given, known)
    human: dict[str, list[Item]] = {}
    languages: dict[str, Language] = {}
    english: list[Item] = []
    taken: dict[tuple[str, str], str] = {}  # by language and script
    for code, tag, iso3, page in _declarations(assets.fetch("udhr")):
        rows = _paragraphs(page, given.max_chars)
        if code == "eng":
            english = rows
        if len(rows) < 40 or len({row.label for row in rows}) < 28 or code == "eng":
            continue
        text = " ".join(row.fields[0] for row in rows)
        found = describe(code, tag, iso3, text, known, given.high_from)
        name = (iso3, found.script)
        other = taken.get(name) if iso3 not in ("", "und") else None
        fuller = other is not None and len(human[other]) >= len(rows)
        if other and (other in PREFERRED or (fuller and code not in PREFERRED)):
            continue
        if other:
            del languages[other], human[other]
        taken[name] = code
        languages[code], human[code] = found, rows
    return Task("nearest", english, human, english, languages, tuple(XNLI))


def own(given: Any, known: Mapping[str, float]) -> Task:
    """Read pairs of your own: which English source (or document) does a translation belong to?

    `{language}` in the path stands for each of `--languages`; a file without it is of the first.
    """
    english: list[Item] = []
    human: dict[str, list[Item]] = {}
    languages: dict[str, Language] = {}
    codes = given.languages if "{language}" in given.data else given.languages[:1]
    for code in codes:
        path = Path(given.data.replace("{language}", code))
        pairs = parallel.table(path, "en", code)
        labels = {d: i for i, d in enumerate(dict.fromkeys(p.document for p in pairs))}
        rows, sources = [], []
        for number, pair in enumerate(pairs):
            key, label = str(number), labels[pair.document]
            rows.append(Item(key, (pair.target[: given.max_chars],), label, pair.document))
            sources.append(Item(key, (pair.source[: given.max_chars],), label, pair.document))
        if english and sources != english:
            raise UserError(f"{path} has other sources than the first file; give one English text")
        english, human[code] = sources, rows
        text = " ".join(pair.target for pair in pairs)
        languages[code] = describe(code, code, "", text, known, given.high_from)
    return Task("nearest", english, human, english, languages, tuple(languages))


def toy(given: Any, known: Mapping[str, float]) -> Task:
    """Make the toy languages of `parallel.tiny_pairs`, a label for every four sentences."""
    human, languages, english = {}, {}, []
    for code in given.languages:
        pairs = parallel.tiny_pairs("en", code, 48)
        labels = {d: i for i, d in enumerate(dict.fromkeys(p.document for p in pairs))}
        keys = [(str(i), labels[p.document], p.document) for i, p in enumerate(pairs)]
        rows = zip(keys, pairs, strict=True)
        both = [((k, label, d), p) for (k, label, d), p in rows]
        human[code] = [Item(k, (p.target,), label, d) for (k, label, d), p in both]
        english = [Item(k, (p.source,), label, d) for (k, label, d), p in both]
        languages[code] = describe(code, code, "", "a", known, given.high_from)
    return Task("nearest", english, human, english, languages, tuple(given.languages[:2]))


def xquad(given: Any, known: Mapping[str, float]) -> Task:
    """Which of the 240 English paragraphs of XQuAD answers a question? Questions are translated."""
    folder = _folder(given, "xquad")
    references: list[Item] = []
    sides: dict[str, list[Item]] = {}
    for path in sorted(folder.glob("xquad.*.json*")):
        code = path.name.split(".")[1]
        contexts = [p for a in json.loads(_text(path))["data"] for p in a["paragraphs"]]
        sides[code] = [
            Item(qa["id"], (qa["question"],), label, str(label))
            for label, context in enumerate(contexts)
            for qa in context["qas"]
        ]
        if code == "en":
            references = [
                Item(f"paragraph {i}", (c["context"][: given.max_chars],), i, str(i))
                for i, c in enumerate(contexts)
            ]
    return _task("nearest", sides, references, given, known)


def xcopa(given: Any, known: Mapping[str, float]) -> Task:
    """Which of two options is the cause or the effect? XCOPA, validation, beside English COPA.

    The relation is read from the Estonian file: in some others it is wrong.
    """
    folder = _folder(given, "xcopa")
    relations = {row["idx"]: row["question"] for row in _lines(folder / "data/et/val.et.jsonl")}
    sides = {
        path.name: [
            _choice(row, relations[row["idx"]]) for row in _lines(path / f"val.{path.name}.jsonl")
        ]
        for path in sorted((folder / "data").iterdir())
        if (path / f"val.{path.name}.jsonl").exists()
    }
    sides["en"] = [_choice(row, relations[row["idx"]]) for row in _copa(Path(given.data))]
    return _task("choice", sides, [], given, known)


def xstorycloze(given: Any, known: Mapping[str, float]) -> Task:
    """Which of two sentences ends the story? XStoryCloze, its part for evaluation."""
    folder = _folder(given, "xstorycloze")
    sides = {}
    for path in sorted(folder.glob("spring2016.val.*.tsv.split_20_80_eval.tsv*")):
        rows = _table(path)
        sides[path.name.split(".")[2]] = [
            Item(
                row["InputStoryid"],
                (
                    " ".join(row[f"InputSentence{i}"] for i in range(1, 5)),
                    row["RandomFifthSentenceQuiz1"],
                    row["RandomFifthSentenceQuiz2"],
                ),
                int(row["AnswerRightEnding"]) - 1,
                row["InputStoryid"],
            )
            for row in rows
        ]
    return _task("choice", sides, [], given, known)


def pawsx(given: Any, known: Mapping[str, float]) -> Task:
    """Are two sentences paraphrases? PAWS-X, validation: the first half in English to learn from.

    Its test labels are not public in most languages. Of the second half, rows whose label is the
    English one are taken, in all languages the same.
    """
    folder = _folder(given, "pawsx")
    columns = ("sentence1", "sentence2", "label")  # of files without a line of their own for them
    tables = {
        path.name.split("-")[1].split(".")[0]: _table(path, columns)
        for path in folder.glob("dev-*.tsv*")
    }
    sides = {
        code: [
            Item(str(i), (_unquoted(r["sentence1"]), _unquoted(r["sentence2"])), int(r["label"]))
            for i, r in enumerate(rows)
        ]
        for code, rows in sorted(tables.items())
    }
    if "en" not in sides:
        raise UserError(f"{folder} has no dev-en.tsv; give the folder as PAWS-X is published")
    same = [i for i, row in enumerate(sides["en"]) if _agreed(i, row, sides)]
    half = len(sides["en"]) // 2
    train = [sides["en"][i] for i in range(half)]
    sides = {c: [_clustered(rows[i]) for i in same if i >= half] for c, rows in sides.items()}
    return _task("pair", sides, train, given, known)


def xnli(given: Any, known: Mapping[str, float]) -> Task:
    """Does a premise entail a hypothesis? XNLI 1.0; its English validation part to learn from."""
    folder = _folder(given, "xnli")
    classes = {"entailment": 0, "neutral": 1, "contradiction": 2}
    parts: dict[str, dict[str, list[Item]]] = {"dev": {}, "test": {}}
    for part, sides in parts.items():
        for row in _table(folder / f"xnli.{part}.tsv"):
            item = Item(
                row["pairID"],
                (row["sentence1"], row["sentence2"]),
                classes[row["gold_label"]],
                row["promptID"],
            )
            sides.setdefault(row["language"], []).append(item)
    return _task("pair", parts["test"], parts["dev"].get("en", []), given, known)


TASKS: dict[str, Read] = {
    "articles": articles,
    "xquad": xquad,
    "xcopa": xcopa,
    "xstorycloze": xstorycloze,
    "pawsx": pawsx,
    "xnli": xnli,
}


def _task(
    kind: str,
    sides: Mapping[str, list[Item]],
    train: list[Item],
    given: Any,
    known: Mapping[str, float],
) -> Task:
    if "en" not in sides:
        raise UserError(f"{given.data}: {given.task} has no English side; give the whole folder")
    human = {code: rows for code, rows in sides.items() if code != "en"}
    languages = {
        code: describe(
            code, code, "", " ".join(f for row in rows for f in row.fields), known, given.high_from
        )
        for code, rows in human.items()
    }
    return Task(kind, sides["en"], human, train, languages, tuple(human))


def _declarations(archive: Path) -> list[tuple[str, str, str, str]]:
    """Give code, language tag, ISO 639-3 and page of every version in the package."""
    found = []
    with (
        explained(OSError, tarfile.TarError, before=f"cannot read the archive {archive}: "),
        tarfile.open(archive) as tar,
    ):
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".html") else None
            if file is not None:
                page = file.read().decode("utf-8")
                head = re.search(r'data-iso6393="([^"]*)"[^>]*\blang="([^"]*)"', page)
                if head:
                    code = Path(member.name).stem
                    tag = "zh-Hans" if code == "cmn_hans" else head[2]
                    found.append((code, tag, head[1], page))
    return sorted(found, key=lambda row: (row[0][0].isdigit(), row[0]))


def _paragraphs(page: str, most: int) -> list[Item]:
    """Give the paragraphs; keys hold how many a part has, so that only equal parts are joined."""
    rows = []
    blocks = re.findall(r"<(header|article)\b([^>]*)>(.*?)</\1>", page, re.S)
    for kind, attributes, content in blocks:
        number = re.search(r'data-number="(\d+)"', attributes)
        label = 0 if kind == "header" else int(number[1]) if number else -1
        raw = re.findall(r"<p\b[^>]*>(.*?)</p>", content, re.S)
        texts = [" ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split()) for text in raw]
        texts = [text[:most] for text in texts if text]
        if 0 <= label <= 30:
            rows += [
                Item(f"{label}.{i} of {len(texts)}", (text,), label, str(label))
                for i, text in enumerate(texts, 1)
            ]
    return rows


def _folder(given: Any, name: str) -> Path:
    for folder in (Path(given.data) / name, Path(given.data)):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{given.task} needs a folder of its files, and {given.data} is none; give with --data a"
        f" folder that holds {name}/ as it is published"
    )


def _text(path: Path) -> str:
    with explained(OSError, UnicodeDecodeError, lzma.LZMAError, before=f"cannot read {path}: "):
        packed = path if path.suffix == ".xz" else path.with_name(f"{path.name}.xz")
        if packed.exists() and not (path.exists() and path.suffix != ".xz"):
            return lzma.decompress(packed.read_bytes()).decode("utf-8")
        return path.read_text(encoding="utf-8")


def _lines(path: Path) -> list[dict[str, Any]]:
    with explained(json.JSONDecodeError, before=f"{path} is not JSON lines: "):
        return [json.loads(line) for line in _text(path).split("\n") if line.strip()]


def _table(path: Path, columns: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """Read columns parted by tabs; `columns` names them if the first line does not."""
    lines = [line.removesuffix("\r") for line in _text(path).split("\n") if line.strip()]
    named = not columns or columns[0] in lines[0].split("\t")
    names = None if named else columns
    return list(csv.DictReader(lines, names, delimiter="\t", quoting=csv.QUOTE_NONE))


def _copa(folder: Path) -> list[dict[str, Any]]:
    """Read English COPA, validation: `copa/val.jsonl`, or a folder that `datasets` saved."""
    if (folder / "copa/val.jsonl").exists():
        return _lines(folder / "copa/val.jsonl")
    saved = folder / "olmo_hf_datasets/super_glue/copa"
    if not saved.is_dir():
        raise UserError(
            f"{folder} has no English COPA; add copa/val.jsonl from SuperGLUE, or"
            f" {saved.relative_to(folder)}/ as datasets saves it"
        )
    from datasets import load_from_disk  # large, and no other task needs it

    place = next(path for path in (saved / "validation", saved) if path.is_dir())
    return [dict(row) for row in load_from_disk(str(place))]


def _choice(row: Mapping[str, Any], relation: str) -> Item:
    key = str(row["idx"])
    fields = (row["premise"], row["choice1"], row["choice2"])
    return Item(f"{key} {_RELATION[relation]}", fields, int(row["label"]), key)


def _unquoted(text: str) -> str:
    """Undo the quotes of CSV that some rows carry."""
    quoted = len(text) > 1 and text.startswith('"') and text.endswith('"') and '""' in text
    return text[1:-1].replace('""', '"') if quoted else text


def _agreed(i: int, row: Item, sides: Mapping[str, Sequence[Item]]) -> bool:
    return all(i < len(rows) and rows[i].label == row.label for rows in sides.values())


def _clustered(row: Item) -> Item:
    return Item(row.key, row.fields, row.label, row.key)
