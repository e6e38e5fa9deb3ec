"""The recipe's arms and runs: where a head starts, promises, going on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_peft import encoders, errors
from tests.examples import _recipes
from tests.examples.test_mt_for_evaluation import RECIPE, Item, Mark
from tests.examples.test_mt_for_evaluation_tasks import (
    columns,
    declaration,
    lines,
    publish,
    settings,
    write_copa,
)

arms, encoder_arms, findings = RECIPE["arms"], RECIPE["encoder_arms"], RECIPE["findings"]
CHEAP = ("--arms", "majority", "bow", "--draws", "20")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "toys", RECIPE["toys"])


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return errors.run(RECIPE["run"].main)


CONFIG = _recipes.EXAMPLES / "mt_for_evaluation/config.yaml"


def results() -> dict[str, Any]:
    return json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))


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
    test = {"of": "encoder", "over": "bow", "difference": 0.2, "p": 0.01}
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
            "lead": {"of": "encoder", "over": "bow", "difference": -0.2, "p": 0.9},
            "lost": {"encoder-apiq2": {"low above high": {"difference": 0.1, "p": 0.06}}},
        },
        control={"accuracy": 0.2, "chance": 0.05},
    )
    assert set(worse.values()) == {False}
    # a pair that was not translated leaves the promise open
    part = judged(sides={"encoder": {"d": {"spa": 0.0}}})
    assert part["encoder: mean |D| at most .05 over the 7 pairs"] is None
    other = {"of": "road", "over": "bow", "difference": 0.2, "p": 0.01}
    lead = judged(classes={"o": {}, "lead": other, "lost": {}})
    assert lead["the lead over bow is smaller on unseen languages, p < .05"] is None


def test_classes_are_compared_by_what_the_model_saw() -> None:
    def answers(right: str) -> dict[str, Mark]:
        return {str(i): Mark(int(x), x == "1", str(i)) for i, x in enumerate(right)}

    sets = {"h1": "1111", "h2": "1110", "l1": "1100", "u1": "1000", "u2": "0000"}
    beside = {"h3": "0000", "l2": "1111", "u3": "1111"}  # not drawn: they have scores alone
    sets |= beside
    human = {code: answers(right) for code, right in sets.items()}
    worse = {**human, "l1": answers("0000")}
    runs = {
        "bow": [{"human": {code: answers("0000") for code in sets}, "machine": {}}],
        "encoder": [{"human": human, "machine": {}}],
        "encoder-apiq2": [{"human": worse, "machine": {}}],
    }
    names = {"h": "high", "l": "low", "u": "unseen"}
    languages = {c: SimpleNamespace(resource=names[c[0]]) for c in sets if c not in beside}
    found = findings.compare_classes(runs, languages, ("h1", "l1"), "human", 200, 0)
    assert found["means"]["encoder"] == pytest.approx(
        {"high": 0.875, "low": 0.5, "unseen": 0.125, "low+unseen": 0.25}
    )
    assert found["o"]["encoder"]["high"]["o"] == pytest.approx(0.125)
    assert found["o"]["encoder"]["low"] is None  # no other language in it
    assert found["o"]["encoder"]["low+unseen"]["o"] == pytest.approx(0.25)
    assert (found["lead"]["of"], found["lead"]["over"]) == ("encoder", "bow")
    assert found["lead"]["difference"] == pytest.approx(0.75 - 0.125)
    # of pairs: a trained model, over the baseline that can do them
    pairs = {"ngram-regression": runs["bow"], "road": runs["encoder"]}
    lead = findings.compare_classes(pairs, languages, ("h1", "l1"), "human", 200, 0)["lead"]
    assert lead == {**found["lead"], "of": "road", "over": "ngram-regression"}
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


def test_a_language_that_is_only_translated_counts_in_no_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tags = {"eng": "en", "swh": "sw", "fra": "fr", "fin": "fi", "swe": "sv", "yor": "yo"}
    publish({code: declaration(code, code, tag) for code, tag in tags.items()}, monkeypatch)
    given = ("--smoke", "--data", "udhr", "--languages", "all", "--arms", "bow", "--draws", "20")
    given += ("--translations", "fin=command:cat")
    assert run(monkeypatch, *given, "--per-class", "0") == 0
    few = results()
    assert set(few["sides"]["bow"]["d"]) == {"fin"}
    assert set(few["languages"]) == {"fra", "swh", "fin"}
    assert set(few["compared"]) == {"fra", "swh"}
    assert few["classes"]["o"]["bow"]["high"] is None  # no other language in it
    table = Path("demo-output/languages.csv").read_text(encoding="utf-8").splitlines()
    assert {row.split(",")[0]: row.split(",")[6] for row in table[1:]} == {
        "fra": "yes",
        "swh": "yes",
        "fin": "no",
    }
    # drawn by the rule, it counts like any other
    assert run(monkeypatch, *given, "--per-class", "2") == 0
    all_ = results()
    assert set(all_["compared"]) == {*tags} - {"eng"}
    assert all_["classes"]["o"]["bow"]["high"]["all"] == 3


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


def test_options_with_a_quantised_language_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_copa()
    given = ("--smoke", "--task", "xcopa", "--data", "d", "--languages", "all")
    chosen = ("--arms", "majority", "bow", "lm", "lm-apiq2", "encoder")
    machine = ("--translations", "et=command:cat", "--machine-languages", "spa_Latn")
    assert run(monkeypatch, *given, *chosen, *machine) == 0
    found = results()
    assert set(found["classes"]["means"]) == {"majority", "bow", "lm", "lm-apiq2"}
    assert set(found["languages"]) == {"et", "th", "spa_Latn"}
    assert found["sides"]["lm"]["items"]["et"]["shared"] == 6
    Path("d/xcopa/data-gmt/et/test.et.jsonl").unlink()
    assert run(monkeypatch, *given, "--arms", "lm-apiq2") == 2
    assert "add data-gmt/et/test.et.jsonl" in capsys.readouterr().err


def test_a_language_model_is_calibrated_on_what_is_not_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_copa()
    seen: list[str] = []

    def watched(model: Any, batches: Any, *_: Any, **__: Any) -> Any:
        seen.extend(tokenizer.decode(batch["input_ids"][0]) for batch in batches)
        return model

    monkeypatch.setattr(encoder_arms, "make_quantised", watched)
    model, tokenizer = arms.models.load("tiny")
    monkeypatch.setattr(arms.models, "load", lambda _: (model, tokenizer))
    task = RECIPE["benchmark_tasks"].read(settings("xcopa", "d"), {})
    given = SimpleNamespace(model="tiny", calibration_rows=3, task="xcopa", data="d")
    place = SimpleNamespace(device="cpu")
    start = arms.Start(given, task, {}, {}, Path(), place)
    arms.ARMS["lm-apiq2"].make(start, "lm-apiq2")
    # one option and the other in turn, though the first is always the right one
    assert seen == ["spare 0 because one 0", "spare 1 because two 1", "spare 2 because one 2"]


def test_pairs_are_learnt_from_english(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in ("en", "de"):
        texts = [(f"word {i}", f"{'word' if i % 2 else 'other'} {i}") for i in range(24)]
        rows = [(*both, str(i % 2)) for i, both in enumerate(texts)]
        columns(f"d/pawsx/dev-{code}.tsv", rows)
    given = ("--smoke", "--task", "pawsx", "--data", "d", "--languages", "all")
    chosen = ("--arms", "majority", "ngram-regression", "lora", "lora-apiq2")
    assert run(monkeypatch, *given, *chosen, "--translations", "de=command:cat") == 0
    found = results()
    means = found["sides"]
    assert set(means) == {"majority", "ngram-regression", "lora", "lora-apiq2"}
    assert means["ngram-regression"]["d"]["de"] == 0  # both sides are the same text here
    assert set(found["classes"]["lost"]) == {"lora-apiq2"}


@pytest.mark.parametrize(
    ("task", "words", "wanted"),
    [
        ("articles", ["lm", "encoder"], "xlm-r"),
        ("xcopa", ["lm", "majority"], "english"),
        ("xcopa", ["bow"], "xlm-r"),
        ("xcopa", ["lm", "--paper"], "bloom"),
        ("xcopa", ["lm", "--pretraining", "xlm-r"], "xlm-r"),
    ],
)
def test_classes_are_of_the_model_that_runs(task: str, words: list[str], wanted: str) -> None:
    argv = ["--task", task, "--data", "d", "--arms", *words]
    run_py = RECIPE["run"]
    given = run_py.config.load(run_py.Settings, CONFIG, argv, "")
    assert given.pretrained_on() == wanted


def test_translate_train_learns_from_the_training_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def content(code: str) -> dict[str, Any]:
        words = ("apples grow", "rivers flow", "stars shine")
        qas = [[{"id": f"{p}", "question": f"what of {w}?"}] for p, w in enumerate(words)]
        contexts = [f"{w} here" for w in words]
        rows = [{"context": c, "qas": q} for c, q in zip(contexts, qas, strict=True)]
        return {"data": [{"paragraphs": rows}]}

    for code in ("en", "es"):
        lines(f"d/xquad/xquad.{code}.json", [content(code)])
    learnt: list[str] = []
    plain = arms.Ngrams

    def watched(texts: Any, *features: Any) -> Any:
        learnt.extend(texts)
        return plain(texts, *features)

    monkeypatch.setattr(arms, "Ngrams", watched)
    given = ("--smoke", "--task", "xquad", "--data", "d", "--languages", "all")
    chosen = ("--arms", "translate-train", "--translations", "es=command:cat")
    assert run(monkeypatch, *given, *chosen) == 0
    # paragraphs, never the questions that are tested; so the machine's are answered as well
    assert set(learnt) == {"apples grow here", "rivers flow here", "stars shine here"}
    assert results()["sides"]["translate-train"]["d"]["es"] == 0
    assert results()["classes"]["means"]["translate-train"]["high"] == 1


BAD = {
    "arm": (["--arms", "oracle"], "arms is 'oracle'; choose from majority"),
    "no arm for it": (["--arms", "lm"], "none of the arms can do articles; choose from majority"),
    "task": (["--task", "mnli"], "task is 'mnli'"),
    "word": (["--translations", "apertium"], "write LANGUAGE=KIND:REST"),
    "sizes": (["--pretraining", "bert"], "cannot read the pretraining sizes 'bert'"),
    "training pairs": (["--train-data", "x.tsv"], "articles does not learn from train_data"),
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
