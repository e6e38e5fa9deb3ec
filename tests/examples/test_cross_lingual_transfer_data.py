"""The recipe's data: countries, files of data sets, own rows, parts and training conditions."""

from __future__ import annotations

import json
import lzma
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes_peft import assets, errors
from tests.examples._recipes import elsewhere
from tests.examples.test_cross_lingual_transfer import RECIPE

countries, prepare, readers = RECIPE.countries, RECIPE.prepare, RECIPE.readers
Answer, Row = RECIPE.parallel_pairs.Answer, RECIPE.parallel_pairs.Row


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(tmp_path, monkeypatch)


# ---- countries ----------------------------------------------------------------------------------


def catalogue(messages: dict[str, str]) -> bytes:
    """Give a compiled catalogue of gettext."""
    entries = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    count, text, tables = len(entries), b"", ([], [])
    for side in (0, 1):
        for entry in entries:
            word = entry[side].encode()
            tables[side].append((len(word), 28 + 16 * count + len(text)))
            text += word + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    numbers = [n for table in tables for pair in table for n in pair]
    return head + struct.pack(f"<{len(numbers)}I", *numbers) + text


TABLE = {
    "3166-1": [
        {"alpha_2": "AM", "name": "Armenia", "official_name": "Republic of Armenia"},
        {"alpha_2": "FR", "name": "France", "official_name": "French Republic"},
        {"alpha_2": "AQ", "name": "Antarctica"},
        {"alpha_2": "CA", "name": "Canada", "official_name": "Canada"},
        {"alpha_2": "PE", "name": "Peru", "official_name": "Republic of Peru"},
        {"alpha_2": "TG", "name": "Togo", "official_name": "Togolese Republic"},
    ]
}
GERMAN = {
    "Armenia": "Armenien",
    "Republic of Armenia": "Republik Armenien",
    "France": "Frankreich",  # and no official name
    "Peru": "Peru",
    "Republic of Peru": "Republik Peru",  # one of both is as in English: it counts
    "Togo": "Togo",
    "Togolese Republic": "Togolese Republic",  # both are: untranslated
}


