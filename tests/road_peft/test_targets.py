"""Which modules an adapter goes to, and how many parameters that makes.

| property                                         | oracle                                        |
|--------------------------------------------------|-----------------------------------------------|
| parameter counts of real models                  | sums of out features, by hand, on meta        |
| default targets: linear layers of the blocks     | names, per architecture                       |
| exclude, blocks, patterns, groups that do not fit| names                                         |
| modules that cannot be adapted                   | the message: which module, why, the ways out  |
"""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.road import RoadConfig as StockRoadConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from road_peft import RoadConfig, RoadEmbedding, RoadLinear
from tests.road_peft._models import Mlp, adapted, bytes_of, registered, tiny

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
}
LLAMA_3_8B = {
    **LLAMA_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_3_2_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
ROBERTA_BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
ROBERTA_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
FC1 = ["intermediate.dense"]
QV = ["q_proj", "v_proj"]

# class, settings, target modules, RoAd1 parameters
COUNTS: dict[str, tuple[str, dict[str, Any], list[str] | None, int]] = {
    "LLaMA-7B": ("LlamaForCausalLM", LLAMA_7B, None, 1_359_872),
    "LLaMA-13B": ("LlamaForCausalLM", LLAMA_13B, None, 2_129_920),
    "Llama-3-8B": ("LlamaForCausalLM", LLAMA_3_8B, None, 1_376_256),
    "Llama-3.2-3B": ("LlamaForCausalLM", LLAMA_3_2_3B, None, 774_144),
    "Llama-3.2-3B, q and v": ("LlamaForCausalLM", LLAMA_3_2_3B, QV, 114_688),
    "RoBERTa base": ("RobertaForMaskedLM", ROBERTA_BASE, None, 82_944),
    "RoBERTa large": ("RobertaForMaskedLM", ROBERTA_LARGE, None, 221_184),
    "RoBERTa base, fc1": ("RobertaForMaskedLM", ROBERTA_BASE, FC1, 36_864),
    "RoBERTa large, fc1": ("RobertaForMaskedLM", ROBERTA_LARGE, FC1, 98_304),
}
ALL_VARIANTS = ("RoBERTa base, fc1", "Llama-3.2-3B, q and v")
TIMES = {"road_1": 1, "road_2": 2, "road_4": 4}


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, v) for name in COUNTS for v in (TIMES if name in ALL_VARIANTS else ["road_1"])],
)
def test_real_models_have_as_many_parameters_as_the_paper_says(name: str, variant: str) -> None:
    class_name, settings, targets, count = COUNTS[name]
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**settings))
        model = peft.get_peft_model(model, RoadConfig(target_modules=targets, variant=variant))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == count * TIMES[variant]
    assert all(p.device.type == "meta" for p in model.parameters())


def _names(model: nn.Module) -> set[str]:
    return {n for n, _ in model.base_model.road_layers()}


def _in_blocks(prefix: str, blocks: range | tuple[int, ...], *layers: str) -> set[str]:
    return {f"{prefix}.{i}.{layer}" for i in blocks for layer in layers}


