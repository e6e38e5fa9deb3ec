"""Training on packed weights: the Trainer with checkpointing, several adapters, and a RoAd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from apiq_peft import ApiQConfig, PackedLinear, preset, quantize
from road_peft import RoadConfig
from tests.apiq_peft._models import outputs, tiny, tokens

SETTINGS: dict[str, Any] = {"bits": 2, "group_size": 32, "r": 4, "lora_alpha": 8}


def calibrated() -> PeftModel:
    config = ApiQConfig(**SETTINGS, task_type="CAUSAL_LM")
    return quantize(tiny(), tokens(), config, preset("fast"), show_progress=False)[0]


def trainable(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def packed(model: Any) -> list[Tensor]:
    """Give copies of everything that is stored for the packed weights, in order."""
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert layers
    return [t.clone() for m in layers for t in (m.qweight, m.qzeros, m.scales)]


def learn(model: Any, steps: int = 8) -> list[float]:
    """Train what has a gradient to repeat some texts; give the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


# ---- transformers.Trainer -----------------------------------------------------------------------


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def trainer(model: Any, folder: Path, stop: int | None = None) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(16)]
    callbacks: list[TrainerCallback] = [] if stop is None else [Interrupt(stop)]
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)


def losses_of(done: Trainer) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_the_trainer_learns_with_gradient_checkpointing_and_resumes(tmp_path: Path) -> None:
    model = calibrated()
    codes = packed(model)
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    losses = losses_of(whole)
    assert len(losses) == 12
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(packed(model), codes, strict=True))
    # a checkpoint holds the adapter alone
    held = {path.name for path in (tmp_path / "whole" / "checkpoint-12").iterdir()}
    assert "adapter_model.safetensors" in held
    assert "model.safetensors" not in held

    trainer(calibrated(), tmp_path / "cut", stop=8).train()
    assert not (tmp_path / "cut" / "checkpoint-12").exists()
    resumed = calibrated()
    again = trainer(resumed, tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert losses_of(again) == pytest.approx(losses, rel=1e-5)
    for name, value in trainable(resumed).items():
        torch.testing.assert_close(value, trainable(model)[name], msg=name)


def test_a_model_that_was_saved_and_loaded_trains_alike(tmp_path: Path) -> None:
    model = calibrated()
    model.save_pretrained(tmp_path / "adapter")
    trained = learn(model)
    model.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    assert learn(loaded) == pytest.approx(trained, rel=1e-5)


# ---- several adapters on one base ---------------------------------------------------------------


def test_training_one_adapter_leaves_the_others_and_the_base(tmp_path: Path) -> None:
    model = calibrated().eval()
    ids = tokens(3)
    bare = model.unload()
    low_bit = outputs(bare, ids)

    model = calibrated().eval()
    start = outputs(model, ids)
    with model.disable_adapter():
        assert torch.equal(outputs(model, ids), low_bit)
    assert not torch.equal(start, low_bit)

    model.add_adapter("second", ApiQConfig(**{**SETTINGS, "r": 2}, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    losses = learn(model)
    assert losses[-1] < 0.9 * losses[0]
    second = outputs(model, ids)
    model.set_adapter("default")
    assert torch.equal(outputs(model, ids), start)
    with model.disable_adapter():
        assert torch.equal(outputs(model, ids), low_bit)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare, str(tmp_path)).eval()
    loaded.load_adapter(str(tmp_path / "second"), "second")
    assert torch.equal(outputs(loaded, ids), start)
    loaded.set_adapter("second")
    assert torch.equal(outputs(loaded, ids), second)
    with torch.no_grad():
        rows = loaded(input_ids=ids, adapter_names=["default", "second", "__base__"]).logits
    for row, wanted in zip(rows, (start[0], second[1], low_bit[2]), strict=True):
        torch.testing.assert_close(row, wanted)


# ---- the other tuner ----------------------------------------------------------------------------


def test_a_road_adapter_trains_on_a_packed_base_and_comes_back(tmp_path: Path) -> None:
    base = calibrated().unload()
    base.save_pretrained(tmp_path / "base")
    codes = packed(base)
    model = get_peft_model(base, RoadConfig(group_size=32, task_type="CAUSAL_LM"))
    before = trainable(model)
    losses = learn(model)
    assert losses[-1] < losses[0]
    assert all("road_" in name for name in before)
    assert any(not torch.equal(value, before[name]) for name, value in trainable(model).items())
    assert all(torch.equal(a, b) for a, b in zip(packed(model), codes, strict=True))
    wanted = outputs(model, tokens())
    model.save_pretrained(tmp_path / "road")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "road")).eval()
    assert torch.equal(outputs(loaded, tokens()), wanted)
    with loaded.disable_adapter():
        assert not torch.equal(outputs(loaded, tokens()), wanted)
