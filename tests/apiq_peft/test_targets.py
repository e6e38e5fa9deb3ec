"""Which layers are quantised where not all can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from apiq_peft import ApiQConfig, PackedLinear, preset, quantize
from tests.apiq_peft._models import tokens


def mixtral() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=96, **sizes, **heads))


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_experts_are_refused_by_name(targets: str | None) -> None:
    model = mixtral()
    config = ApiQConfig(group_size=32, r=4, target_modules=targets)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts \(MixtralExperts\).*router"):
        quantize(model, tokens(2), config, preset("fast"), show_progress=False)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_other_layers_can_be_quantised_beside_experts() -> None:
    config = ApiQConfig(group_size=32, r=4, target_modules=["q_proj", "o_proj"])
    low, _ = quantize(mixtral(), tokens(2), config, preset("fast"), show_progress=False)
    packed = [n for n, m in low.get_base_model().named_modules() if isinstance(m, PackedLinear)]
    assert [n.split(".")[-2] for n in packed] == ["q_proj", "o_proj"]
