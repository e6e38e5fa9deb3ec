"""The finetuning recipe, run as a script in this process: results, variants, and bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from recipes_peft import process, tiny
from tests.examples import _recipes

SCRIPT = _recipes.EXAMPLES / "road_titles" / "run.py"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    # The copied folder in test_recipes.py has the new process; here the check is a call.
    monkeypatch.setattr(process, "run_alone", lambda _, argv: run(*argv))


def run(*argv: str) -> int:
    return _recipes.run("road_titles", *argv)


def results() -> dict[str, Any]:
    return json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))


def test_it_learns_saves_reloads_and_merges(capsys: pytest.CaptureFixture[str]) -> None:
    learning = ("--steps", "40", "--learning-rate", "3e-2", "--lora-learning-rate", "3e-2")
    assert run("--smoke", *learning, "--variant", "road_2") == 0
    found = results()
    loss = {name: result["held_out_loss"] for name, result in found["results"].items()}
    assert loss["RoAd"] < loss["base"] - 0.3
    assert loss["LoRA"] < loss["base"] - 0.3
    assert found["check"]["merge_agrees"]
    assert all(found["promises"].values())
    # road_2 has a parameter pair for each output; half of them without the angle
    trained = {name: result["trained_parameters"] for name, result in found["results"].items()}
    outputs = 2 * (4 * 64 + 2 * 128 + 64)
    assert trained == {"base": 0, "RoAd": 2 * outputs, "LoRA": trained["LoRA"]}
    for name in ("road", "lora"):
        assert Path("demo-output", name, "adapter_model.safetensors").exists()
    for name in ("curves.csv", "curves.png", "check.json"):
        assert Path("demo-output", name).exists()
    shown = capsys.readouterr()
    assert "perplexity" in shown.out
    assert "held-out" in shown.err


def test_epochs_and_half_precision() -> None:
    # 30 examples, 6 epochs, batches of 32 in pieces of 8
    sizes = ("--epochs", "6", "--batch-size", "32", "--micro-batch-size", "8")
    Path("no-steps.yaml").write_text(
        re.sub("(?m)^  steps: .*", "  steps: null", SCRIPT.with_name("config.yaml").read_text())
    )
    given = ("--config", "no-steps.yaml", "--smoke", "--dtype", "bfloat16", *sizes)
    assert run(*given) == 0
    assert results()["settings"]["steps"] is None
    assert results()["settings"]["dtype"] == "bfloat16"
    assert results()["check"]["merge_agrees"]


def test_plain_text_and_a_choice_of_layers() -> None:
    Path("text.txt").write_text("\n\n".join(f"Line {i} and so on and on." for i in range(12)))
    chosen = ("--target-modules", "q_proj", "down_proj", "--group-size", "32")
    assert run("--smoke", "--steps", "1", "--data", "text.txt", *chosen) == 0
    assert results()["results"]["RoAd"]["trained_parameters"] == 2 * (64 + 64)


ROW = '{"prompt": "a", "answer": "b"}\n'

BAD = {
    "unknown model": (["--model", "nobody/nothing"], "cannot load the model 'nobody/nothing'"),
    "no data": (["--data", "nowhere.jsonl"], "cannot read the data nowhere.jsonl"),
    "empty data": (["--data", "empty.jsonl"], "empty.jsonl is empty"),
    "torn data": (["--data", "torn.jsonl"], "torn.jsonl, line 2 is not JSON"),
    "little data": (["--data", "little.jsonl"], "1 examples are too few"),
    "variant": (["--variant", "road_3"], "choose from road_1, road_2 or road_4; change --variant"),
    "odd group": (["--group-size", "7"], "group_size"),
    "large group": (
        ["--group-size", "128", "--target-modules", "q_proj"],
        "the adapter does not fit: ",
    ),
    "no group": (["--group-size", "0"], "group_size is 0; it must be above zero"),
    "module": (["--target-modules", "query"], "down_proj (64), gate_proj (128)"),
    "steps": (["--steps", "few"], "--steps is 'few'; it must be a whole number"),
    "no steps": (["--steps", "-1"], "steps is -1; it must be above zero"),
    "option": (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
    "no config": (["--config", "nowhere.yaml"], "cannot read the settings nowhere.yaml"),
    "no adapter": (["--check", "nowhere"], "nowhere holds no adapter"),
    "out": (["--out", "empty.jsonl"], "cannot write the results"),
    "dtype": (["--dtype", "int4"], "choose float32, bfloat16 or float16"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").write_text("")
    Path("torn.jsonl").write_text(ROW + "{oops\n")
    Path("little.jsonl").write_text(ROW)
    assert run("--smoke", *argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert said in line


def test_an_adapter_of_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--smoke", "--steps", "1") == 0
    tiny.save(Path("other"), layers=3)
    capsys.readouterr()
    assert run("--smoke", "--model", "other", "--check", "demo-output/road") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot load the adapter: ")
    assert "needs the model it was trained on" in line