@pytest.mark.parametrize("layout", [0, 1, "wheel"])
def test_countries_are_read_where_both_names_are_there(
    layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, names = countries.LAYOUTS[0 if layout == "wheel" else layout]
    files = {table: json.dumps(TABLE).encode(), names.format("de"): catalogue(GERMAN)}
    where = str(tmp_path / "own")
    if layout == "wheel":
        where = "pycountry"
        (tmp_path / "cache").mkdir()
        with zipfile.ZipFile(tmp_path / "cache" / assets.ASSETS["countries"].file, "w") as wheel:
            for name, content in files.items():
                wheel.writestr(f"pycountry/{name}", content)
    else:
        for name, content in files.items():
            (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "own" / name).write_bytes(content)
    found = countries.read(where, ["en", "de"])
    assert found.keys == ["AM", "FR", "PE", "TG"]
    assert found.texts["en"][1] == ("France", "French Republic")
    assert found.texts["de"] == [
        ("Armenien", "Republik Armenien"), None, ("Peru", "Republik Peru"), None,
    ]  # fmt: skip
    with pytest.raises(errors.UserError, match="no catalogue of countries for the language 'xx'"):
        countries.read(where, ["xx"])


def test_a_folder_without_countries_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(errors.UserError, match=r"holds neither databases/iso3166-1\.json nor"):
        countries.read(str(tmp_path), ["en"])


# ---- files --------------------------------------------------------------------------------------


def squad(contexts: list[str], spans: list[tuple[str, str]]) -> str:
    paragraphs = [
        {
            "context": context,
            "qas": [{"id": "1", "question": question, "answers": [
                {"text": answer, "answer_start": context.index(answer)}]}],
        }
        for context, (question, answer) in zip(contexts, spans, strict=True)
    ]  # fmt: skip
    return json.dumps({"data": [{"paragraphs": paragraphs}]})


def test_questions_are_read_packed_or_not(tmp_path: Path) -> None:
    text = squad(["Lom is in Bulgaria."], [("Where is Lom?", "Bulgaria")])
    (tmp_path / "xquad.en.json.xz").write_bytes(lzma.compress(text.encode()))
    wanted = [("Lom is in Bulgaria.", "Where is Lom?", Answer("Bulgaria", 10))]
    assert readers.read("xquad", str(tmp_path), "en") == wanted
    assert readers.read("xquad", str(tmp_path / "xquad.{language}.json"), "en") == wanted
    (tmp_path / "odd.json").write_text(text.replace("10", "11"))
    with pytest.raises(errors.UserError, match="'Bulgaria' is not at character 11"):
        readers.read("xquad", str(tmp_path / "odd.json"), "en")
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(errors.UserError, match=r"is not SQuAD 1\.1's JSON"):
        readers.read("xquad", str(tmp_path / "odd.json"), "en")
    with pytest.raises(errors.UserError, match=r"cannot read .*xquad.de.json"):
        readers.read("xquad", str(tmp_path), "de")


def test_paraphrases_lose_the_quotes_of_csv(tmp_path: Path) -> None:
    (tmp_path / "dev-en.tsv").write_text('a "b" c\t"a ""b"" d"\t1\n"x" y "z"\tq\t0\n')
    wanted = [('a "b" c', 'a "b" d', 1), ('"x" y "z"', "q", 0)]
    assert readers.read("pawsx", str(tmp_path), "en") == wanted
    (tmp_path / "dev-de.tsv").write_text("id\tsentence1\tsentence2\tlabel\r\n7\ta\tb\t1\r\n")
    assert readers.read("pawsx", str(tmp_path), "de") == [("a", "b", 1)]
    (tmp_path / "dev-fr.tsv").write_text("a\tb\n")
    with pytest.raises(errors.UserError, match="line 1 has 2 columns"):
        readers.read("pawsx", str(tmp_path), "fr")
    (tmp_path / "dev-fr.tsv").write_text("a\tb\tyes\n")
    with pytest.raises(errors.UserError, match="line 1 has the label 'yes'"):
        readers.read("pawsx", str(tmp_path), "fr")


def test_inferences_are_read_in_both_forms(tmp_path: Path) -> None:
    (tmp_path / "test-en.tsv").write_text("p\th\tneutral\nq\ti\tcontradiction\n")
    assert readers.read("xnli", str(tmp_path), "en") == [("p", "h", 1), ("q", "i", 2)]
    header = "language\tgold_label\tsentence1\tsentence2\tpairID\n"
    rows = "ar\tneutral\tpa\tha\t1\nde\tentailment\tpd\thd\t1\n"
    (tmp_path / "xnli.test.tsv").write_text(header + rows)
    assert readers.read("xnli", str(tmp_path / "xnli.test.tsv"), "de") == [("pd", "hd", 0)]
    (tmp_path / "train.tsv").write_text("premise\thypo\tlabel\np\th\tcontradictory\n")
    assert readers.read("xnli", str(tmp_path / "train.tsv"), "en") == [("p", "h", 2)]
    with pytest.raises(errors.UserError, match="has no rows in 'fr'"):
        readers.read("xnli", str(tmp_path / "xnli.test.tsv"), "fr")
    (tmp_path / "train.tsv").write_text("p\th\tmaybe\n")
    with pytest.raises(errors.UserError, match=r"has the line 'p \| h \| maybe'"):
        readers.read("xnli", str(tmp_path / "train.tsv"), "en")


def test_a_data_set_is_loaded_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    files = {"en-test": ("p", "h", 1), "de-test": ("pd", "hd", 1), "en-train": ("q", "i", 0)}
    for name, row in files.items():
        line = json.dumps(dict(zip(("premise", "hypothesis", "label"), row, strict=True)))
        (tmp_path / "set" / f"{name}.jsonl").write_text(line + "\n")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: en\n  data_files:\n  - {split: test, path: en-test.jsonl}\n"
        "  - {split: train, path: en-train.jsonl}\n"
        "- config_name: de\n  data_files:\n  - {split: test, path: de-test.jsonl}\n---\n"
    )
    assert readers.read("xnli", f"hub:{tmp_path / 'set'}", "de") == [("pd", "hd", 1)]
    assert readers.read("xnli", f"hub:{tmp_path / 'set'}", "en", True) == [("q", "i", 0)]
    with pytest.raises(errors.UserError, match="no column 'sentence1', but premise"):
        readers.read("pawsx", f"hub:{tmp_path / 'set'}", "en")
    with pytest.raises(errors.UserError, match="cannot load en of "):
        readers.read("xnli", f"hub:{tmp_path / 'nothing'}", "en")


def test_own_rows_are_a_grid_or_text_and_its_translation(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"label": 2, "en": ["a", "b"], "de": ["c", "d"]}\n\n')
    grid = readers.own(file)
    assert grid.cell("en", "de") == [Row(0, "a", "d", 2)]
    file.write_text('{"source": "a", "target": "b", "prompt": "?"}\n')
    items = readers.own(file)
    assert items.texts == {"source": [("a", "a")], "target": [("b", "b")]}
    for line, said in {
        '{"label": 1, "en": ["a"]}': "line 1 is no row of a grid",
        '{"label": true, "en": ["a", "b"]}': "line 1 is no row of a grid",
        '{"en": ["a", "b"]}': "line 1 is no row of a grid",
        "{": "line 1 is not JSON",
        "": "is empty; give a line",
    }.items():
        file.write_text(line)
        with pytest.raises(errors.UserError, match=said):
            readers.own(file)
    file.write_text('{"label": 1, "en": ["a", "b"]}\n{"label": 1, "de": ["a", "b"]}\n')
    with pytest.raises(errors.UserError, match="line 2 has other languages than the first row"):
        readers.own(file)


