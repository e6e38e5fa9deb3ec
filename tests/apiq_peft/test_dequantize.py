"""A packed model written out again: what it computes, and that its LoRA merges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from apiq_peft import ApiQConfig, ApiQLinear, PackedLinear, dequantize
from road_peft import RoadConfig
from tests.apiq_peft._models import error, outputs, tiny, tokens


def adapted(kind: str = "llama", **changes: Any) -> Any:
    """Give a model of packed layers whose LoRA is not the identity."""
    settings = {"bits": 4, "group_size": 32, "r": 4, "init_lora_weights": False, **changes}
    return get_peft_model(tiny(kind), ApiQConfig(**settings)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_the_lora_of_a_model_written_out_merges(kind: str) -> None:
    model = adapted(kind)
    wanted = outputs(model, tokens())
    with model.disable_adapter():
        bare = outputs(model, tokens())
    assert dequantize(model) is model
    inner = model.get_base_model()
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert not inner.is_quantized
    assert inner.hf_quantizer is None
    assert not hasattr(inner.config, "quantization_config")
    assert error(outputs(model, tokens()), wanted) < 1e-5

    model.merge_adapter(safe_merge=True)
    assert error(outputs(model, tokens()), wanted) < 1e-5
    assert error(outputs(inner, tokens()), wanted) < 1e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        assert error(outputs(model, tokens()), bare) < 1e-5
    assert error(outputs(model, tokens()), wanted) < 1e-5
    merged = model.merge_and_unload()
    assert not any(isinstance(m, ApiQLinear) for m in merged.modules())
    assert error(outputs(merged, tokens()), wanted) < 1e-5


def test_the_inner_model_may_be_written_out_as_well() -> None:
    model = adapted()
    wanted = outputs(model, tokens())
    dequantize(model.get_base_model())
    assert error(outputs(model.merge_and_unload(), tokens()), wanted) < 1e-5


def test_merging_is_for_all_layers_or_none() -> None:
    model = adapted()
    whole = copy.deepcopy(model)
    layers = [m for m in dequantize(model).modules() if isinstance(m, ApiQLinear)]
    layers[-1].base_layer = [m for m in whole.modules() if isinstance(m, PackedLinear)][-1]
    before = [layer.base_layer.weight.clone() for layer in layers]

    def refused(message: str, **options: Any) -> None:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match=message):
                merge(**options)
        after = [layer.base_layer.weight for layer in layers]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert not any(layer.merged for layer in layers)

    refused(r"layers\.1\.mlp\.down_proj: .*not on the grid")
    model = dequantize(model)
    layers = [m for m in model.modules() if isinstance(m, ApiQLinear)]
    before = [layer.base_layer.weight.clone() for layer in layers]
    with torch.no_grad():
        layers[-1].lora_B["default"].weight[0, 0] = float("nan")
    refused(r"layers\.1\.mlp\.down_proj: .*not be finite", safe_merge=True)


def test_a_further_adapter_leaves_a_model_written_out_as_it_is() -> None:
    model = dequantize(adapted())
    wanted = outputs(model, tokens())
    model.add_adapter("second", ApiQConfig(bits=4, group_size=32, r=2))
    assert torch.equal(outputs(model, tokens()), wanted)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert not model.get_base_model().is_quantized
    model.set_adapter("second")
    assert not torch.equal(outputs(model, tokens()), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_another_dtype_is_that_of_the_whole_model(kind: str) -> None:
    model = adapted(kind, bits=2)
    wanted = outputs(model, tokens())
    low_rank = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert low_rank
    frequencies = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
    dequantize(model, torch.bfloat16)
    assert error(outputs(model, tokens()).float(), wanted) < 0.2
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in low_rank else torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name in frequencies:  # which would be off by whole turns at far positions
            assert buffer.dtype == torch.float32
    bare = dequantize(adapted(kind, bits=2).unload(), torch.bfloat16)
    assert outputs(bare, tokens()).dtype == torch.bfloat16


def test_a_rotation_stays_in_float32() -> None:
    base = adapted().unload()
    model = get_peft_model(base, RoadConfig(group_size=32, target_modules=["q_proj"])).eval()
    wanted = outputs(model, tokens())
    dequantize(model, torch.bfloat16)
    assert error(outputs(model, tokens()).float(), wanted) < 0.05
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "road_" in n)


def test_the_mode_and_the_sizes_are_those_of_the_packed_layer() -> None:
    model = dequantize(adapted("gpt2").train().unload())
    attention = model.transformer.h[0].attn.c_attn
    assert (attention.training, attention.nx, attention.nf) == (True, 64, 192)
    layer = dequantize(adapted().unload()).model.layers[0].mlp.down_proj
    assert type(layer) is nn.Linear
    assert (layer.training, layer.in_features, layer.out_features) == (False, 128, 64)
