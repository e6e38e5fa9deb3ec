"""The command line, from text to a quantised folder and on."""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from apiq_peft import ApiQConfig, preset, quantize
from apiq_peft.__main__ import main
from apiq_peft.samples import samples_of
from tests.apiq_peft._models import VOCABULARY, outputs, tiny, tokens

WRITTEN = ["adapter", "base", "report.csv", "report.png", "settings.json"]


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


SIZE = ("--samples", "4", "--length", "16", "--group-size", "32", "--rank", "4")


def quantised(model: Path, *more: str, out: str = "out") -> int:
    text, to = str(model.parent / "text.txt"), str(model.parent / out)
    return main(["quantize", str(model), to, "--text", text, *SIZE, *more])


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused in one line; give the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("apiq_peft: ")]
    assert len(lines) == 1
    return lines[0]


def same(one: Path, other: Path) -> bool:
    """Tell whether the adapters of two quantised folders are the same to the bit."""
    a, b = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_from_text_to_a_model_that_transformers_and_peft_load(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert quantised(model, "--preset", "fast", "--bits", "4") == 0
    out = model.parent / "out"
    assert sorted(p.name for p in out.iterdir()) == WRITTEN
    rows = list(csv.DictReader((out / "report.csv").open()))
    assert len([row for row in rows if row["layer"]]) == 14
    assert all(float(row["error_after"]) < float(row["error_before"]) for row in rows)
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    loaded = PeftModel.from_pretrained(base, str(out / "adapter"))
    wanted = outputs(loaded.eval(), tokens())

    text = str(model.parent / "text.txt")
    assert main(["evaluate", str(out), "--text", text, "--window", "16", "--limit", "3"]) == 0
    values = last_line(capsys)
    assert values["tokens"] == 45
    assert values["bits_per_weight"] == pytest.approx(4.625)
    files = {n: list((out / n).iterdir()) for n in ("base", "adapter")}
    for name, held in files.items():
        assert values[f"{name}_disk_bytes"] == sum(p.stat().st_size for p in held)

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

    assert "gptq_symmetric" in refused(
        capsys, "export", str(out), str(out / "v1"), "--format", "gptq"
    )
    assert not (out / "v1").exists()
    assert main(["export", str(out), str(model.parent / "v2"), "--format", "gptq_v2"]) == 0
    config = json.loads((model.parent / "v2" / "base" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


def test_inspect_reads_no_weights(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantised(model, "--preset", "fast", "--bits", "2") == 0

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    capsys.readouterr()
    assert main(["inspect", str(model.parent / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "model.layers.1.mlp.down_proj" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[1:] == ["128", "64", "2", "32", "2.5625", "4"]
    values = json.loads(lines[-1])
    assert (values["layers"], values["scheme"]) == (14, "asymmetric")
    assert main(["inspect", str(model.parent / "out" / "base")]) == 0
    assert last_line(capsys)["adapter_disk_bytes"] == 0
    assert "has no packed layers" in refused(capsys, "inspect", str(model))


@pytest.mark.parametrize("seed", [None, 3])
def test_the_samples_are_those_of_the_text(model: Path, seed: int | None) -> None:
    more = () if seed is None else ("--random-windows", str(seed))
    assert quantised(model, "--preset", "fast", *more) == 0
    text = (model.parent / "text.txt").read_text()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    samples = samples_of(text, tokenizer, 4, 16, seed)
    full = AutoModelForCausalLM.from_pretrained(model)
    config = ApiQConfig(bits=2, group_size=32, r=4, lora_alpha=16, task_type="CAUSAL_LM")
    expected, _ = quantize(full, samples, config, preset("fast"), show_progress=False)
    expected.save_pretrained(model.parent / "expected" / "adapter")
    assert same(model.parent / "out", model.parent / "expected")


def test_settings_are_written_and_can_be_given_again(model: Path) -> None:
    assert quantised(model, "--epochs", "1", "--lora-lr", "0.01", "--shuffle", "true") == 0
    record = model.parent / "out" / "settings.json"
    held = json.loads(record.read_text())
    assert held["model"] == str(model)
    assert held["versions"]["torch"] == version("torch")
    used = held["settings"]
    assert (used["bits"], used["group_size"], used["samples"]) == (2, 32, 4)
    assert (used["lora_lr"], used["shuffle"], used["seed"]) == (0.01, True, 2)

    again, other = str(model.parent / "again"), str(model.parent / "other")
    assert main(["quantize", str(model), again, "--config", str(record)]) == 0
    assert same(model.parent / "out", model.parent / "again")
    assert main(["quantize", str(model), other, "--config", str(record), "--seed", "5"]) == 0
    assert not same(model.parent / "out", model.parent / "other")
    assert json.loads((model.parent / "other" / "settings.json").read_text())["settings"] == {
        **used,
        "seed": 5,
    }


def test_a_preset_on_the_command_line_replaces_the_settings_of_a_file(model: Path) -> None:
    assert quantised(model, "--epochs", "1", "--lora-lr", "0.01", "--bits", "4") == 0
    record = str(model.parent / "out" / "settings.json")
    for out, more in (("fast", ()), ("seeded", ("--seed", "5"))):
        place = ["quantize", str(model), str(model.parent / out), "--config", record]
        assert main([*place, "--preset", "fast", *more]) == 0
        used = json.loads((model.parent / out / "settings.json").read_text())["settings"]
        assert (used["preset"], used["bits"], used["length"]) == ("fast", 4, 16)
        settings = {n: used[n] for n in asdict(preset("fast"))}
        assert settings == asdict(preset("fast", **({"seed": 5} if more else {})))


def test_by_default_samples_have_no_more_tokens_than_the_model_has_positions(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("gpt2").save_pretrained(model)
    text = ("--text", str(model.parent / "text.txt"))
    out, sizes = str(model.parent / "out"), ("--group-size", "32", "--rank", "4")
    run = ("quantize", str(model), out, *text, *sizes, "--samples", "2", "--preset", "fast")
    assert "the model has 64 positions" in refused(capsys, *run, "--length", "65")
    assert not Path(out).exists()
    assert main(run) == 0
    used = json.loads((Path(out) / "settings.json").read_text())["settings"]
    assert used["length"] == 64
    assert main(["evaluate", out, *text]) == 0
    assert last_line(capsys)["tokens"] == (400 // 64) * 63
    message = refused(capsys, "evaluate", out, *text, "--window", "65")
    assert "the model has 64 positions" in message


def test_options_in_yaml(model: Path) -> None:
    pytest.importorskip("yaml")
    config = model.parent / "options.yaml"
    config.write_text("bits: 4\npreset: fast\nlora_lr: 1e-3\ntarget_modules: [q_proj, v_proj]\n")
    assert quantised(model, "--config", str(config), "--bits", "3") == 0
    held = json.loads((model.parent / "out" / "settings.json").read_text())["settings"]
    assert (held["bits"], held["preset"], held["lora_lr"]) == (3, "fast", 1e-3)
    assert held["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("o.json", '{"bitz": 2}', "unknown options bitz; known are alpha, augment_loss,"),
        ("o.json", '{"bits": 5}', "bits is 5; choose from 2, 3, 4"),
        ("o.json", '{"samples": 2.5}', "samples is 2.5"),
        ("o.json", '{"shuffle": "perhaps"}', "'perhaps' is not true or false"),
        ("o.json", '{"bits": [2, 3]}', "give one value"),
        ("o.json", '{"target_modules": []}', "give one value"),
        ("o.json", "[2]", "holds a list"),
        ("o.json", "bits: 2", "is not JSON"),
        ("o.yaml", "bits: [", "is not YAML"),
    ],
)
def test_a_wrong_file_of_options_is_refused(
    model: Path, name: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    config = model.parent / name
    config.write_text(content)
    arguments = ("quantize", str(model), str(model.parent / "out"), "--config", str(config))
    assert message in refused(capsys, *arguments)
    assert not (model.parent / "out").exists()


def test_without_pyyaml_options_are_json(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (model.parent / "o.yaml").write_text("bits: 4")
    (model.parent / "o.json").write_text('{"bits": 4}')
    arguments = ("quantize", str(model), str(model.parent / "out"), *SIZE, "--preset", "fast")
    text = ("--text", str(model.parent / "text.txt"))
    complaint = refused(capsys, *arguments, *text, "--config", str(model.parent / "o.yaml"))
    assert "pip install pyyaml" in complaint
    assert main([*arguments, *text, "--config", str(model.parent / "o.json")]) == 0


def test_without_matplotlib_there_is_no_picture(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert quantised(model, "--preset", "fast") == 0
    assert "there is no report.png" in capsys.readouterr().err
    left = sorted(p.name for p in (model.parent / "out").iterdir())
    assert left == [name for name in WRITTEN if name != "report.png"]


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
    assert quantised(model, "--epochs", "1", out="whole") == 0
    assert same(out, model.parent / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "500"), "has 400 tokens, but 500 x 16 = 8000 are needed"),
        (("--random-windows", "1", "--length", "401"), "has 400 tokens, but 1 x 401 = 401"),
        (("--samples", "0"), "0 samples of 16 tokens"),
        (("--length", "0"), "4 samples of 0 tokens"),
        (("--bits", "5"), "argument --bits: invalid choice"),
        (("--group-size", "48"), "group_size 48 does not divide"),
        (("--rank", "0"), "rank is 0"),
        (("--target-modules", "nothing"), "match no module"),
        (("--warmup", "2"), "warmup is 2.0"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used here"),
        (("--device", "meta"), "device 'meta' cannot be used here"),
        (("--dtype", "int8"), "argument --dtype: invalid choice"),
        (("--text", "missing.txt"), "No such file or directory: 'missing.txt'"),
        (("--text", "."), "Is a directory"),
        (("--config", "missing.json"), "No such file or directory: 'missing.json'"),
        (("--unknown",), "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    model: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = str(model.parent / "text.txt"), str(model.parent / "out")
    complaint = refused(capsys, "quantize", str(model), out, "--text", text, *SIZE, *arguments)
    assert message in complaint
    assert not (model.parent / "out").exists()


def test_what_is_no_model_or_no_text_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, out = model.parent, str(model.parent / "out")
    text = ("--text", str(here / "text.txt"), *SIZE)
    assert "is no folder" in refused(capsys, "quantize", str(here / "none"), out, *text)
    assert "has no config.json" in refused(capsys, "quantize", str(here), out, *text)
    assert "--text is missing" in refused(capsys, "quantize", str(model), out)
    assert "has no base and adapter" in refused(capsys, "export", str(model), out)
    (here / "latin").write_bytes(b"\xff\xfe\x00")
    (here / "empty").write_text("")
    latin, empty = ("--text", str(here / "latin")), ("--text", str(here / "empty"))
    assert "is not UTF-8 text" in refused(capsys, "quantize", str(model), out, *latin)
    assert "has 0 tokens" in refused(capsys, "quantize", str(model), out, *empty)
    assert "has 0 tokens" in refused(capsys, "evaluate", str(model), *empty)
    assert not Path(out).exists()
    (model / "config.json").write_text("{")
    assert "config.json" in refused(capsys, "quantize", str(model), out, *text)
    assert not Path(out).exists()


def test_an_existing_model_is_not_overwritten(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantised(model, "--preset", "fast") == 0
    assert quantised(model, "--preset", "fast") == 2
    assert "exists; choose a new folder" in capsys.readouterr().err
    out, text = model.parent / "out", str(model.parent / "text.txt")
    for place in (out, out / "base"):
        again = ("quantize", str(place), str(out / "again"), "--text", text, *SIZE)
        assert "quantised already" in refused(capsys, *again)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_written(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(20_000):
        assert quantised(model, "--preset", "fast") == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("apiq_peft: ")
    assert "cannot be written" in complaint
    (left,) = (model.parent / "out").iterdir()
    assert left.name == "blocks"  # what the same command goes on from
    assert quantised(model, "--preset", "fast") == 0
    with small_disk(20_000):
        out = str(model.parent / "plain")
        assert main(["export", str(model.parent / "out"), out]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("apiq_peft: ")
    assert sorted(p.name for p in model.parent.iterdir()) == ["model", "out", "text.txt"]


def test_evaluate_against_the_original(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantised(model, "--preset", "fast", "--bits", "4") == 0
    text = ("--text", str(model.parent / "text.txt"), "--window", "16", "--limit", "2")
    out = str(model.parent / "out")
    capsys.readouterr()
    assert main(["evaluate", out, *text, "--original", str(model)]) == 0
    values = last_line(capsys)
    errors = values["activation_errors"]
    assert len(errors) == 14
    assert all(0 < error < 0.5 for error in errors.values())
    assert values["activation_error"] == pytest.approx(sum(errors.values()) / 14)
    complaint = refused(capsys, "evaluate", str(model), *text, "--original", str(model))
    assert "is for quantised folders" in complaint


def test_a_model_without_packed_layers_has_no_bits(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(model.parent / "text.txt")
    assert main(["evaluate", str(model), "--text", text, "--dtype", "bfloat16"]) == 0
    values = last_line(capsys)
    assert values["bits_per_weight"] is None
    assert values["other_bytes"] == 2 * sum(p.numel() for p in tiny().parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to measure; give --text, --tasks or both"),
        (("--text", "t", "--limit", "0"), "limit is 0"),
        (("--tasks", "t", "--batch-size", "0"), "batch_size is 0"),
        (("--tasks", "t", "--original", "m"), "--original needs --text"),
        (("--text", "t", "--include-path", "."), "--include-path is for --tasks"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "evaluate", "model", *arguments)


def test_tasks_without_the_harness_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    complaint = refused(capsys, "evaluate", "no such model", "--tasks", "piqa")
    assert "pip install 'road-apiq-peft[eval]'" in complaint


@pytest.mark.parametrize("command", ["quantize", "evaluate", "export", "inspect"])
def test_help_has_examples_of_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert told.partition("examples:")[2].count(f"python -m apiq_peft {command} ") >= 2
