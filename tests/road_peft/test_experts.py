"""Experts stacked in one parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from road_peft import RoadConfig
from tests.helpers import assert_close, dense_rotation
from tests.road_peft._models import bytes_of, randomize

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
MODELS = {
    "mixtral": ("MixtralForCausalLM", SHAPE),  # (experts, out, in)
    "gpt_oss": ("GptOssForCausalLM", {**SHAPE, "head_dim": 8}),  # (experts, in, out), with biases
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.arange(12).view(2, 6) % 40


def base(name: str) -> nn.Module:
    class_name, shape = MODELS[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**shape)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "experts" in parameter_name and parameter_name.endswith("bias"):
                parameter.normal_()
    return model


def adapted(name: str, **settings: Any) -> Any:
    options = {"target_modules": [], "target_parameters": TARGETS, "group_size": 8, **settings}
    return randomize(get_peft_model(base(name), RoadConfig(**options)).eval())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def experts(model: Any) -> Any:
    return model.base_model.model.model.layers[0].mlp.experts


@pytest.mark.parametrize("variant", ["road_1", "road_4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_expert_is_rotated_by_its_own_blocks(name: str, variant: str) -> None:
    model = adapted(name, variant=variant)
    rotated = logits(model)
    outer = experts(model)
    module = outer.get_base_layer()
    layer = outer
    while layer is not module:  # one wrapper a parameter
        first, second = (v.view(3, -1) for v in layer.coefficients("default"))
        weight = getattr(module, layer.weight_name)
        bias = getattr(module, layer.bias_name, None)
        for e in range(3):
            R = dense_rotation(first[e], second[e], 8, first.shape[1]).detach()
            with torch.no_grad():
                weight[e] = weight[e] @ R.T if layer.feature_dim == 1 else R @ weight[e]
                if bias is not None:
                    bias[e] = R @ bias[e]
        layer = layer.base_layer
    with model.disable_adapter():
        assert_close(rotated, logits(model), dtype=torch.float16)


@pytest.mark.parametrize("name", MODELS)
def test_merging_gives_the_same_and_everything_back(name: str) -> None:
    model = adapted(name, target_modules=None)
    before, expected = bytes_of(model), logits(model)
    with model.disable_adapter():
        plain = logits(model)
    model.merge_adapter(safe_merge=True)
    assert_close(logits(model), expected, dtype=torch.float16)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.unmerge_adapter()
    assert bytes_of(model) == before
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.experts).__name__.endswith("Experts")
    assert_close(logits(merged), expected, dtype=torch.float16)


@pytest.mark.parametrize("name", MODELS)
def test_saved_experts_load_here_and_are_refused_by_plain_peft(name: str, tmp_path: Path) -> None:
    from tests.road_peft._models import call_silently, registered

    model = adapted(name)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    with registered("stock"), pytest.raises(ValueError, match="needs road_peft"):
        call_silently(PeftModel.from_pretrained, base(name), tmp_path)


def test_every_parameter_gets_a_gradient_and_nothing_stays_registered() -> None:
    model = adapted("mixtral")
    names = [name for name, _ in model.named_parameters()]
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert [name for name, _ in model.named_parameters()] == names


def test_an_error_inside_leaves_no_parametrization() -> None:
    model = adapted("mixtral")
    expected = logits(model)
    with pytest.raises(AttributeError):
        experts(model)(torch.randn(2, 5), None, None)
    assert torch.equal(logits(model), expected)


def test_what_experts_cannot_do_is_refused() -> None:
    model = adapted("mixtral")
    with pytest.raises(ValueError, match="experts see tokens and not rows"):
        model(TOKENS, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="all adapters of a model must have the same"):
        model.add_adapter("b", RoadConfig(target_modules=[], target_parameters=TARGETS[:1]))
    with pytest.raises(ValueError, match="has no LoRA beside its rotation"):
        adapted("mixtral", lora_rank=2)
