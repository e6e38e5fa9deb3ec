"""The ApiQ recipe, run as a script in this process: tasks, settings of the paper, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import apiq_peft
from recipes_peft import process, tiny
from tests.examples import _recipes

SMALL = ("--calibration-samples", "2", "--calibration-length", "16", "--calibration-epochs", "1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    # The copied folder in test_recipes.py has the new process; here the check is a call.
    monkeypatch.setattr(process, "run_alone", lambda _, argv: run(*argv))


def run(*argv: str) -> int:
    return _recipes.run("apiq_finetune", *argv)


def results() -> dict[str, Any]:
    return json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))


def questions(name: str, count: int, first: int) -> str:
    """Write additions as GSM8K has them; gives the name of the file."""
    rows = [
        {"question": f"{i} + {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>.\n#### {2 * i}"}
        for i in range(first, first + count)
    ]
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return name


def test_starts_are_compared_and_the_model_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--smoke", "--steps", "20", "--learning-rate", "1e-2") == 0
    found = results()
    assert list(found["results"]) == ["full", "data-free", "closed-form", "apiq"]
    for pair in found["results"].values():
        assert pair["after"]["held_out_loss"] < pair["before"]["held_out_loss"]
        assert pair["after"]["exact_match"] is None
    counts = {pair["after"]["trained_parameters"] for pair in found["results"].values()}
    assert len(counts) == 1
    assert set(found["bits"]) == {"data-free", "closed-form", "apiq"}
    assert found["bits"]["apiq"]["bits"] == pytest.approx(2.5625)  # groups of 32
    assert len(found["promises"]) == 3
    assert found["promises"]["the reloaded model has the same logits"]
    for name in ("curves.csv", "curves.png"):
        assert Path("demo-output", name).exists()
    base = AutoModelForCausalLM.from_pretrained("demo-output/apiq/base")
    loaded = PeftModel.from_pretrained(base, "demo-output/apiq/adapter")
    assert isinstance(loaded.peft_config["default"], apiq_peft.ApiQConfig)
    where = loaded.peft_config["default"].base_model_name_or_path
    assert Path(where) == Path("demo-output/apiq/base").resolve()
    assert "perplexity" in capsys.readouterr().out
    assert run("--smoke", "--starts", "full", "--steps", "1") == 0  # over the results of before
    assert results()["promises"] == {}


def test_a_model_that_comes_back_changed_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(_: str, argv: list[str]) -> int:
        file = Path("demo-output/apiq/adapter/adapter_model.safetensors")
        save_file({n: t + 1e-2 for n, t in load_file(file).items()}, file, {"format": "pt"})
        return run(*argv)

    monkeypatch.setattr(process, "run_alone", spoilt)
    assert run("--smoke", "--starts", "apiq", "--steps", "1") == 1
    assert results()["promises"] == {"the reloaded model has the same logits": False}


def test_calibration_sees_the_data_to_train_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    quantize = apiq_peft.quantize

    def noted(model: Any, samples: torch.Tensor, *rest: Any) -> Any:
        seen.append(samples)
        return quantize(model, samples, *rest)

    monkeypatch.setattr(apiq_peft, "quantize", noted)
    Path("train.txt").write_text("\n\n".join(["aaaa bbbb"] * 12))
    Path("test.txt").write_text("\n\n".join(["zzzz yyyy"] * 12))
    argv = ("--smoke", "--steps", "1", "--data", "train.txt", "--test-data", "test.txt")
    assert run(*argv, "--starts", "closed-form", "apiq") == 0
    assert [samples.shape for samples in seen] == [(4, 16)] * 2
    for samples in seen:
        assert set(tiny.tokenizer().decode(samples.flatten().tolist())) == set("ab \n")


def test_answers_are_compared_as_numbers_or_as_text() -> None:
    train, test = questions("train.jsonl", 12, 0), questions("test.jsonl", 4, 100)
    argv = ("--smoke", "--steps", "1", "--data", train, "--test-data", test)
    assert run(*argv, "--task", "arithmetic", "--starts", "apiq") == 0
    found = results()["results"]["apiq"]
    assert len(found["after"]["answers"]) == 4
    assert found["before"]["exact_match"] == 0.0
    assert run(*argv, "--task", "classification", "--starts", "data-free") == 0
    assert results()["results"]["data-free"]["after"]["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("section", "schedule", "decay", "batch"),
    [
        ("wikitext", "cosine", 0.1, 64),
        ("gsm8k", "cosine", 0.1, 8),
        ("arithmetic", "linear", 0.0, 16),
    ],
)
def test_the_settings_of_the_paper_run(
    section: str, schedule: str, decay: float, batch: int
) -> None:
    train, test = questions("train.jsonl", 12, 0), questions("test.jsonl", 4, 100)
    less = ("--max-length", "48", "--max-new-tokens", "2", "--rank", "4")
    argv = ("--model", "tiny", "--data", train, "--test-data", test, *SMALL, *less)
    assert run(f"--paper-{section}", *argv) == 0
    settings = results()["settings"]
    assert (settings["schedule"], settings["weight_decay"]) == (schedule, decay)
    assert (settings["batch_size"], settings["dtype"]) == (batch, "bfloat16")
    assert results()["promises"] == {"the reloaded model has the same logits": True}


BAD = {
    "task": (["--task", "poetry"], "task is 'poetry'; choose from lm, classification, arithmetic"),
    "start": (["--starts", "full", "gptq"], "starts is 'gptq'; choose from full, data-free"),
    "preset": (["--preset", "worst"], "preset is 'worst'; choose from apiq-bw"),
    "bits": (["--bits", "5"], "bits is 5; choose from 2, 3, 4"),
    "odd group": (["--group-size", "48"], "the settings do not fit: "),
    "schedule": (["--schedule", "wavy"], "schedule is 'wavy'; choose from linear"),
    "no steps": (["--steps", "0"], "steps is 0; it must be above zero"),
    "decay": (["--weight-decay", "-1"], "weight_decay is -1.0; it must be zero or above"),
    "no data": (["--data", "nowhere.txt"], "cannot read the data nowhere.txt"),
    "no test": (["--test-data", "nowhere.txt"], "cannot read the data nowhere.txt"),
    "samples": (["--calibration-samples", "999"], "999 samples of 16 need 15984"),
    "windows": (["--max-length", "5000"], "the data fills no window"),
    "no model": (["--check", "nowhere"], "cannot load the model 'nowhere/base'"),
    "out": (["--out", "empty.txt"], "cannot write the results"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("")
    assert run("--smoke", *argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert said in line
