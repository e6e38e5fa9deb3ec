"""ApiQ's packed models in vLLM, alone and under adapters of both kinds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from apiq_peft import ApiQConfig, export_gptq
from apiq_peft.checkpoint import mark_quantized
from apiq_peft.layer import pack_layer
from tests.vllm._engine import answers, engine, in_bfloat16, request
from tests.vllm._models import expected, lora_configs, prompts, road_configs, save_adapters

GRIDS = {2: 32, 3: 64, 4: 128}  # bits: group size


def packed(
    base: Path, folder: Path, bits: int, scheme: str = "asymmetric", group_size: int | None = None
) -> Any:
    """Write the base with packed layers, and give it."""
    group_size = group_size or GRIDS[bits]
    model: Any = LlamaForCausalLM.from_pretrained(base).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            grid = min(group_size, 64) if child == "down_proj" else group_size
            new = pack_layer(module, bits, grid, scheme)
            setattr(model.get_submodule(parent), child, new)
    mark_quantized(model, scheme)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("bits", GRIDS)
def test_a_packed_model_with_adapters_on_top(bits: int, base: Path, tmp_path: Path) -> None:
    packed(base, tmp_path / "packed", bits)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    roads = save_adapters(copy.deepcopy(own), road_configs(["one", "mixed"]), tmp_path, 11)
    config = ApiQConfig.of(lora_configs(["low"])["low"])  # PEFT's own knows no packed layer
    loras = save_adapters(copy.deepcopy(own), {"low": config}, tmp_path, 12)
    names = [None, "one", "low", "mixed", None, "one"]
    asked = prompts(len(names), seed=bits)
    with engine(tmp_path / "packed", skip_tokenizer_init=True) as llm:
        requests = [n and request(n, names.index(n), tmp_path) for n in names]
        found = answers(llm, asked, requests)
    for name, prompt, answer in zip(names, asked, found, strict=True):
        tuned: Any = own if name is None else loras if name == "low" else roads
        if name is not None:
            tuned.set_adapter(name)
        expected(tuned, prompt).check(answer, f"{bits} bits, {name}")


def test_members_of_one_layer_must_be_alike(base: Path, tmp_path: Path) -> None:
    from apiq_peft.vllm_plugin.quantization import ApiQServingConfig

    layers = {"a.q_proj": [2, 32], "a.k_proj": [3, 32], "a.v_proj": [2, 32]}
    config = ApiQServingConfig(layers)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(ValueError, match="quantise them alike"):
        config.get_quant_method(nn.Linear(1, 1), "a.qkv_proj")


@in_bfloat16
def test_an_export_for_gptq_readers(base: Path, tmp_path: Path) -> None:
    """Four bits, symmetric: vLLM's own GPTQ route and ours give the same tokens."""
    model = packed(base, tmp_path / "packed", 4, "gptq_symmetric")
    export_gptq(model, tmp_path / "export", "gptq", torch.bfloat16)
    asked = prompts(4)
    found = []
    for folder in (tmp_path / "packed", tmp_path / "export" / "base"):
        with engine(folder, skip_tokenizer_init=True, dtype="bfloat16", enable_lora=False) as llm:
            found.append(answers(llm, asked, [None] * len(asked)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.tokens[0] == theirs.tokens[0]
        assert abs(ours.logprobs[0] - theirs.logprobs[0]) < 0.05  # bfloat16
