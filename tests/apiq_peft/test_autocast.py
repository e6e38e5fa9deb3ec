"""Adapted packed layers under autocast: what PEFT's LoRA on an ordinary layer gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from apiq_peft import ApiQConfig, ApiQLinear, dequantize
from apiq_peft.layer import pack_layer
from tests.apiq_peft._models import tiny, tokens
from tests.helpers import assert_close

GRID: dict[str, Any] = {"bits": 4, "group_size": 32}


def pair(dtype: torch.dtype) -> tuple[Any, Any]:
    """Give a packed layer and one with its weight written out, both with the same LoRA."""
    torch.manual_seed(0)
    base = pack_layer(nn.Linear(64, 96).to(dtype), 4, 32, "asymmetric")
    plain = nn.Linear(64, 96).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(base.weight)
        plain.bias.copy_(base.bias)  # type: ignore[arg-type]
    config = LoraConfig(r=4, init_lora_weights=False)
    packed = ApiQLinear(base, "default", config=config, r=4, lora_alpha=8)
    lora = LoraLinear(plain.requires_grad_(False), "default", config=config, r=4, lora_alpha=8)
    lora.lora_A, lora.lora_B = (copy.deepcopy(m) for m in (packed.lora_A, packed.lora_B))
    return packed, lora


def run(layer: Any, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
    y.float().square().sum().backward()
    grads = [x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    assert all(grad is not None for grad in grads)
    return [y, *grads]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [2, 40])
def test_the_layer_is_peft_s(
    rows: int, training: bool, base: torch.dtype, dtype: torch.dtype
) -> None:
    packed, lora = (layer.train(training) for layer in pair(base))
    x = torch.randn(2, rows, 64).to(base)
    for name, found, wanted in zip(
        ("y", "x", "A", "B"), run(packed, x, dtype), run(lora, x, dtype), strict=True
    ):
        assert found.dtype == wanted.dtype
        assert_close(found, wanted, name, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype):  # few rows have a way of their own
        found, wanted = packed(x), lora(x)
        assert found.dtype == wanted.dtype == dtype
        assert_close(found, wanted, dtype=torch.bfloat16)


def losses(model: Any, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_training_is_that_of_a_base_in_full_precision() -> None:
    torch.manual_seed(0)
    packed = get_peft_model(tiny(), ApiQConfig(**GRID, r=4, lora_alpha=8))
    plain = dequantize(copy.deepcopy(packed))
    wanted = losses(plain)
    assert wanted[-1] < wanted[0] - 0.1
    assert losses(packed) == pytest.approx(wanted, rel=2e-2)


def test_the_trainer_in_bfloat16(tmp_path: Path) -> None:
    model = get_peft_model(tiny(), ApiQConfig(**GRID, r=4, target_modules=["q_proj", "down_proj"]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        bf16=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    before = [p.clone() for n, p in model.named_parameters() if "lora_B" in n]
    Trainer(model, arguments, train_dataset=rows).train()
    after = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
