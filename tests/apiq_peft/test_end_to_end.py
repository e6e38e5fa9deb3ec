"""The last pass over the whole model, in memory and block by block."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from apiq_peft import (
    ApiQConfig,
    Calibration,
    CalibrationError,
    preset,
    quantize,
    quantize_folder,
)
from apiq_peft.calibration.processes import Processes
from tests.apiq_peft._models import KINDS, VOCABULARY

MODULE = import_module("apiq_peft.quantize")  # whose function hides it
CONFIG = {"bits": 2, "group_size": 32, "r": 4, "lora_alpha": 4}


def _samples() -> Tensor:
    return torch.randint(0, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(3))


def _settings(epochs: int = 4, **more: Any) -> Calibration:
    more = {"closed_form": "none", "final_lr": 1e-2} | more  # leave the last pass something to do
    return preset("fast", final_epochs=epochs, **more)


def _divergence(model: Any, full: Any, samples: Tensor) -> float:
    with torch.no_grad():
        found, wanted = (
            F.log_softmax(m(input_ids=samples).logits, -1).flatten(0, 1) for m in (model, full)
        )
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def _model(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def test_the_last_pass_brings_the_predictions_nearer_to_those_of_full_precision() -> None:
    full, samples = _model(), _samples()
    plain, _ = quantize(_model(), samples, ApiQConfig(**CONFIG), _settings(0), show_progress=False)
    low, reports = quantize(
        _model(), samples, ApiQConfig(**CONFIG), _settings(), show_progress=False
    )
    losses = reports[-1].losses["end to end"]
    assert losses[-1] < losses[0]
    start = _divergence(plain.eval(), full, samples)
    assert _divergence(low.eval(), full, samples) < 0.8 * start


def test_the_losses_are_the_divergences_of_the_model_as_it_is() -> None:
    samples = _samples()
    low, reports = quantize(
        _model(),
        samples,
        ApiQConfig(**CONFIG),
        _settings(1, final_lr=0.0),
        show_progress=False,
    )
    expected = _divergence(low.eval(), _model(), samples)
    assert reports[-1].losses["end to end"] == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
def test_it_works_on_other_kinds_of_models(kind: str) -> None:
    _, reports = quantize(
        _model(kind), _samples(), ApiQConfig(**CONFIG), _settings(), show_progress=False
    )
    losses = reports[-1].losses["end to end"]
    assert losses[-1] < losses[0]


def test_padding_is_not_learnt_from() -> None:
    samples = _samples()
    mask = torch.ones_like(samples)
    mask[:, 8:] = 0
    noisy = samples.clone()
    noisy[:, 8:] = 7  # behind every real token, and causal: only a loss could see it

    def factors(ids: Tensor) -> dict[str, Tensor]:
        batches = [{"input_ids": ids, "attention_mask": mask}]
        low, _ = quantize(
            _model(), batches, ApiQConfig(**CONFIG), _settings(2), show_progress=False
        )
        return {n: p for n, p in low.named_parameters() if ".lora_" in n}

    first, second = factors(samples), factors(noisy)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4)


def test_block_by_block_from_a_folder_it_gives_the_same(tmp_path: Path) -> None:
    samples = _samples()
    _model().save_pretrained(tmp_path / "full")
    low, _ = quantize(_model(), samples, ApiQConfig(**CONFIG), _settings(2), show_progress=False)
    low.save_pretrained(tmp_path / "memory")
    quantize_folder(
        tmp_path / "full",
        tmp_path / "out",
        samples,
        ApiQConfig(**CONFIG),
        _settings(2),
        show_progress=False,
    )
    name = "adapter_model.safetensors"
    expected, found = (
        load_file(tmp_path / "memory" / name),
        load_file(tmp_path / "out/adapter" / name),
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(samples).logits, low.eval()(samples).logits, rtol=1e-4, atol=1e-5
        )


def test_a_model_without_a_head_is_refused_before_the_work() -> None:
    model = _model("bert")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="no head that predicts tokens"):
        quantize(model, _samples(), ApiQConfig(**CONFIG), _settings(), show_progress=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_a_loss_that_is_not_finite_says_so() -> None:
    model = _model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="last pass is nan in epoch 1, step 1"):
        quantize(model, _samples(), ApiQConfig(**CONFIG), _settings(), show_progress=False)


@pytest.mark.parametrize("moved", [False, True])
def test_a_last_pass_that_fails_leaves_the_blocks_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    _model().save_pretrained(tmp_path / "full")

    def run(out: str, settings: Calibration) -> Any:
        place = (tmp_path / "full", tmp_path / out, _samples(), ApiQConfig(**CONFIG))
        return quantize_folder(*place, settings, show_progress=False)

    def interrupted(*_: Any) -> None:
        raise CalibrationError("the loss of the last pass is nan")

    with monkeypatch.context() as patch:
        if moved:  # the adapter of the first pass is in its place, the base is not yet
            patch.setattr(os, "replace", _all_but("base", os.replace, interrupted))
        else:
            patch.setattr(MODULE, "end_to_end", interrupted)
        with pytest.raises(CalibrationError, match="last pass"):
            run("out", _settings(1))
    assert (tmp_path / "out/adapter").exists() == moved
    reports = run("out", _settings(2, final_lr=1e-3))
    assert all(report.resumed for report in reports)
    run("whole", _settings(2, final_lr=1e-3))
    name = "adapter/adapter_model.safetensors"
    found, wanted = (load_file(tmp_path / out / name) for out in ("out", "whole"))
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def _all_but(name: str, real: Any, other: Any) -> Any:
    return lambda a, b: (other if Path(b).name == name else real)(a, b)


def test_a_folder_that_some_process_does_not_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(Processes):
        """The second of two, on another node."""

        def from_first(self, action: Any) -> Any:
            return None

        def add(self, tensors: Any) -> None:
            pass

    monkeypatch.setattr(MODULE, "_PATIENCE", 0.0)
    monkeypatch.setattr(Processes, "running", lambda: Elsewhere(1, 2))
    _model().save_pretrained(tmp_path / "full")
    run = (tmp_path / "full", tmp_path / "out", _samples(), ApiQConfig(**CONFIG), _settings(1))
    with pytest.raises(ValueError, match="file system that all nodes share, or set final_epochs"):
        quantize_folder(*run, show_progress=False)
