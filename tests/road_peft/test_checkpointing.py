"""Gradient checkpointing: a forward run twice gives the gradients of a forward run once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from road_peft import RoadConfig
from tests.helpers import assert_close
from tests.road_peft._models import VOCABULARY, Mlp, randomize, tiny

# two runs of one model are compared
NO_DROPOUT: dict[str, dict[str, float]] = {
    "llama": {"attention_dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
# name: (model, settings of the adapter)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "road_1": ("llama", {"variant": "road_1"}),
    "road_4": ("llama", {"variant": "road_4"}),
    "recompute": ("llama", {"variant": "road_1", "recompute": True}),
    "LoRA beside": ("llama", {"variant": "road_2", "lora_rank": 2}),
    "encoder-decoder": ("t5", {"variant": "road_2"}),
    "Conv1D": ("gpt2", {"variant": "road_2"}),
}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.arange(12).view(2, 6) % VOCABULARY
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def _count_base_layers(model: nn.Module) -> list[int]:
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            module.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_equal(case: str, use_reentrant: bool) -> None:
    name, settings = CASES[case]
    base = tiny(name, dtype=torch.float64, use_cache=False, **NO_DROPOUT[name])
    model = randomize(get_peft_model(base, RoadConfig(group_size=8, **settings))).train()
    calls = _count_base_layers(model)
    wanted = _gradients(model)
    once = calls[0]

    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    ours = _gradients(model)
    assert calls[0] == 3 * once  # the second time every block ran twice
    assert ours.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert gradient.any(), parameter
        assert_close(ours[parameter], gradient, parameter)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_checkpoint_around_layers_by_hand(use_reentrant: bool, recompute: bool) -> None:
    config = RoadConfig(target_modules=["up", "down"], group_size=4, recompute=recompute)
    model = randomize(get_peft_model(Mlp(), config))
    x = torch.randn(3, 8, requires_grad=True)

    def gradients(y: Tensor) -> list[Tensor]:
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        model.zero_grad()
        x.grad = None
        y.square().sum().backward()
        return [leaf.grad.clone() for leaf in leaves]

    wanted = gradients(model(x))
    ours = gradients(checkpoint(model, x, use_reentrant=use_reentrant))
    assert len(wanted) == 5
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize(("recompute", "tensors"), [(False, 3), (True, 2)])
def test_what_is_kept_for_the_backward(recompute: bool, tensors: int) -> None:
    # SiLU keeps its input and the square keeps SiLU's output. With `recompute` the rotation keeps
    # its output, which SiLU has already; else it keeps its input besides.
    base = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    config = RoadConfig(target_modules=["0"], group_size=4, recompute=recompute)
    model = randomize(get_peft_model(base, config))
    x, kept = torch.randn(64, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(x).square().sum()
    loss.backward()
    large = {t.data_ptr() for t in kept if t.shape == x.shape}
    assert len(large - {x.data_ptr()}) == tensors
