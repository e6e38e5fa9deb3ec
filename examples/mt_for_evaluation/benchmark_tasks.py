"""Test sets in English and in human translation, with labels that do not depend on the language.

Three kinds: `nearest` (which of the English references is a text about?), `pair` (a class for two
texts, learnt from English ones), `choice` (which option goes with a premise?).
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import unescape
from pathlib import Path
from typing import Any

import set_files
from language_table import Language, describe
from translated import Item

from recipes_peft import assets, parallel
from recipes_peft.errors import UserError, explained

__all__ = ["KINDS", "SPARE", "TASKS", "Task", "read"]

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
# What a task is; the class of a model's languages is asked for before it is read.
KINDS = {
    "articles": "nearest",
    "xquad": "nearest",
    "xcopa": "choice",
    "xstorycloze": "choice",
    "pawsx": "pair",
    "xnli": "pair",
}
# English rows of sets of options that no language is tested on, to calibrate with.
SPARE = {
    "xcopa": "data-gmt/et/test.et.jsonl",
    "xstorycloze": "spring2016.val.en.tsv.split_20_80_train.tsv",
}
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
    calibration: list[Item] = field(default_factory=list)  # options that are not asked for

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
        task = replace(task, human=human, languages=keep)
    if given.n_items:
        cut = given.n_items
        human = {code: rows[:cut] for code, rows in task.human.items()}
        task = replace(task, english=task.english[:cut], human=human)
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
    folder = set_files.folder(given, "xquad")
    references: list[Item] = []
    sides: dict[str, list[Item]] = {}
    for path in sorted(folder.glob("xquad.*.json*")):
        code = path.name.split(".")[1]
        contexts = [p for a in json.loads(set_files.text(path))["data"] for p in a["paragraphs"]]
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
    return _task(sides, references, given, known)


def xcopa(given: Any, known: Mapping[str, float]) -> Task:
    """Which of two options is the cause or the effect? XCOPA, validation, beside English COPA.

    The relation is read from the Estonian file: in some others it is wrong. Machine translations of
    the test part, which is not asked here, are there to calibrate with.
    """
    folder = set_files.folder(given, "xcopa")
    relations = {
        row["idx"]: row["question"] for row in set_files.lines(folder / "data/et/val.et.jsonl")
    }
    sides = {
        path.name: [
            _choice(row, relations[row["idx"]])
            for row in set_files.lines(path / f"val.{path.name}.jsonl")
        ]
        for path in sorted((folder / "data").iterdir())
        if (path / f"val.{path.name}.jsonl").exists()
    }
    sides["en"] = [_choice(row, relations[row["idx"]]) for row in set_files.copa(Path(given.data))]
    path = folder / SPARE["xcopa"]
    rows = set_files.lines(path) if set_files.there(path) else []
    spare = [_choice(row, row["question"]) for row in rows]
    return replace(_task(sides, [], given, known), calibration=spare)


def xstorycloze(given: Any, known: Mapping[str, float]) -> Task:
    """Which of two sentences ends the story? XStoryCloze: asks its part for evaluation."""
    folder = set_files.folder(given, "xstorycloze")
    sides = {
        path.name.split(".")[2]: [_ending(row) for row in set_files.table(path)]
        for path in sorted(folder.glob("spring2016.val.*.tsv.split_20_80_eval.tsv*"))
    }
    path = folder / SPARE["xstorycloze"]
    spare = [_ending(row) for row in set_files.table(path)] if set_files.there(path) else []
    return replace(_task(sides, [], given, known), calibration=spare)


def pawsx(given: Any, known: Mapping[str, float]) -> Task:
    """Are two sentences paraphrases? PAWS-X, validation: half of it in English to learn from.

    Its test labels are not public in most languages. Rows that share an English sentence, with each
    other or by way of a third, are on one side and in one cluster. Of the rows that are not learnt
    from, those whose label is the English one are taken, in all languages the same. With
    `train_data` all are tested.
    """
    folder = set_files.folder(given, "pawsx")
    columns = ("sentence1", "sentence2", "label")  # of files without a line of their own for them
    tables = {
        path.name.split("-")[1].split(".")[0]: set_files.table(path, columns)
        for path in folder.glob("dev-*.tsv*")
    }
    if "en" not in tables:
        raise UserError(f"{folder} has no dev-en.tsv; give the folder as PAWS-X is published")
    texts = {
        code: [tuple(set_files.unquoted(r[c]) for c in columns[:2]) for r in rows]
        for code, rows in sorted(tables.items())
    }
    clusters = _connected(texts["en"])
    sides = {
        code: [
            Item(str(i), fields, int(row["label"]), cluster)
            for i, (fields, row, cluster) in enumerate(
                zip(rows, tables[code], clusters, strict=False)
            )
        ]
        for code, rows in texts.items()
    }
    english = sides["en"]
    if given.train_data:
        train, learnt = set_files.pairs(Path(given.train_data), {"0": 0, "1": 1}), set()
    else:
        learnt = _first_half(clusters)
        train = [row for row in english if row.cluster in learnt]
    rest = [i for i, row in enumerate(english) if row.cluster not in learnt]
    if not rest:
        raise UserError(f"{folder} has no English row that is not learnt from; give --train-data")
    same = [i for i in rest if _agreed(i, english[i], sides)]
    sides = {code: [rows[i] for i in same] for code, rows in sides.items()}
    return _task(sides, train, given, known)


def xnli(given: Any, known: Mapping[str, float]) -> Task:
    """Does a premise entail a hypothesis? XNLI 1.0; to learn from `train_data`, or its dev part."""
    folder = set_files.folder(given, "xnli")
    classes = {"entailment": 0, "neutral": 1, "contradiction": 2}
    parts: dict[str, dict[str, list[Item]]] = {"dev": {}, "test": {}}
    for part, sides in parts.items():
        for row in set_files.table(folder / f"xnli.{part}.tsv"):
            item = Item(
                row["pairID"],
                (row["sentence1"], row["sentence2"]),
                classes[row["gold_label"]],
                row["promptID"],
            )
            sides.setdefault(row["language"], []).append(item)
    if given.train_data:
        train = set_files.pairs(Path(given.train_data), classes | {"contradictory": 2})
    else:
        train = parts["dev"].get("en", [])
    return _task(parts["test"], train, given, known)


TASKS: dict[str, Read] = {
    "articles": articles,
    "xquad": xquad,
    "xcopa": xcopa,
    "xstorycloze": xstorycloze,
    "pawsx": pawsx,
    "xnli": xnli,
}


def _task(
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
    return Task(KINDS[given.task], sides["en"], human, train, languages, tuple(human))


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


def _choice(row: Mapping[str, Any], relation: str) -> Item:
    key = str(row["idx"])
    fields = (row["premise"], row["choice1"], row["choice2"])
    return Item(f"{key} {_RELATION[relation]}", fields, int(row["label"]), key)


def _ending(row: Mapping[str, str]) -> Item:
    story = " ".join(row[f"InputSentence{i}"] for i in range(1, 5))
    fields = (story, row["RandomFifthSentenceQuiz1"], row["RandomFifthSentenceQuiz2"])
    key = row["InputStoryid"]
    return Item(key, fields, int(row["AnswerRightEnding"]) - 1, key)


def _agreed(i: int, row: Item, sides: Mapping[str, Sequence[Item]]) -> bool:
    return all(i < len(rows) and rows[i].label == row.label for rows in sides.values())


def _connected(rows: Sequence[Sequence[str]]) -> list[str]:
    """Give each row the number of the first one that it is connected with by shared texts."""
    first = list(range(len(rows)))  # an earlier row of the same cluster, or the row itself

    def root(i: int) -> int:
        while first[i] != i:
            i = first[i]
        return i

    seen: dict[str, int] = {}
    for i, texts in enumerate(rows):
        for text in texts:
            a, b = root(i), root(seen.setdefault(text, i))
            first[max(a, b)] = min(a, b)
    return [str(root(i)) for i in range(len(rows))]


def _first_half(clusters: Sequence[str]) -> set[str]:
    """Give the clusters, in the order of their first rows, that hold half of the rows."""
    found: set[str] = set()
    taken = 0
    for name, size in Counter(clusters).items():
        if taken >= len(clusters) // 2:
            break
        found.add(name)
        taken += size
    return found
