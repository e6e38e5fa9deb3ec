"""The command line, from text to a quantised folder and on."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from apiq_peft.__main__ import main
from tests.apiq_peft._models import VOCABULARY, outputs, tiny, tokens


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny().save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in tokens(1, 400)[0].tolist()))
    return folder


def quantised(model: Path, *more: str) -> int:
    text, out = str(model.parent / "text.txt"), str(model.parent / "out")
    size = ("--samples", "4", "--length", "16", "--group-size", "32", "--rank", "4")
    return main(["quantize", str(model), out, "--text", text, *size, *more])


def test_from_text_to_a_model_that_transformers_and_peft_load(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantised(model, "--preset", "fast", "--bits", "4") == 0
    out = model.parent / "out"
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "base", "report.csv"]
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert len(rows) == 14
    assert all(float(row["error_after"]) < 1 for row in rows)
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    loaded = PeftModel.from_pretrained(base, str(out / "adapter"))
    wanted = outputs(loaded.eval(), tokens())

    text = str(model.parent / "text.txt")
    assert main(["evaluate", str(out), "--text", text, "--window", "16", "--limit", "3"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["tokens"] == 45
    assert values["bits_per_weight"] == pytest.approx(4.625)
    assert main(["evaluate", str(model), "--text", text, "--window", "16"]) == 0

    assert main(["inspect", str(out)]) == 0
    assert "model.layers.0.mlp.up_proj" in capsys.readouterr().out

    plain = model.parent / "plain"
    assert main(["export", str(out), str(plain), "--dtype", "float32"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(plain / "base")
    again = PeftModel.from_pretrained(exported, str(plain / "adapter")).eval()
    assert torch.allclose(outputs(again, tokens()), wanted, atol=1e-4)
    script = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(plain / 'base')!r});"
        f"m = PeftModel.from_pretrained(m, {str(plain / 'adapter')!r}).merge_and_unload();"
        "assert 'apiq_peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_interrupted_and_repeated(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apiq_peft.calibration import block

    fit = block.fit

    def killed(where: str, *rest: object) -> list[float]:
        if where == "model.layers.1":
            raise KeyboardInterrupt
        return fit(where, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(block, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        quantised(model, "--epochs", "1")
    out = model.parent / "out"
    assert [p.name for p in out.iterdir()] == ["blocks"]
    monkeypatch.setattr(block, "fit", fit)
    assert quantised(model, "--epochs", "1") == 0
    assert not (out / "blocks").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "500"), "has 400 tokens, but 500 samples of 16 need 8000"),
        (("--group-size", "48"), "group_size 48 does not divide"),
        (("--target-modules", "nothing"), "match no module"),
        (("--warmup", "2"), "warmup is 2.0"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    model: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantised(model, *arguments) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert "Traceback" not in complaint
    assert not (model.parent / "out" / "base").exists()


def test_text_that_is_not_utf8_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model.parent / "text.txt").write_bytes(b"\xff\xfe\x00")
    assert quantised(model) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_an_existing_model_is_not_overwritten(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantised(model, "--preset", "fast") == 0
    assert quantised(model, "--preset", "fast") == 2
    assert "exists; choose a new folder" in capsys.readouterr().err
