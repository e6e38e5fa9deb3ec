"""Perplexity against sums written out, and sizes against files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from apiq_peft import ApiQConfig
from apiq_peft.evaluation import perplexity, size_of
from tests.apiq_peft._models import tiny, tokens


def nats(model, ids: Tensor, first: int) -> tuple[float, int]:
    """Sum the surprise of the tokens from `first` on, one by one."""
    with torch.no_grad():
        logs = model(input_ids=ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
    picked = [-logs[i - 1, ids[i]].item() for i in range(first, len(ids))]
    return sum(picked), len(picked)


TEXT = tokens(1, 50)[0]


def test_windows_side_by_side() -> None:
    model = tiny()
    found = perplexity(model, TEXT, 12)
    parts = [nats(model, TEXT[start : start + 12], 1) for start in range(0, 48, 12)]
    assert found.tokens == sum(count for _, count in parts) == 44
    assert found.value == pytest.approx(math.exp(sum(n for n, _ in parts) / 44), rel=1e-5)


def test_the_limit_keeps_the_right_denominator() -> None:
    model = tiny()
    found = perplexity(model, TEXT, 12, limit=2)
    parts = [nats(model, TEXT[start : start + 12], 1) for start in (0, 12)]
    assert found.tokens == 22
    assert found.value == pytest.approx(math.exp(sum(n for n, _ in parts) / 22), rel=1e-5)


def test_overlapping_windows_predict_every_token_once() -> None:
    model = tiny()
    found = perplexity(model, TEXT, 12, stride=4)
    total, counted, end = 0.0, 0, 1
    for start in range(0, 49, 4):
        part = TEXT[start : start + 12]
        first = max(1, end - start)
        if len(part) <= first:
            continue
        more, count = nats(model, part, first)
        total, counted, end = total + more, counted + count, start + len(part)
    assert found.tokens == counted == 49
    assert found.value == pytest.approx(math.exp(total / 49), rel=1e-5)


def test_a_text_shorter_than_a_window() -> None:
    assert perplexity(tiny(), TEXT[:5], 12).tokens == 4


def test_training_mode_is_restored() -> None:
    model = tiny().train()
    perplexity(model, TEXT, 12)
    assert model.training


@pytest.mark.parametrize(
    ("ids", "window", "stride", "message"),
    [
        (TEXT[:1], 4, None, "at least two"),
        (TEXT.view(1, -1), 4, None, "in one row"),
        (TEXT, 1, None, "window 1"),
        (TEXT, 4, 5, "stride 5"),
    ],
)
def test_nonsense_is_refused(ids: Tensor, window: int, stride: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(tiny(), ids, window, stride)


@pytest.mark.parametrize(("bits", "wanted"), [(2, 2.5625), (3, 3.59375), (4, 4.625)])
def test_bits_are_those_of_the_formula_and_of_the_file(
    tmp_path: Path, bits: int, wanted: float
) -> None:
    model = get_peft_model(tiny(), ApiQConfig(bits=bits, group_size=32, r=8))
    size = size_of(model)
    assert size.bits_per_weight == pytest.approx(wanted)  # b + 16 / g + b / g
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert size.bits_with_adapters == pytest.approx(wanted + 16 * lora / size.weights)
    model.unload().save_pretrained(tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert size.packed_bytes + size.other_bytes == pytest.approx(on_disk, rel=0.1)