# ---- parts and conditions -----------------------------------------------------------------------


def settings(**changes: Any) -> Any:
    given = {
        "task": "own", "data": "tiny", "train_data": None, "languages": None,
        "train_language": None, "train_groups": 12, "held_out": 4, "max_train": None,
        "max_test": None,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


def test_no_country_is_on_two_sides() -> None:
    data = prepare.prepare(settings())
    sides = [set(part.groups) for part in (data.train, data.held_out, data.test)]
    assert [len(side) for side in sides] == [8, 4, 12]
    assert len(set.union(*sides)) == 24
    assert data.language == "l"
    assert data.classes == 2
    # no negative comes from another side either
    toys = readers.toy()
    names = {pair[0]: key for key, pair in zip(toys.keys, toys.texts["l"], strict=True)}
    for part, side in zip((data.train, data.held_out, data.test), sides, strict=True):
        assert {names[text.split()[-1]] for text in part.second["l"]} <= side
    assert list(data.hard) == ["l", "c", "g"]
    assert len(data.hard["c"].cell("c", "c")) == 24


def test_parts_are_as_large_as_asked_and_no_larger() -> None:
    data = prepare.prepare(settings(max_train=5, max_test=7))
    assert (len(data.train), len(data.test)) == (5, 7)
    with pytest.raises(errors.UserError, match="23 of 24 groups cannot be set apart"):
        prepare.prepare(settings(train_groups=23))
    with pytest.raises(errors.UserError, match="no text in 'x', but in l, c, g"):
        prepare.prepare(settings(languages=["l", "x"]))
    with pytest.raises(errors.UserError, match="the grid has the language l only"):
        prepare.prepare(settings(languages=["l"]))


def test_no_sentence_of_paraphrases_is_on_two_sides(tmp_path: Path) -> None:
    # every second sentence is the first of another row, or its second
    rows = [(f"s{i}", f"s{i + 1}" if i % 3 else f"t{i // 2}") for i in range(30)]
    for name in ("en", "de"):
        lines = [f"{name} {a}\t{name} {b}\t{i % 2}" for i, (a, b) in enumerate(rows)]
        (tmp_path / f"dev-{name}.tsv").write_text("\n".join(lines) + "\n")
    given = settings(
        task="pawsx", data=str(tmp_path), languages=["en", "de"], train_groups=4, held_out=2
    )
    data = prepare.prepare(given)
    sides = [
        {text for side in (part.first, part.second) for text in side["en"]}
        for part in (data.train, data.held_out, data.test)
    ]
    assert min(map(len, sides)) > 2
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_training_text_of_its_own_has_perhaps_all_languages(tmp_path: Path) -> None:
    for name in ("en", "de"):
        (tmp_path / f"dev-{name}.tsv").write_text(
            "".join(f"{name} a{i}\tb\t{i % 2}\n" for i in range(6))
        )
        (tmp_path / f"train-{name}.tsv").write_text(
            "".join(f"{name} t{i}\tu{i}\t{i % 2}\n" for i in range(9))
        )
    given = settings(
        task="pawsx", data=str(tmp_path), train_data=str(tmp_path / "train-en.tsv"),
        languages=["en", "de"], held_out=2,
    )  # fmt: skip
    data = prepare.prepare(given)
    assert (len(data.train), len(data.held_out), len(data.test)) == (7, 2, 6)
    assert data.train.languages == ["en"]
    assert not data.hard
    with pytest.raises(errors.UserError, match="mixed-language training needs parallel"):
        prepare.training_rows(data, "mixed", 0)
    given.train_data = str(tmp_path / "train-{language}.tsv")
    rows = prepare.training_rows(prepare.prepare(given), "mixed", 0)
    assert len(rows) == 7
    assert {row.first[:2] for row in rows} == {"en", "de"}


def test_conditions_have_as_many_rows() -> None:
    data = prepare.prepare(settings())
    plain, shuffled, mixed = (prepare.training_rows(data, c, 3) for c in prepare.CONDITIONS)
    assert len(plain) == len(shuffled) == len(mixed) == 16
    assert [r.target for r in plain] == [r.target for r in shuffled] == [r.target for r in mixed]
    assert any(a.second != b.second for a, b in zip(plain, shuffled, strict=True))
    assert all(sorted(a.second) == sorted(b.second) for a, b in zip(plain, shuffled, strict=True))
    scripts = [tuple(RECIPE.shortcuts.script([t]) for t in row[1:3]) for row in mixed]
    assert len(set(scripts)) > 2
    assert all(a != b for a, b in scripts)
