"""The recipe's data and runs: readers, parts, conditions, mixed batches, and going on."""

from __future__ import annotations

import json
import lzma
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from recipes_peft import assets, errors
from tests.examples._recipes import elsewhere
from tests.examples.test_cross_lingual_transfer import RECIPE

arms, countries, prepare, readers = RECIPE.arms, RECIPE.countries, RECIPE.prepare, RECIPE.readers
Answer, Row = RECIPE.parallel_pairs.Answer, RECIPE.parallel_pairs.Row


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(tmp_path, monkeypatch)


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return errors.run(RECIPE.run.main)


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


# ---- arms ---------------------------------------------------------------------------------------


def test_arms_that_share_a_base_are_put_together() -> None:
    Study = arms.Study
    found = arms.studies(["road", "full"], ["road+mixed", "full+shuffled", "apiq-2"], 2)
    assert found == [
        Study("road", ("plain", "mixed"), 0),
        Study("full", ("plain",), 0),
        Study("full", ("shuffled",), 0),
        Study("apiq-2", ("plain",), 0),
        Study("road", ("plain",), 1),
        Study("full", ("plain",), 1),
    ]
    with pytest.raises(errors.UserError, match=r"there is no arm 'road\+odd'"):
        arms.parse("road+odd")


OPTIONS = {
    "model": "tiny", "dtype": "float32", "max_length": 64, "test_batch_size": 6, "stride": 0,
    "target_modules": None, "variant": "road_1", "group_size": 32, "rank": 2, "alpha": 4,
}  # fmt: skip


@pytest.mark.parametrize("tuner", ["road", "lora"])
def test_a_mixed_batch_gives_what_each_adapter_gives_alone(tuner: str, tmp_path: Path) -> None:
    given = SimpleNamespace(**OPTIONS)
    data = prepare.prepare(settings())
    task = RECIPE.classifying.Classifying(given, data)
    study = arms.Study(tuner, ("plain", "mixed"), 0)
    torch.manual_seed(0)
    model = arms.build(study, given, task, [], torch.device("cpu"), tmp_path)
    names = {n for n, _ in model.named_parameters() if ".original_module." not in n}
    own = [n for n in names if "classifier" in n or "pooler" in n]
    assert {n.split(".")[-2] for n in own} == {"plain", "mixed"}  # the head is each one's own
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{c}" in name for c in study.conditions):
                parameter += 0.3 * torch.randn_like(parameter)
    rows = task.rows(data.test.cell("l", "g"))
    mixed = task._logits(model, rows, ["plain", "mixed"])
    for name in study.conditions:
        model.set_adapter(name)
        alone = task._logits(model, rows, [name])[name]
        torch.testing.assert_close(mixed[name], alone, atol=1e-5, rtol=1e-4)
    assert (mixed["plain"] - mixed["mixed"]).abs().max() > 1e-2
    # what is kept of one adapter comes back
    arms.keep(model, study, "mixed", tmp_path / "kept")
    again = arms.build(study, given, task, [], torch.device("cpu"), tmp_path)
    arms.restore(again, study, "mixed", tmp_path / "kept")
    again.set_adapter("mixed")
    torch.testing.assert_close(task._logits(again, rows, ["mixed"])["mixed"], mixed["mixed"])


def test_a_head_of_several_layers_is_mixed_layer_by_layer() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = XLMRobertaConfig(vocab_size=20, num_hidden_layers=1, pad_token_id=1, **shape)
    model = XLMRobertaForSequenceClassification(config).eval()
    task = RECIPE.classifying.Classifying
    assert arms.heads(model, task) == ["classifier.dense", "classifier.out_proj"]
    model = arms.road(model, ["plain", "mixed"], SimpleNamespace(**OPTIONS), task)
    ids = torch.tensor([[0, 5, 2], [0, 5, 2]])
    heads = [p for n, p in model.named_parameters() if "out_proj" in n and ".mixed." in n]
    with torch.no_grad():
        for parameter in heads:
            parameter += 1
        logits = model(input_ids=ids, adapter_names=["plain", "mixed"]).logits
    assert len(heads) == 2
    assert (logits[0] - logits[1]).abs().min() > 0.1


# ---- runs ---------------------------------------------------------------------------------------

SMALL = ("--smoke", "--steps", "2", "--evaluations", "1", "--max-test", "8", "--bootstrap", "50")