BOTH = range(2)
ATTENTION = tuple(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
LLAMA_LAYERS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BART_ATTENTION = tuple(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj"))
BART_CROSS = tuple(n.replace("self_attn", "encoder_attn") for n in BART_ATTENTION)
BERT_LAYERS = (
    *(f"attention.self.{n}" for n in ("query", "key", "value")),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
T5_SELF = tuple(f"layer.0.SelfAttention.{n}" for n in "qkvo")
T5_CROSS = tuple(f"layer.1.EncDecAttention.{n}" for n in "qkvo")

# the linear layers of the blocks: no head, no pooler, no embedding
DEFAULTS = {
    "llama": _in_blocks("model.layers", BOTH, *LLAMA_LAYERS),
    "llama classifier": _in_blocks("model.layers", BOTH, *LLAMA_LAYERS),
    "opt": _in_blocks("model.decoder.layers", BOTH, *BART_ATTENTION, "fc1", "fc2"),
    "gpt2": _in_blocks(
        "transformer.h", BOTH, "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
    ),
    "bart": _in_blocks("model.encoder.layers", BOTH, *BART_ATTENTION, "fc1", "fc2")
    | _in_blocks("model.decoder.layers", BOTH, *BART_ATTENTION, *BART_CROSS, "fc1", "fc2"),
    "roberta": _in_blocks("encoder.layer", BOTH, *BERT_LAYERS),
    "bert classifier": _in_blocks("bert.encoder.layer", BOTH, *BERT_LAYERS),
    "t5": _in_blocks(
        "encoder.block", BOTH, *T5_SELF, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"
    )
    | _in_blocks(
        "decoder.block",
        BOTH,
        *T5_SELF,
        *T5_CROSS,
        "layer.2.DenseReluDense.wi",
        "layer.2.DenseReluDense.wo",
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_targets_are_the_linear_layers_of_the_blocks(name: str) -> None:
    model = peft.get_peft_model(tiny(name), RoadConfig(group_size=8))
    assert _names(model) == DEFAULTS[name]


def test_stock_peft_adapts_two_of_the_seven_linear_layers_of_llama_by_default() -> None:
    with registered("stock") as config_class:
        model = peft.get_peft_model(tiny("llama"), config_class(group_size=8))
    assert sum(1 for _ in adapted(model)) == 2 * 2


# settings beside group_size=8, and the names that are adapted then
CHOSEN: dict[str, tuple[dict[str, Any], set[str]]] = {
    "one block": ({"layers_to_transform": 1}, _in_blocks("model.layers", (1,), *LLAMA_LAYERS)),
    "list of blocks": (
        {"layers_to_transform": [0]},
        _in_blocks("model.layers", (0,), *LLAMA_LAYERS),
    ),
    "blocks of a pattern": (
        {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": QV},
        _in_blocks("model.layers", (1,), "self_attn.q_proj", "self_attn.v_proj"),
    ),
    "excluded": (
        {"exclude_modules": ["q_proj", "down_proj"]},
        _in_blocks(
            "model.layers",
            BOTH,
            *(n for n in LLAMA_LAYERS if not n.endswith(("q_proj", "down_proj"))),
        ),
    ),
    "excluded by an expression": (
        {"exclude_modules": r".*layers\.0\..*"},
        _in_blocks("model.layers", (1,), *LLAMA_LAYERS),
    ),
    "excluded of a block": (
        {"exclude_modules": ["mlp.up_proj"], "layers_to_transform": [1]},
        _in_blocks("model.layers", (1,), *(n for n in LLAMA_LAYERS if n != "mlp.up_proj")),
    ),
    "an expression": (
        {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
        _in_blocks("model.layers", (1,), "self_attn.q_proj", "self_attn.k_proj"),
    ),
    "all-linear": ({"target_modules": "all-linear"}, DEFAULTS["llama"]),
    "all-linear of a block": (
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        _in_blocks("model.layers", (0,), *LLAMA_LAYERS),
    ),
    "head and embedding": (
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"lm_head", "model.embed_tokens"},
    ),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_modules_are_chosen_by_the_fields(case: str) -> None:
    settings, names = CHOSEN[case]
    llama = tiny("llama", vocab_size=48)
    model = peft.get_peft_model(llama, RoadConfig(group_size=8, **settings))
    assert _names(model) == names


def test_default_targets_leave_out_with_a_warning_what_the_group_does_not_divide() -> None:
    with pytest.warns(UserWarning, match=r"group_size=16 .* 8 linear") as caught:
        model = peft.get_peft_model(tiny("llama"), RoadConfig(group_size=16))
    (message,) = [str(w.message) for w in caught if "group_size=16" in str(w.message)]
    assert "model.layers.0.self_attn.k_proj (8)" in message
    small = ("self_attn.k_proj", "self_attn.v_proj")
    gates = ("mlp.gate_proj", "mlp.up_proj")  # 24 = 16 + 8
    assert _names(model) == _in_blocks(
        "model.layers", BOTH, *(n for n in LLAMA_LAYERS if n not in (*small, *gates))
    )


def test_default_targets_take_a_layer_whose_group_is_given_by_the_pattern() -> None:
    patterns = {"k_proj": 8, "v_proj": 8, "gate_proj": 8, "up_proj": 8}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*group_size")
        model = peft.get_peft_model(
            tiny("llama"), RoadConfig(group_size=16, group_size_pattern=patterns)
        )
    assert _names(model) == DEFAULTS["llama"]


def test_default_targets_with_remainder_identity_leave_out_only_what_has_no_whole_group() -> None:
    config = RoadConfig(group_size=16, remainder="identity")
    with pytest.warns(UserWarning, match=r"group_size=16"):
        model = peft.get_peft_model(tiny("llama"), config)
    small = ("self_attn.k_proj", "self_attn.v_proj")
    assert _names(model) == _in_blocks(
        "model.layers", BOTH, *(n for n in LLAMA_LAYERS if n not in small)
    )


def test_a_second_adapter_with_default_targets_gets_the_same_modules() -> None:
    model = peft.get_peft_model(tiny("llama"), RoadConfig(group_size=8))
    model.add_adapter("second", RoadConfig(group_size=4, variant="road_4"))
    for layer in adapted(model):
        assert set(layer.road_theta) == {"default", "second"}
    assert _names(model) == DEFAULTS["llama"]


def test_all_linear_on_a_model_that_has_adapters_already() -> None:
    model = peft.get_peft_model(tiny("llama"), RoadConfig(group_size=8, target_modules=QV))
    model.add_adapter("second", RoadConfig(group_size=8, target_modules="all-linear"))
    with_second = {n for n, m in model.base_model.road_layers() if "second" in m.road_theta}
    assert with_second == DEFAULTS["llama"]


def test_a_second_adapter_that_is_not_active_is_frozen() -> None:
    model = peft.get_peft_model(Mlp(), RoadConfig(group_size=4, target_modules=["up"]))
    model.add_adapter(
        "second", RoadConfig(group_size=4, target_modules=["up", "down"], lora_rank=2)
    )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in trainable} == {"default"}


# ---- what cannot be adapted -------------------------------------------------------------------


def test_a_model_that_is_not_from_transformers_needs_target_modules() -> None:
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(Mlp(), RoadConfig())


def _one(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Identity(), module)


def test_a_module_that_is_not_linear_is_refused_in_upstreams_words() -> None:
    expected = (
        "is not supported. Currently, only the following modules are supported: `torch.nn.Linear`."
    )
    for library in ("stock", "ours"):
        with (
            registered(library) as config_class,
            pytest.raises(ValueError, match="Target module") as error,
        ):
            peft.get_peft_model(
                _one(nn.Conv2d(2, 2, 1)), config_class(target_modules=["1"], group_size=2)
            )
        assert expected in str(error.value)
    assert str(error.value).startswith("1: ")


# outputs, group size, remainder, what the message offers
MISFITS = {
    "not divisible": (10, 4, "error", "remainder='identity'"),
    "too large": (10, 12, "error", "exclude_modules"),
    "too large, identity": (10, 12, "identity", "exclude_modules"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_group_that_does_not_fit_names_the_module_and_the_ways_out(case: str) -> None:
    outputs, group, remainder, offer = MISFITS[case]
    config = RoadConfig(group_size=group, target_modules=["up"], remainder=remainder)
    with pytest.raises(ValueError, match=r"^up: .*must be divisible by group_size") as error:
        peft.get_peft_model(Mlp(hidden=outputs), config)
    message = str(error.value)
    for part in (f"({group})", f"has {outputs}", "group_size_pattern", "exclude_modules", offer):
        assert part in message
    # a remainder of the whole layer is no way out
    assert ("remainder='identity'" in message) == (outputs > group)


@pytest.mark.parametrize("target", ["up", "all-linear"])
def test_a_module_with_another_methods_adapter_is_refused_with_the_way_out(target: str) -> None:
    lora = peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=["up"], r=2))
    model = nn.Sequential(lora.base_model.model)
    with pytest.raises(ValueError, match=r"another method \(Linear\).*lora_rank"):
        peft.get_peft_model(model, RoadConfig(target_modules=["0.up"], group_size=4))


def test_an_embedding_has_no_lora_beside_its_rotation() -> None:
    config = RoadConfig(target_modules=["1"], group_size=4, lora_rank=2)
    with pytest.raises(ValueError, match=r"1: lora_rank is 2.*RoadEmbedding"):
        peft.get_peft_model(_one(nn.Embedding(5, 8)), config)


def test_a_second_adapter_that_fails_half_way_leaves_nothing_behind() -> None:
    model = peft.get_peft_model(Mlp(), RoadConfig(target_modules=["up"], group_size=2))
    before = (
        bytes_of(model),
        str(model),
        [n for n, p in model.named_parameters() if p.requires_grad],
    )
    config = RoadConfig(target_modules=["up", "down"], group_size=16)  # down has 4 outputs
    with pytest.raises(ValueError, match=r"^down: "):
        model.add_adapter("second", config)
    after = bytes_of(model), str(model), [n for n, p in model.named_parameters() if p.requires_grad]
    assert after == before
    assert set(model.peft_config) == {"default"}


def test_no_matching_module_is_an_error() -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(Mlp(), RoadConfig(target_modules=["nowhere"], group_size=4))


@pytest.mark.parametrize(
    ("module", "kind", "outputs"),
    [
        (nn.Linear(6, 8), RoadLinear, 8),
        (Conv1D(8, 6), RoadLinear, 8),
        (nn.Embedding(6, 8), RoadEmbedding, 8),
    ],
    ids=["Linear", "Conv1D", "Embedding"],
)
def test_a_supported_module_is_wrapped_with_its_sizes(module, kind, outputs) -> None:
    model = peft.get_peft_model(_one(module), RoadConfig(target_modules=["1"], group_size=4))
    (layer,) = adapted(model)
    assert type(layer) is kind
    assert layer.out_features == outputs
    assert layer.base_layer is module


@pytest.mark.parametrize(
    "targets", [None, "all-linear", ["c_attn"]], ids=["default", "all-linear", "c_attn"]
)
def test_gpt2_is_adapted_where_stock_peft_refuses_its_conv1d(targets) -> None:
    with registered("stock"), pytest.raises(ValueError, match=r"Conv1D.* is not supported"):
        peft.get_peft_model(tiny("gpt2"), StockRoadConfig(group_size=8, target_modules=targets))
    model = peft.get_peft_model(tiny("gpt2"), RoadConfig(group_size=8, target_modules=targets))
    names = DEFAULTS["gpt2"]
    assert _names(model) == (
        names if targets != ["c_attn"] else {n for n in names if n.endswith("c_attn")}
    )
