"""Weights of one dtype, arithmetic in another: biases and norms follow, and come back."""

from __future__ import annotations

import pytest
import torch

from apiq_peft import ApiQConfig, Calibration, quantize
from tests.apiq_peft._models import outputs, tiny, tokens


@pytest.mark.parametrize(("weights", "compute"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("kind", ["qwen2", "opt", "gpt2", "roberta", "bart"])
def test_layers_with_a_bias_are_calibrated_in_another_dtype(
    kind: str, weights: str, compute: str
) -> None:
    model = tiny(kind).to(getattr(torch, weights))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    settings = Calibration(epochs=1, batch_size=4, compute_dtype=compute, closed_form="start")
    config = ApiQConfig(bits=4, group_size=32, r=4)
    found, reports = quantize(model, tokens(4), config, settings, show_progress=False)
    assert all(report.error_after < report.error_before for report in reports)
    assert torch.isfinite(outputs(found.eval(), tokens(2))).all()
    biases = {n.replace(".base_layer", ""): p for n, p in found.named_parameters()}
    assert before
    assert all(torch.equal(biases[f"base_model.model.{n}"], bias) for n, bias in before.items())
