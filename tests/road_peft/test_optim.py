"""Weight decay, parameter groups and the settings of the paper."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from road_peft import PRESETS, RoadConfig, road_parameter_groups
from tests.road_peft._models import Mlp, with_adapters

WARNING = "weight decay to road_alpha"


def adapted(**settings: Any) -> Any:
    config = RoadConfig(target_modules=["up"], group_size=4, modules_to_save=["down"], **settings)
    model = with_adapters(Mlp(), {"default": config})
    model.set_adapter("default")
    return model


def step(optimizer: torch.optim.Optimizer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(w.message) for w in caught if WARNING in str(w.message)]


def test_groups_hold_every_trainable_parameter_once_and_spare_rotations() -> None:
    model = adapted(lora_rank=2)
    spared, decayed = road_parameter_groups(model, weight_decay=0.1, lr=3e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in spared["params"]} == {"road_theta", "road_alpha"}
    assert any("road_lora_A" in names[id(p)] for p in decayed["params"])
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert spared["lr"] == decayed["lr"] == 3e-3
    together = [id(p) for group in (spared, decayed) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_scales_stay_where_they_are_without_a_gradient() -> None:
    model = adapted()
    before = model.base_model.model.up.road_alpha["default"].detach().clone()
    optimizer = torch.optim.AdamW(road_parameter_groups(model, weight_decay=0.5, lr=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    assert step(optimizer) == []
    assert torch.equal(model.base_model.model.up.road_alpha["default"], before)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        road_parameter_groups(Mlp().requires_grad_(False))


@pytest.mark.parametrize("copied", [False, True], ids=["built", "copied"])
def test_an_optimizer_that_decays_scales_is_warned_of_once(copied: bool) -> None:
    model = copy.deepcopy(adapted()) if copied else adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # torch's default decays by 0.01
    assert len(step(optimizer)) == 1
    assert step(optimizer) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.optim.AdamW(adapted().parameters(), weight_decay=0),
        lambda: torch.optim.AdamW(nn.Linear(2, 2).parameters(), weight_decay=1),
        lambda: torch.optim.SGD(adapted().parameters(), lr=0.1),
    ],
    ids=["no decay", "no adapter", "sgd"],
)
def test_other_optimizers_are_not(make: Any) -> None:
    assert step(make()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_and_fit_the_trainer(name: str, tmp_path: Any) -> None:
    arguments = TrainingArguments(tmp_path, **PRESETS[name].training_arguments())
    assert arguments.weight_decay == 0
    assert arguments.get_warmup_steps(1000) == 100
    assert arguments.lr_scheduler_type == "linear"
    assert 1e-3 <= arguments.learning_rate <= 5e-3
