"""The recipe's arms and runs: mixed batches, learning, files, going on, sentences for mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from recipes_peft import errors
from tests.examples._recipes import elsewhere
from tests.examples.test_cross_lingual_transfer import RECIPE
from tests.examples.test_cross_lingual_transfer_data import settings, squad

arms, prepare = RECIPE.arms, RECIPE.prepare
Answer, Row = RECIPE.parallel_pairs.Answer, RECIPE.parallel_pairs.Row


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(tmp_path, monkeypatch)


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return errors.run(RECIPE.run.main)


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


def learnt(task: Any, rows: list[Any], steps: int) -> Any:
    """Train every weight on the rows in one batch; give the model."""
    model = task.load(0)[0]  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = task.join(task.rows(rows))
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_classes_that_were_learnt_are_given() -> None:
    data = prepare.prepare(settings())
    task = RECIPE.classifying.Classifying(SimpleNamespace(**OPTIONS), data)
    rows = data.train.cell("l", "l")[:4]
    model = learnt(task, rows, 40)
    loss, right = task.measured(model, rows)
    assert (right, loss < 0.1) == (1, True)
    assert task.predict(model, rows, ["full"]) == {"full": [row.target for row in rows]}


def test_answers_that_were_learnt_are_given_as_text() -> None:
    given = SimpleNamespace(**{**OPTIONS, "max_length": 24, "stride": 4})
    task = RECIPE.answering.Answering(given, None)
    # longer than a window, and the second answer is found in the second one
    texts = ["a cat and b", "a dog and an owl ran far"]
    rows = [
        Row(i, text, "?", Answer(word, text.index(word)))
        for i, (text, word) in enumerate(zip(texts, ("cat", "far"), strict=True))
    ]
    assert [window.row for window in task.rows(rows)] == [0, 1, 1]
    model = learnt(task, [rows[0]], 40)
    assert task.measured(model, rows[:1])[1] == 1
    assert task.predict(model, rows[:1], ["full"]) == {"full": ["cat"]}
    second = task.rows(rows)[2]
    assert second.first > 0
    assert (
        task.segments.text(texts[1]).offsets[second.begin][0] + second.first - second.joined.second
        == 21
    )


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
    assert found["differences"] == {}  # without lora and full
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


def test_differences_of_arms_are_shown_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, *SMALL, "--seeds", "2", "--once", "lora") == 0
    found = json.loads(Path("demo-output/results.json").read_text())
    assert list(found["differences"]) == ["road - lora"]
    values = found["differences"]["road - lora"]
    assert values["seeds"] == [0]
    means = [found["arms"][arm][0]["metrics"]["accuracy"]["means"] for arm in ("road", "lora")]
    for of in ("within", "across", "gap"):
        low, high = values[of]["95"]
        assert low <= values[of]["difference"] <= high
        assert values[of]["difference"] == pytest.approx(means[0][of] - means[1][of])
    assert "differences in accuracy" in capsys.readouterr().out


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
