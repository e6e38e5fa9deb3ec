"""Every way in and out that transformers and PEFT offer, on models built here."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from road_peft import RoadConfig, RoadLayer
from tests.helpers import assert_close
from tests.road_peft._models import VOCABULARY, Mlp, adapted, randomize, tiny

GROUP = 8


def _config(**settings: Any) -> RoadConfig:
    return RoadConfig(**{"group_size": GROUP, "variant": "road_2", **settings})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny("llama").save_pretrained(folder)
    return folder


def _load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def model(base: Path) -> LlamaForCausalLM:
    """A model of transformers with a random adapter of its own, without PeftModel around it."""
    model = _load(base)
    model.add_adapter(_config(task_type="CAUSAL_LM"), adapter_name="one")
    return randomize(model)


def _ids() -> Tensor:
    return torch.arange(10).view(2, 5) % VOCABULARY


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(input_ids=_ids()).logits


# ---- the adapter methods of a transformers model ------------------------------------------------


def test_a_fresh_adapter_is_trainable_and_changes_nothing(base: Path) -> None:
    model = _load(base)
    wanted = _logits(model)
    model.add_adapter(_config())
    layers = list(adapted(model))
    assert len(layers) == 14
    assert all(isinstance(layer, RoadLayer) for layer in layers)
    assert torch.equal(_logits(model), wanted)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert all("road_theta" in name or "road_alpha" in name for name in trainable)
    model(input_ids=_ids(), labels=_ids()).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_disabling_and_enabling(model: LlamaForCausalLM, base: Path) -> None:
    plain, adapted_logits = _logits(_load(base)), _logits(model)
    assert not torch.allclose(plain, adapted_logits, atol=1e-2)
    model.disable_adapters()
    assert torch.equal(_logits(model), plain)
    model.enable_adapters()
    assert torch.equal(_logits(model), adapted_logits)


def test_choosing_among_adapters(model: LlamaForCausalLM, base: Path) -> None:
    one = _logits(model)
    two = _config(target_modules=["v_proj"], init_weights=False)
    model.add_adapter(two, adapter_name="two")
    assert model.active_adapters() == ["two"]
    two = _logits(model)
    assert not torch.allclose(one, two, atol=1e-3)
    model.set_adapter("one")
    assert torch.equal(_logits(model), one)
    model.set_adapter(["one", "two"])
    assert model.active_adapters() == ["one", "two"]
    assert not torch.allclose(_logits(model), one, atol=1e-3)


def test_deleting_adapters(model: LlamaForCausalLM, base: Path) -> None:
    one = _logits(model)
    model.add_adapter(_config(), adapter_name="two")
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(_logits(model), one)
    assert not any("two" in name for name in model.state_dict())
    model.delete_adapter("one")
    assert not any("road_" in name for name in model.state_dict())
    assert torch.equal(_logits(model), _logits(_load(base)))


def test_saving_and_loading(model: LlamaForCausalLM, base: Path, tmp_path: Path) -> None:
    wanted, folder = _logits(model), tmp_path / "adapter"
    model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "ROAD"
    loaded = _load(base)
    loaded.load_adapter(folder, adapter_name="again")
    assert all(isinstance(layer, RoadLayer) for layer in adapted(loaded))
    assert torch.equal(_logits(loaded), wanted)
    assert loaded.get_adapter_state_dict("again").keys() == model.get_adapter_state_dict().keys()


def test_loading_takes_the_folder_for_a_model(model: LlamaForCausalLM, tmp_path: Path) -> None:
    wanted, folder = _logits(model), tmp_path / "adapter"
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(_logits(loaded), wanted)
    wrapped = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert isinstance(wrapped, PeftModel)
    assert torch.equal(_logits(wrapped), wanted)


def test_plain_peft_and_transformers_read_each_other(base: Path, tmp_path: Path) -> None:
    model = randomize(get_peft_model(_load(base), _config(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    loaded = _load(base)
    loaded.load_adapter(tmp_path / "adapter")
    assert torch.equal(_logits(loaded), _logits(model))


def test_an_adapter_from_tensors_in_memory(model: LlamaForCausalLM, base: Path) -> None:
    tensors = model.get_adapter_state_dict("one")
    loaded = _load(base)
    loaded.load_adapter(peft_config=_config(), adapter_state_dict=tensors, adapter_name="again")
    assert torch.equal(_logits(loaded), _logits(model))


# ---- PEFT's functions ---------------------------------------------------------------------------


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in peft.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injecting_into_any_module(low_cpu_mem_usage: bool) -> None:
    base = Mlp()
    source = copy.deepcopy(base)
    config = _config(target_modules=["up", "down"], group_size=4)
    source = randomize(inject_adapter_in_model(config, source))
    tensors = _values(source)
    assert set(tensors) == {f"{m}.road_{p}" for m in ("up", "down") for p in ("theta", "alpha")}
    other = inject_adapter_in_model(config, base, low_cpu_mem_usage=low_cpu_mem_usage)
    assert next(iter(adapted(other))).road_theta["default"].is_meta is low_cpu_mem_usage
    result = peft.set_peft_model_state_dict(other, tensors, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    x = torch.randn(3, 8)
    assert torch.equal(other(x), source(x))


def test_injecting_follows_the_keys_of_a_state_dict() -> None:
    source = randomize(inject_adapter_in_model(_config(target_modules=["up"]), Mlp()))
    tensors = _values(source)
    other = inject_adapter_in_model(
        _config(target_modules=["up", "down"], group_size=4), Mlp(), state_dict=tensors
    )
    assert isinstance(other.up, RoadLayer)
    assert isinstance(other.down, nn.Linear)


def test_reading_and_writing_the_state_of_a_peft_model() -> None:
    first, second = (
        randomize(get_peft_model(Mlp(), _config(target_modules=["up"]))) for _ in range(2)
    )
    wanted = _values(first)
    assert not all(torch.equal(t, _values(second)[name]) for name, t in wanted.items())
    peft.set_peft_model_state_dict(second, wanted)
    assert all(torch.equal(t, _values(second)[name]) for name, t in wanted.items())


def test_status_of_layers_and_model() -> None:
    model = get_peft_model(Mlp(), _config(target_modules=["up"]))
    (layer,) = peft.get_layer_status(model)
    assert (layer.module_type, layer.enabled, layer.merged_adapters) == (
        "road.RoadLinear",
        True,
        [],
    )
    assert peft.get_model_status(model).trainable_params == 32


# ---- generation ---------------------------------------------------------------------------------


def _generate(model: nn.Module, **kwargs: Any) -> Tensor:
    return model.generate(
        input_ids=_ids(), attention_mask=torch.ones(2, 5), max_new_tokens=6, do_sample=False,
        eos_token_id=None, **kwargs,
    )  # fmt: skip


def test_generation_with_a_static_cache(model: LlamaForCausalLM, base: Path) -> None:
    wanted = _generate(model)
    assert not torch.equal(wanted, _generate(_load(base)))
    assert torch.equal(_generate(model, cache_implementation="static"), wanted)


def test_generation_follows_the_logits(model: LlamaForCausalLM) -> None:
    tokens = _ids()
    for _ in range(6):
        with torch.no_grad():
            step = model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat((tokens, step[:, None]), 1)
    assert torch.equal(_generate(model), tokens)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    words["[UNK]"] = words.pop(f"w{VOCABULARY - 1}")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[UNK]")


@pytest.mark.parametrize("wrapped", [False, True], ids=["mixin", "PeftModel"])
def test_the_text_generation_pipeline(wrapped: bool, base: Path, tokenizer) -> None:
    def answer(model: nn.Module) -> str:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        return generator("w1 w2 w3", max_new_tokens=6, do_sample=False)[0]["generated_text"]

    plain = answer(_load(base))
    if wrapped:
        model = get_peft_model(_load(base), _config(task_type="CAUSAL_LM"))
    else:
        model = _load(base)
        model.add_adapter(_config())
    assert answer(model) == plain
    tokens = randomize(model.eval()).generate(
        input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False
    )
    assert answer(model) != plain
    assert answer(model).replace(" ", "") == tokenizer.decode(tokens[0]).replace(" ", "")


# ---- kinds of models ----------------------------------------------------------------------------

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 1,
}
_ENCODER = {**{k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}, "num_labels": 3}
_VIT = {k: v for k, v in _ENCODER.items() if k not in ("vocab_size", "pad_token_id")}


@dataclass(frozen=True)
class Kind:
    """A model, the adapter for it, the number of layers that gets, and what else is trained."""

    settings: dict[str, Any]
    layers: int
    config: dict[str, Any] = field(default_factory=dict)
    saved: tuple[str, ...] = ()


_CLASSIFY = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
_EMBED = {"target_modules": ["embed_tokens", "q_proj"]}
# class in transformers: what is expected of it with target_modules=None where `config` says nothing
KINDS = {
    "LlamaForCausalLM": Kind(_SMALL, 7),
    "Qwen3ForCausalLM": Kind({**_SMALL, "head_dim": 8}, 7),
    "Gemma3ForCausalLM": Kind({**_SMALL, "head_dim": 8}, 7),
    "Phi3ForCausalLM": Kind(_SMALL, 4),  # one layer for q, k and v, and one for gate and up
    "GPT2LMHeadModel": Kind(
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}, 4
    ),
    "MistralForCausalLM": Kind(_SMALL, 2, _EMBED),
    "BertForSequenceClassification": Kind(_ENCODER, 6, _CLASSIFY, ("classifier",)),
    "RobertaForSequenceClassification": Kind(_ENCODER, 6, _CLASSIFY, ("classifier",)),
    "ViTForImageClassification": Kind(
        {**_VIT, "image_size": 8, "patch_size": 4},
        6,
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
        ("classifier",),
    ),
    "T5ForConditionalGeneration": Kind(
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        16,
        {"task_type": "SEQ_2_SEQ_LM"},
    ),
    "BartForConditionalGeneration": Kind(
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_position_embeddings": 32,
        },
        16,
        {"task_type": "SEQ_2_SEQ_LM"},
    ),
}


def _build(name: str) -> nn.Module:
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**KINDS[name].settings)).eval()


def _batch(name: str) -> dict[str, Tensor]:
    if "Image" in name:
        return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}
    labels = torch.tensor([0, 2]) if "Sequence" in name else _ids()
    return {"input_ids": _ids(), "labels": labels}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_model_is_adapted_trained_saved_loaded_and_merged(name: str, tmp_path) -> None:
    kind, batch = KINDS[name], _batch(name)
    config = RoadConfig(**{"group_size": 4, "variant": "road_2", **kind.config})
    base = _build(name)
    with torch.no_grad():
        plain = base(**batch).logits
    model = get_peft_model(base, config).eval()
    assert len(list(adapted(model))) == kind.layers
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)

    randomize(model)
    output = model(**batch)
    output.loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    others = {n for n in trained if "road_" not in n}
    assert all(any(saved in n for saved in kind.saved) for n in others)
    assert bool(others) is bool(kind.saved)
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not without
    torch.optim.SGD(trained.values(), lr=0.1).step()

    with torch.no_grad():
        wanted = model(**batch).logits
        assert not torch.allclose(wanted, plain, atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(_build(name), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, wanted)
        merged = loaded.merge_and_unload()
        assert not list(adapted(merged))
        torch.testing.assert_close(merged(**batch).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_not_from_transformers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(10, 8), Mlp(), nn.LayerNorm(4), nn.Linear(4, 2)).eval()

    config = _config(target_modules=["0", "1.up", "1.down"], group_size=4, modules_to_save=["3"])
    model = randomize(get_peft_model(build(), config))
    ids = torch.arange(6).view(2, 3)
    model(ids).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all(p.grad.any() for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    wanted = model(ids)
    assert not torch.allclose(wanted, build()(ids), atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(loaded(ids), wanted)
    assert_close(loaded.merge_and_unload()(ids), wanted)


# ---- copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_share_nothing(copied, merged: bool, base: Path) -> None:
    model = randomize(get_peft_model(_load(base), _config(task_type="CAUSAL_LM"))).eval()
    unmerged = _logits(model)
    if merged:
        model.merge_adapter()
    wanted = _logits(model)
    other = copied(model)
    assert torch.equal(_logits(other), wanted)
    storages = {p.data_ptr() for p in model.parameters()}
    assert not storages & {p.data_ptr() for p in other.parameters()}
    if merged:
        other.unmerge_adapter()
        assert torch.equal(_logits(other), unmerged)
        assert torch.equal(_logits(model), wanted)


def test_a_whole_model_is_saved_by_torch(base: Path, tmp_path: Path) -> None:
    model = randomize(get_peft_model(_load(base), _config(task_type="CAUSAL_LM"))).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(_logits(loaded), _logits(model))


def test_a_configuration_survives_pickle_and_json(tmp_path: Path) -> None:
    config = _config(target_modules=["up"], remainder="identity")
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, RoadConfig)
    assert loaded.remainder == "identity"
