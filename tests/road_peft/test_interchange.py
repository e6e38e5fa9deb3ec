"""Files and registries that this library shares with PEFT's own RoAd.

| property                                         | how it is checked                            |
|--------------------------------------------------|----------------------------------------------|
| files hold upstream's keys, shapes and dtypes    | bytes of both libraries' files               |
| adapters go both ways                            | outputs after loading with the other library |
| chosen modules are saved by name                 | stock PEFT computes the same                 |
| what stock PEFT cannot compute, it refuses       | the message; we load it again                |
| register and unregister                          | the mappings; models built before            |
| the ways into a model                            | get, load, inject, transformers' methods     |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import peft.tuners.road as stock
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from torch import Tensor, nn

import road_peft
from road_peft import RoadConfig, RoadLayer, RoadModel
from tests.helpers import assert_close
from tests.road_peft._models import (
    LIBRARIES,
    Mlp,
    adapted,
    call_silently,
    randomize,
    registered,
    tiny,
    with_adapters,
)

VARIANTS = ("road_1", "road_2", "road_4")
TOKENS = torch.arange(12).view(2, 6)
QV = ["q_proj", "v_proj"]


def _fresh() -> nn.Module:
    """Build the same model every time."""
    torch.manual_seed(11)
    return tiny("llama")


def _save(folder: Path, config: Any) -> tuple[peft.PeftModel, Tensor]:
    model = with_adapters(_fresh(), {"default": config})
    model.save_pretrained(folder)
    return model, model(TOKENS).logits


def _load(library: str, folder: Path) -> peft.PeftModel:
    with registered(library):
        return call_silently(peft.PeftModel.from_pretrained, _fresh(), folder)


# ---- what is in the files ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_libraries_write_the_same_bytes(variant: str, dtype, tmp_path) -> None:
    for library in LIBRARIES:
        with registered(library) as config_class:
            config = config_class(target_modules=QV, group_size=8, variant=variant)
            base = _fresh().to(dtype)
            model = peft.get_peft_model(base, config)
        torch.manual_seed(3)
        randomize(model).save_pretrained(tmp_path / library)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = ((tmp_path / lib / name).read_bytes() for lib in ("ours", "stock"))
        if name.endswith("json"):
            ours, theirs = (_without_order(json.loads(text)) for text in (ours, theirs))
        assert ours == theirs


def _without_order(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "target_modules": sorted(config["target_modules"])}


@pytest.mark.parametrize(
    ("variant", "q", "v"), [("road_1", 8, 4), ("road_2", 16, 8), ("road_4", 32, 16)]
)
def test_a_file_holds_two_float32_vectors_per_layer(variant, q, v, tmp_path) -> None:
    _save(tmp_path, RoadConfig(target_modules=QV, group_size=8, variant=variant))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    assert {name: (t.dtype, tuple(t.shape)) for name, t in saved.items()} == {
        f"{prefix}.{i}.self_attn.{module}.{vector}": (torch.float32, (size,))
        for i in (0, 1)
        for module, size in (("q_proj", q), ("v_proj", v))
        for vector in ("road_theta", "road_alpha")
    }


def test_a_configuration_file_has_exactly_upstreams_keys(tmp_path) -> None:
    _save(tmp_path, RoadConfig(target_modules=QV, group_size=8))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved.keys() == stock.RoadConfig().to_dict().keys()
    assert saved["peft_type"] == "ROAD"


def test_default_targets_are_saved_so_that_stock_peft_finds_the_same_layers(tmp_path) -> None:
    _, wanted = _save(tmp_path, RoadConfig(group_size=8))
    assert_close(_load("stock", tmp_path)(TOKENS).logits, wanted)


# ---- there and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("writer", "reader"), [("stock", "ours"), ("ours", "stock")])
def test_an_adapter_computes_the_same_in_the_other_library(
    writer, reader, variant, tmp_path
) -> None:
    with registered(writer) as config_class:
        _, wanted = _save(tmp_path, config_class(target_modules=QV, group_size=4, variant=variant))
    model = _load(reader, tmp_path)
    assert all(isinstance(m, RoadLayer) == (reader == "ours") for m in adapted(model))
    assert_close(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_our_own_adapter_comes_back_to_the_bit(
    rank: int, low_cpu_mem_usage: bool, tmp_path
) -> None:
    model, wanted = _save(tmp_path, RoadConfig(group_size=8, lora_rank=rank))
    loaded = peft.PeftModel.from_pretrained(_fresh(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(TOKENS).logits, wanted)
    assert not any(p.is_meta for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert torch.equal(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_bfloat16_model_loads_its_adapter_in_float32(low_cpu_mem_usage: bool, tmp_path) -> None:
    _save(tmp_path, RoadConfig(target_modules=QV, group_size=8))
    loaded = peft.PeftModel.from_pretrained(
        _fresh().bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert {p.dtype for n, p in loaded.named_parameters() if "road_" in n} == {torch.float32}


# ---- chosen modules ---------------------------------------------------------------------------

CHOICES: dict[str, dict[str, Any]] = {
    "exclude_modules": {"exclude_modules": ["mlp.up_proj", "k_proj"]},
    "layers_to_transform": {"layers_to_transform": [1], "target_modules": QV},
    "default modules of a block": {"layers_to_transform": [0]},
    "layers_pattern": {
        "layers_to_transform": [1],
        "layers_pattern": "layers",
        "target_modules": QV,
    },
}


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("case", CHOICES)
def test_chosen_modules_are_saved_by_name_so_that_stock_peft_computes_the_same(
    case: str, init_weights: bool, tmp_path
) -> None:
    config = RoadConfig(group_size=8, init_weights=init_weights, **CHOICES[case])
    model, wanted = _save(tmp_path, config)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved.keys() == stock.RoadConfig().to_dict().keys()
    assert set(saved["target_modules"]) == {n for n, _ in model.base_model.road_layers()}
    assert saved["init_weights"] is True
    assert_close(_load("stock", tmp_path)(TOKENS).logits, wanted)
    assert torch.equal(_load("ours", tmp_path)(TOKENS).logits, wanted)


# ---- what stock PEFT cannot compute -----------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "variant_pattern": {"variant_pattern": {"q_proj": "road_4"}},
    "group_size_pattern": {"group_size_pattern": {"v_proj": 2}},
    "lora": {"lora_rank": 2, "lora_alpha": 4},
    "tokens": {"trainable_token_indices": [3, 5]},
    "with chosen modules": {"lora_rank": 2, "layers_to_transform": [0]},
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_file_that_stock_peft_cannot_compute_is_refused_by_it_and_read_by_us(
    case: str, tmp_path
) -> None:
    _, wanted = _save(tmp_path, RoadConfig(target_modules=QV, group_size=4, **CHANGES[case]))
    with pytest.raises(ValueError, match=r"Invalid variant road_1 \(needs road_peft\)"):
        _load("stock", tmp_path)
    loaded = _load("ours", tmp_path)
    assert torch.equal(loaded(TOKENS).logits, wanted)
    assert loaded.peft_config["default"].variant == "road_1"


def test_a_tail_that_stock_peft_cannot_leave_alone_is_refused_by_it(tmp_path) -> None:
    config = RoadConfig(target_modules=["up_proj"], group_size=16, remainder="identity")
    _, wanted = _save(tmp_path, config)
    with pytest.raises(ValueError, match="divisible by group_size"):
        _load("stock", tmp_path)
    assert torch.equal(_load("ours", tmp_path)(TOKENS).logits, wanted)


@pytest.mark.parametrize("field", ["recompute", "exact_unmerge", "lora_alpha", "lora_dropout"])
def test_a_field_that_changes_no_output_is_ignored_by_stock_peft(field: str, tmp_path) -> None:
    value = {"recompute": True, "exact_unmerge": False, "lora_alpha": 8, "lora_dropout": 0.5}
    config = RoadConfig(target_modules=QV, group_size=8, **{field: value[field]})
    _, wanted = _save(tmp_path, config)
    assert_close(_load("stock", tmp_path)(TOKENS).logits, wanted)
    assert getattr(_load("ours", tmp_path).peft_config["default"], field) == value[field]


# ---- tokens and modules to save ---------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_trained_saved_and_loaded(tied: bool, tmp_path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(11)
        return tiny("llama", tie_word_embeddings=tied)

    config = RoadConfig(target_modules=QV, group_size=8, trainable_token_indices=[3, 4])
    model = peft.get_peft_model(base(), config).train()
    before = model.get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.eval()
    wrapper = model.base_model.model.model.embed_tokens
    changed = (wrapper.token_adapter.get_merged_weights(["default"]) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 4]
    wanted = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    tokens = [t for name, t in saved.items() if "trainable_tokens_delta" in name]
    assert [tuple(t.shape) for t in tokens] == [(2, 16)]
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, wanted)


@pytest.mark.parametrize(("writer", "reader"), [("stock", "ours"), ("ours", "stock")])
def test_modules_to_save_go_both_ways(writer: str, reader: str, tmp_path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(11)
        return Mlp()

    x = torch.randn(3, 8)
    with registered(writer) as config_class:
        config = config_class(target_modules=["up"], group_size=4, modules_to_save=["down"])
        model = with_adapters(base(), {"default": config})
    with torch.no_grad():
        model.base_model.model.down.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    with registered(reader):
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert_close(loaded(x), model(x))


# ---- the registry -----------------------------------------------------------------------------

ROAD = peft.PeftType.ROAD


def _classes() -> tuple[type, type]:
    return PEFT_TYPE_TO_CONFIG_MAPPING[ROAD], PEFT_TYPE_TO_TUNER_MAPPING[ROAD]


def test_registering_and_unregistering_may_be_repeated() -> None:
    try:
        for _ in range(2):
            road_peft.register()
            assert _classes() == (RoadConfig, RoadModel)
        for _ in range(2):
            road_peft.unregister()
            assert _classes() == (stock.RoadConfig, stock.RoadModel)
    finally:
        road_peft.register()
    assert _classes() == (RoadConfig, RoadModel)


def test_our_classes_are_upstreams_to_isinstance() -> None:
    model = peft.get_peft_model(Mlp(), RoadConfig(target_modules=["up"], group_size=4))
    assert isinstance(model.peft_config["default"], stock.RoadConfig)
    assert isinstance(model.base_model, stock.RoadModel)
    assert all(isinstance(layer, stock.RoadLayer) for layer in adapted(model))


def test_a_stock_configuration_gets_our_layers_while_we_are_registered() -> None:
    config = stock.RoadConfig(target_modules=["up"], group_size=4)
    with registered("stock"):
        (layer,) = adapted(peft.get_peft_model(Mlp(), config))
        assert not isinstance(layer, RoadLayer)
    (layer,) = adapted(peft.get_peft_model(Mlp(), config))
    assert isinstance(layer, RoadLayer)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_model_built_before_a_switch_keeps_its_layers_and_works(library: str, tmp_path) -> None:
    with registered(library) as config_class:
        config = config_class(target_modules=["up", "down"], group_size=4)
        model = with_adapters(Mlp(), {"default": config})
        model.save_pretrained(tmp_path)
    other = "ours" if library == "stock" else "stock"
    x = torch.randn(3, 8)
    wanted = model(x)
    with registered(other):
        model.add_adapter("second", config)
        model.load_adapter(tmp_path, "third")
        assert torch.equal(model(x), wanted)
        model.set_adapter("third")
        assert torch.equal(model(x), wanted)
        model.merge_adapter()
        assert_close(model(x), wanted)
        model.unmerge_adapter()
        model.delete_adapter("second")
        model.save_pretrained(tmp_path / "again")
    assert all(isinstance(m, RoadLayer) == (library == "ours") for m in adapted(model))
    saved = load_file(tmp_path / "again" / "third" / "adapter_model.safetensors")
    first = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == first.keys()


# ---- the ways in ------------------------------------------------------------------------------


def test_injection_into_a_bare_model_and_its_state_dict() -> None:
    config = RoadConfig(target_modules=["up"], group_size=4)
    model = randomize(peft.inject_adapter_in_model(config, Mlp()))
    assert isinstance(model.up, RoadLayer)
    state = peft.get_peft_model_state_dict(model)
    assert set(state) == {"up.road_theta", "up.road_alpha"}
    other = peft.inject_adapter_in_model(config, Mlp())
    peft.set_peft_model_state_dict(other, state)
    for name in ("road_theta", "road_alpha"):
        ours, theirs = (getattr(m.up, name)["default"] for m in (model, other))
        assert torch.equal(ours, theirs)


def test_injection_by_a_state_dict_finds_the_layers() -> None:
    config = RoadConfig(target_modules=["up"], group_size=4)
    state = peft.get_peft_model_state_dict(peft.inject_adapter_in_model(config, Mlp()))
    model = peft.inject_adapter_in_model(
        RoadConfig(target_modules=["nothing"], group_size=4), Mlp(), state_dict=state
    )
    assert isinstance(model.up, RoadLayer)
    assert isinstance(model.down, nn.Linear)


def test_transformers_own_adapter_methods(tmp_path) -> None:
    model = _fresh()
    base = model(TOKENS).logits
    model.add_adapter(RoadConfig(target_modules=QV, group_size=8), "one")
    randomize(model)
    wanted = model(TOKENS).logits
    assert not torch.equal(wanted, base)
    model.disable_adapters()
    assert torch.equal(model(TOKENS).logits, base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    again = _fresh()
    again.load_adapter(str(tmp_path), adapter_name="two")
    assert torch.equal(again(TOKENS).logits, wanted)
    again.add_adapter(RoadConfig(target_modules=["k_proj"], group_size=8), "three")
    again.set_adapter(["two", "three"])
    assert torch.equal(again(TOKENS).logits, wanted)
    again.delete_adapter("two")
    assert not any(".two" in n for n, _ in again.named_parameters())


def test_saving_a_merged_model_saves_the_adapter_unchanged(tmp_path) -> None:
    model, wanted = _save(tmp_path / "before", RoadConfig(target_modules=QV, group_size=8))
    model.merge_adapter()
    model.save_pretrained(tmp_path / "after")
    before, after = (
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("before", "after")
    )
    assert before == after
    assert torch.equal(_load("ours", tmp_path / "after")(TOKENS).logits, wanted)


def test_a_changed_adapter_does_not_share_names_with_another(tmp_path) -> None:
    """Names within each other, and a module whose name holds PEFT's prefix."""

    class Broad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.broad_proj = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.broad_proj(x)

    base = Broad()
    state = base.state_dict()
    config = RoadConfig(target_modules=["broad_proj"], group_size=4)
    model = with_adapters(base, {"a": config, "aa": config})
    x = torch.randn(2, 8)
    outputs = {}
    for name in ("a", "aa"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.save_pretrained(tmp_path)
    for name in ("a", "aa"):
        fresh = Broad()
        fresh.load_state_dict(state)
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / name)
        assert torch.equal(loaded(x), outputs[name])