def test_a_run_and_what_it_takes_up_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    once = ("--once", "road+shuffled", "road+mixed", "apiq-3")
    assert run(monkeypatch, *SMALL, *once) == 0
    (work,) = Path("demo-output").glob("work-*")
    found = json.loads(Path("demo-output/results.json").read_text())
    assert list(found["arms"]) == [
        "overlap", "constant", "oracle", "road", "road+shuffled", "road+mixed", "apiq-3",
    ]  # fmt: skip
    assert found["scripts"] == {"l": "LATIN", "c": "CYRILLIC", "g": "GREEK"}
    assert found["promises"]["A1: an oracle has 100 in every cell"]
    assert found["promises"]["A5: training on shuffled words has run"]
    overlap = found["arms"]["overlap"][0]
    assert overlap["metrics"]["accuracy"]["means"]["within"] == 1
    assert overlap["metrics"]["accuracy"]["means"]["across"] == 0.5
    # below the threshold both classes are answered 0: the positive class breaks across languages
    assert overlap["by_class"]["1"] == {"within": 1.0, "across": 0.0, "gap": 1.0}
    assert overlap["by_overlap"]["across"]["none"]["predicted"] == 0
    road = found["arms"]["road"][0]
    assert set(road["hard"]) == {"l", "c", "g"}
    assert road["trained"] < found["arms"]["apiq-3"][0]["trained"]
    lines = Path("demo-output/grid.csv").read_text().splitlines()
    assert len(lines) == 1 + 7 * 9
    for name in ("grid.png", "curves.png", "curves.csv"):
        assert Path("demo-output", name).exists()
    names = {path.name for path in (work / "models").iterdir()}
    assert names == {"road-0", "road+shuffled-0", "road+mixed-0", "apiq-3-0"}
    assert not [p for p in work.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".part")]

    # cells are lost: the models are read, and nothing trained again
    before = {path: path.stat().st_mtime_ns for path in (work / "models").rglob("*.safetensors")}
    first = {arm: runs[0]["metrics"] for arm, runs in found["arms"].items()}
    for arm in ("road-", "apiq"):
        (cell,) = work.glob(f"grid-{arm}*/l-g.json")
        cell.unlink()
    assert run(monkeypatch, *SMALL, *once) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = json.loads(Path("demo-output/results.json").read_text())
    assert {arm: runs[0]["metrics"] for arm, runs in again["arms"].items()} == first
    assert "gap" in capsys.readouterr().out


def test_questions_run_on_files_like_squad(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in {"en": "town", "de": "Stadt"}.items():
        contexts = [f"{place} {i} has {i * 7} streets" for i in range(8)]
        asked = [(f"How many has {i}?", str(i * 7)) for i in range(8)]
        Path(f"xquad.{name}.json").write_text(squad(contexts, asked))
    argv = ("--task", "xquad", "--data", ".", "--languages", "en", "de", "--train-groups", "5")
    chosen = ("--held-out", "2", "--once", "road+mixed", "full")
    assert run(monkeypatch, *SMALL, *argv, *chosen, "--stride", "4", "--max-length", "48") == 0
    found = json.loads(Path("demo-output/results.json").read_text())
    assert list(found["arms"]) == ["proximity", "oracle", "road", "road+mixed", "full"]
    road = found["arms"]["road"][0]
    assert set(road["metrics"]) == {"f1", "exact"}
    near = road["by_distance"]
    assert sum(part["rows"] for part in near["within"].values()) == 2 * 3
    assert sum(part["rows"] for part in near["across"].values()) == 2 * 3
    assert found["arms"]["oracle"][0]["metrics"]["exact"]["means"]["across"] == 1


def test_the_settings_of_the_paper_run_on_files(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ("entailment", "neutral", "contradiction")
    for name in ("en", "de"):
        for part, count in (("test", 6), ("train", 12)):
            rows = [f"{part} {name} {i}\th{i}\t{labels[i % 3]}" for i in range(count)]
            Path(f"{part}-{name}.tsv").write_text("\n".join(rows) + "\n")
    argv = ("--paper", "--data", ".", "--train-data", "train-{language}.tsv", "--model", "tiny")
    small = ("--languages", "en", "de", "--held-out", "3", "--steps", "1", "--group-size", "32")
    chosen = ("--arms", "full", "--once", "full+mixed", "--seeds", "1", "--bootstrap", "20")
    assert run(monkeypatch, *argv, *small, *chosen) == 0
    found = json.loads(Path("demo-output/results.json").read_text())
    full = found["arms"]["full"][0]
    assert set(full["by_class"]) == {"0", "1", "2"}
    assert set(full["by_merged_class"]) == {"0", "1"}
    assert found["settings"]["full_rate"] == 9e-6
    assert list(found["arms"])[-1] == "full+mixed"


BAD = {
    "arm": (["--arms", "road+odd"], r"there is no arm 'road+odd'"),
    "twice": (["--arms", "road", "road"], "arms has a word twice"),
    "task": (["--task", "glue"], "choose from countries, own, pawsx, xnli, xquad"),
    "language": (["--train-language", "x"], "no text to train on in 'x'"),
    "languages": (["--task", "xquad", "--data", "."], "needs its languages"),
    "data": (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    "model": (["--model", "nobody/nothing"], "cannot load the encoder 'nobody/nothing'"),
    "group": (["--group-size", "48"], "road does not fit"),
    "targets": (["--target-modules", "nothing"], "no block of the model has nothing"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_a_bad_option_is_a_sentence(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *SMALL, *argv) == 2
    assert said in capsys.readouterr().err
