"""The comparison with RoAd, run as a script in this process: cells, going on, choices, promises."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from recipes_peft import loop
from tests.examples import _recipes

LITTLE = ("--smoke", "--steps", "2", "--evaluate-every", "1", "--seeds", "1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    _recipes.elsewhere(tmp_path, monkeypatch)
    with _recipes.beside("road_finetune"):
        yield


def run(*argv: str) -> int:
    return _recipes.run("road_finetune", *argv)


def results() -> dict[str, Any]:
    return json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))


def test_both_kinds_of_task_are_run_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*LITTLE, "--seeds", "2", "--arms", "base", "road_1", "road_2") == 0
    found = results()
    assert list(found["results"]) == ["pairs", "commonsense"]
    for task, arms in found["results"].items():
        assert list(arms) == ["base", "road_1", "road_2"]
        assert len(arms["base"]) == (2 if task == "pairs" else 1)  # untrained, so without a seed
        one, two = (arms[arm][0]["count"]["trained"] for arm in ("road_1", "road_2"))
        assert 0 < 2 * one == two
    points = found["results"]["pairs"]["road_1"][0]["points"]
    assert [point["step"] for point in points] == [1, 2]
    with open("demo-output/results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 + 5
    assert {row["learning_rate"] for row in rows if row["task"] == "pairs"} == {"0.005"}
    assert Path("demo-output/results.png").read_bytes()[1:4] == b"PNG"
    assert not list(Path("demo-output/cells").glob("*.safetensors"))
    shown = capsys.readouterr().out
    assert "yes  pairs: road_2 and road_4 train twice and four times as much, exactly" in shown


def test_what_is_there_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = importlib.import_module("finetune_cells")
    ran: list[str] = []
    once = cells.run

    def noted(cell: Any, *rest: Any) -> Any:
        ran.append(cell.name)
        return once(cell, *rest)

    monkeypatch.setattr(cells, "run", noted)
    argv = (*LITTLE, "--tasks", "pairs", "--arms")
    assert run(*argv, "road_1") == 0
    first = results()["results"]["pairs"]["road_1"]
    assert run(*argv, "road_1", "lora") == 0
    assert ran == ["pairs-road_1-0-0.005", "pairs-lora-0-0.005"]
    assert results()["results"]["pairs"]["road_1"] == first
    assert run(*argv, "road_1", "--max-length", "40") == 0  # another setting: again
    assert ran[2:] == ["pairs-road_1-0-0.005"]


def test_an_interrupted_cell_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, saves = loop.fit, []

    def often(*given: Any, **named: Any) -> Any:
        saves.append(given[7])
        return fit(*given, **named, save_every=0.0)

    monkeypatch.setattr(loop, "fit", often)
    cells = importlib.import_module("finetune_cells")
    predict, calls = cells.predict, []

    def interrupted(*given: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*given)

    argv = (*LITTLE, "--steps", "4", "--tasks", "pairs", "--arms", "road_1", "--out")
    assert run(*argv, "whole") == 0
    monkeypatch.setattr(cells, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*argv, "halves")
    assert [file.suffix for file in Path("halves/cells").iterdir()] == [".safetensors"]
    monkeypatch.setattr(cells, "predict", predict)
    assert run(*argv, "halves") == 0
    (kept,) = Path("halves/cells").iterdir()
    whole, halves = (
        json.loads(Path(folder, "cells", kept.name).read_text())["outcome"]
        for folder in ("whole", "halves")
    )
    for outcome in (whole, halves):
        outcome.pop("seconds")
        outcome["points"] = [{**point, "seconds": 0} for point in outcome["points"]]
    assert halves == whole


def test_validation_chooses_the_learning_rate() -> None:
    rates = ("--learning-rates", "1e-6", "3e-2", "--steps", "24", "--evaluate-every", "12")
    assert run(*LITTLE, *rates, "--tasks", "commonsense", "--arms", "road_4", "lora") == 0
    for arm in ("road_4", "lora"):
        cells = [
            json.loads(file.read_text(encoding="utf-8"))["outcome"]
            for file in sorted(Path("demo-output/cells").glob(f"commonsense-{arm}-*.json"))
        ]
        assert len(cells) == 2
        (kept,) = results()["results"]["commonsense"][arm]
        assert kept["valid"] == max(outcome["valid"] for outcome in cells)


def test_the_best_checkpoint_is_tested_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = importlib.import_module("finetune_cells")
    glue = importlib.import_module("glue_protocol")
    scores = iter([0.9, 0.2, 0.4])  # of the points, then of the test
    weights: list[Any] = []
    predict = cells.predict

    def seen(model: Any, *rest: Any) -> Any:
        weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        return predict(model, *rest)

    task = glue.Task(("question", "passage"), metric=lambda *_: next(scores))
    monkeypatch.setitem(glue.TASKS, "pairs", task)
    monkeypatch.setattr(cells, "predict", seen)
    assert run(*LITTLE, "--tasks", "pairs", "--arms", "road_1") == 0
    (kept,) = results()["results"]["pairs"]["road_1"]
    assert (kept["valid"], kept["test"]) == (0.9, {"pairs": 0.4})
    assert kept["valid_loss"] == kept["points"][0]["held_out_loss"]
    first, last, tested = weights
    assert all(map(lambda a, b: a.equal(b), tested, first))
    assert not all(map(lambda a, b: a.equal(b), tested, last))


GLUE_ROWS = {
    "cola": lambda i: {"sentence": f"s {i}", "label": i % 2},
    "stsb": lambda i: {"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i / 4},
    "mrpc": lambda i: {"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2},
    "rte": lambda i: {"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2},
}


def test_the_settings_of_the_paper_for_glue() -> None:
    for task, row in GLUE_ROWS.items():
        Path("glue", task).mkdir(parents=True)
        for name, size in (("train", 64), ("validation", 12)):
            lines = "".join(json.dumps(row(i)) + "\n" for i in range(size))
            Path("glue", task, f"{name}.jsonl").write_text(lines)
    less = ("--epochs", "1", "--seeds", "1", "--learning-rates", "3e-3", "--arms", "road_1", "full")
    argv = ("--paper-glue-small", "--encoder", "tiny", "--glue", "glue")
    assert run(*argv, *less) == 0
    found = results()
    assert set(found["results"]) == set(GLUE_ROWS)
    for arms in found["results"].values():
        points = arms["road_1"][0]["points"]
        assert [point["step"] for point in points] == [2]  # an epoch of 64 in batches of 32
    settings = found["settings"]["classification"]
    assert (settings["batch_size"], settings["group_size"]) == (32, 2)


@pytest.mark.parametrize("task", ["commonsense", "arithmetic"])
def test_the_settings_of_the_paper_for_answers(task: str) -> None:
    names = {"commonsense": ("boolq", "true"), "arithmetic": ("gsm8k", "4.0")}
    dataset, answer = names[task]
    rows = [
        {"instruction": f"q {i}", "input": "", "output": f"It is {answer}", "answer": answer}
        for i in range(16)
    ]
    Path("train.json").write_text(json.dumps(rows))
    Path("sets", dataset).mkdir(parents=True)
    Path("sets", dataset, "test.json").write_text(json.dumps(rows[:3]))
    argv = ("--data", "train.json", "--test-data", "sets", "--max-new-tokens", "3", "--epochs", "1")
    less = (
        "--seeds",
        "1",
        "--learning-rates",
        "3e-3",
        "--arms",
        "road_1",
        "lora",
        "--lora-rank",
        "4",
    )
    assert run(f"--paper-{task}", "--model", "tiny", *argv, *less) == 0
    found = results()
    outcome = found["results"][task]["road_1"][0]
    assert outcome["test"] == {dataset: 0.0}
    settings = found["settings"]["answers"]
    assert (settings["dtype"], settings["max_length"]) == ("bfloat16", 512)


# ---- what the numbers add up to -----------------------------------------------------------------


def outcome(score: float, trained: int, loss: float = 1.0) -> Any:
    cells = importlib.import_module("finetune_cells")
    count = importlib.import_module("finetune_arms").Count(trained, 10, 1_000_010)
    return cells.Outcome(score, loss, {"t": score}, count, 1.0, [loop.Point(1, 1.0, 1.0, loss, 0)])


def made(task: str, arms: dict[str, list[Any]]) -> Any:
    cell = importlib.import_module("finetune_cells").Cell
    return {
        task: {
            arm: [(cell(task, arm, seed, 3e-3), one) for seed, one in enumerate(outcomes)]
            for arm, outcomes in arms.items()
        }
    }


def test_means_deviations_and_averages() -> None:
    sums = importlib.import_module("finetune_results")
    rte = made(
        "rte", {"road_1": [outcome(s, 9) for s in (0.7, 0.8, 0.9)], "lora": [outcome(0.5, 9)]}
    )
    cola = made("cola", {"road_1": [outcome(0.6, 9)]})
    assert sums.in_points(rte["rte"]["road_1"]) == "80.0 (10.0)"
    assert sums.in_points(cola["cola"]["road_1"]) == "60.0"
    assert sums.averages(rte | cola, ["rte", "cola"]) == {"road_1": pytest.approx(70.0)}
    assert sums.averages({}, []) == {}


def test_promises_follow_from_the_numbers() -> None:
    sums = importlib.import_module("finetune_results")
    good = made(
        "rte",
        {
            "road_1": [outcome(0.80, 900)],
            "road_4": [outcome(0.80, 3600)],
            "lora": [outcome(0.825, 9000)],
            "full": [outcome(0.829, 10**6)],
        },
    )
    assert sums.promises(good) == {
        "road_1 is at most 3 points below full finetuning on average": True,
        "road_1 is at most 3 points below LoRA on average": True,
        "road_1 trains less than 0.1 % of the encoder": True,
        "rte: road_2 and road_4 train twice and four times as much, exactly": True,
    }
    bad = made(
        "rte",
        {
            "road_1": [outcome(0.80, 1000)],
            "road_4": [outcome(0.80, 3600)],
            "lora": [outcome(0.835, 9000)],
            "full": [outcome(0.835, 10**6)],
        },
    )
    assert list(sums.promises(bad).values()) == [False] * 4
    text = {"base": [outcome(0.0, 0, 4.0)], "road_1": [outcome(0.5, 9, 1.9)],
            "road_2": [outcome(0.3, 18, 2.0)], "lora": [outcome(0.49, 99, 1.0)]}  # fmt: skip
    half = "commonsense: each RoAd at least halves the untrained loss"
    near = "commonsense: RoAd's mean is at most 10 points below LoRA"
    found = sums.promises(made("commonsense", text))
    assert (found[half], found[near]) == (True, True)
    text |= {"road_1": [outcome(0.4, 9, 2.1)], "lora": [outcome(0.46, 99, 1.0)]}
    found = sums.promises(made("commonsense", text))
    assert (found[half], found[near]) == (False, False)


BAD = {
    "task": (["--tasks", "poetry"], "tasks is 'poetry'; choose from pairs, cola"),
    "arm": (["--arms", "road_3"], "arms is 'road_3'; choose from base, road_1"),
    "rate": (["--learning-rates", "fast"], "learning_rates has 'fast'; give numbers above zero"),
    "no rate": (["--learning-rates", "0"], "learning_rates has '0'; give numbers above zero"),
    "group": (["--group-size", "48"], "road_1 does not fit: "),
    "no data": (["--tasks", "commonsense", "--data", "no.json"], "cannot read the data no.json"),
    "no sets": (["--tasks", "commonsense", "--test-data", "."], ". has no NAME/test.json"),
    "bitfit": (["--tasks", "commonsense", "--arms", "bitfit"], "this model has none; leave it out"),
    "no encoder": (["--encoder", "nowhere"], "cannot load the encoder 'nowhere'"),
    "torn": (["--out", "torn"], "pairs-road_1-0-0.005.json is torn"),
    "out": (["--out", "file"], "cannot write the results"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    Path("torn/cells").mkdir(parents=True)
    Path("torn/cells/pairs-road_1-0-0.005.json").write_text("{")
    arms = () if "--arms" in argv else ("--arms", "road_1")
    assert run(*LITTLE, *arms, *argv) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("error: ")
    assert said in line
