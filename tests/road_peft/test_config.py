"""The configuration: what it refuses, what it saves, and what each layer gets of it.

| property                                          | how it is checked                          |
|---------------------------------------------------|--------------------------------------------|
| a field that cannot be meant is refused           | one message per field, and what is allowed |
| default fields leave no trace in the dictionary   | keys of upstream's own configuration       |
| every other value survives saving and loading     | equality of the dictionaries               |
| patterns choose the variant and the group size    | the layer that the name matches            |
| a plain `peft.RoadConfig` is accepted             | the layers that it gets                    |
"""

from __future__ import annotations

import json

import peft
import peft.tuners.road as stock
import pytest
import torch
from torch import nn

from road_peft import RoadConfig, RoadLayer
from tests.road_peft._models import Mlp, adapted, registered, tiny

# fields, a part of the message that names the value, and a part that says what is allowed
REFUSED = {
    "variant": ({"variant": "road_3"}, "road_3", "road_1, road_2 or road_4"),
    "number as variant": ({"variant": "1"}, "variant 1", "road_1, road_2 or road_4"),
    "odd group": ({"group_size": 63}, "63", "divisible by 2"),
    "no group": ({"group_size": 0}, "0", "divisible by 2"),
    "negative group": ({"group_size": -2}, "-2", "divisible by 2"),
    "remainder": ({"remainder": "drop"}, "'drop'", "'error' or 'identity'"),
    "variant pattern": ({"variant_pattern": {"up": "road_5"}}, "'road_5'", "'road_1', 'road_2'"),
    "group pattern": ({"group_size_pattern": {"up": 7}}, "'up'.*7", "even and positive"),
    "zero in group pattern": ({"group_size_pattern": {"up": 0}}, "'up'.*0", "even and positive"),
    "recompute road_2": ({"recompute": True, "variant": "road_2"}, "recompute", "road_1"),
    "recompute a pattern": (
        {"recompute": True, "variant_pattern": {"up": "road_4"}},
        "recompute",
        "road_1",
    ),
    "rank": ({"lora_rank": -1}, "-1", "0 .* or positive"),
    "dropout": ({"lora_dropout": 1.0}, "1.0", r"\[0, 1\)"),
    "negative dropout": ({"lora_dropout": -0.1}, "-0.1", r"\[0, 1\)"),
    "pattern alone": ({"layers_pattern": "layers"}, "layers_pattern", "both or neither"),
    "blocks of an expression": (
        {"target_modules": ".*up", "layers_to_transform": [0]},
        "layers_to_transform",
        "regular expression",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_is_refused_with_its_value_and_what_is_allowed(case: str) -> None:
    fields, value, allowed = REFUSED[case]
    with pytest.raises(ValueError, match=value) as error:
        RoadConfig(**fields)
    assert error.match(allowed)


def test_blocks_may_be_chosen_of_all_linear() -> None:
    config = RoadConfig(target_modules="all-linear", layers_to_transform=[0])
    assert config.layers_to_transform == [0]


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_default_fields_leave_upstreams_dictionary(variant: str) -> None:
    shared = {
        "variant": variant,
        "group_size": 8,
        "target_modules": ["up"],
        "modules_to_save": ["down"],
    }
    assert RoadConfig(**shared).to_dict() == stock.RoadConfig(**shared).to_dict()


def test_default_of_every_field_leaves_upstreams_dictionary() -> None:
    assert RoadConfig().to_dict() == stock.RoadConfig().to_dict()


# every field of ours with a value that is not its default
OWN = {
    "exclude_modules": {"down"},
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "variant_pattern": {"up": "road_4"},
    "group_size_pattern": {"up": 2},
    "remainder": "identity",
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [1, 2],
    "lora_rank": 2,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "recompute": True,
    "exact_unmerge": False,
}


def _fields(name: str) -> dict:
    return {name: OWN[name]} | ({"layers_to_transform": [1]} if name == "layers_pattern" else {})


def test_the_table_of_own_fields_is_complete() -> None:
    ours = set(RoadConfig.__dataclass_fields__) - set(stock.RoadConfig.__dataclass_fields__)
    assert set(OWN) == ours


@pytest.mark.parametrize("name", OWN)
def test_a_field_of_ours_survives_saving_and_loading(name: str, tmp_path) -> None:
    config = RoadConfig(target_modules=["up", "down"], **_fields(name))
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "adapter_config.json").read_text())
    loaded = RoadConfig.from_pretrained(tmp_path)
    generic = peft.PeftConfig.from_pretrained(tmp_path)
    for again in (loaded, generic):
        assert type(again) is RoadConfig
        assert again.variant == "road_1"
        assert again.to_dict() == {**config.to_dict(), "inference_mode": again.inference_mode}


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize(
    "name",
    [
        "variant_pattern",
        "group_size_pattern",
        "target_parameters",
        "trainable_token_indices",
        "lora_rank",
    ],
)
def test_a_field_that_changes_the_function_makes_stock_peft_refuse_the_file(
    name: str, variant: str, tmp_path
) -> None:
    RoadConfig(target_modules=["up"], variant=variant, **_fields(name)).save_pretrained(tmp_path)
    with (
        registered("stock") as config_class,
        pytest.raises(ValueError, match=f"Invalid variant {variant} .*needs road_peft"),
        pytest.warns(UserWarning, match="Unexpected keyword arguments"),
    ):
        config_class.from_pretrained(tmp_path)
    assert RoadConfig.from_pretrained(tmp_path).variant == variant


def test_to_dict_does_not_change_the_configuration() -> None:
    config = RoadConfig(target_modules=["up"], variant="road_2", lora_rank=2)
    first = config.to_dict()
    assert config.to_dict() == first
    assert config.variant == "road_2"


def test_the_type_cannot_be_overridden() -> None:
    assert RoadConfig(peft_type="test").peft_type == peft.PeftType.ROAD


def _layers(model: nn.Module) -> dict[str, RoadLayer]:
    return {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, RoadLayer)}


def test_patterns_choose_variant_and_group_size_by_suffix_and_by_expression() -> None:
    config = RoadConfig(
        group_size=8,
        variant="road_2",
        variant_pattern={"q_proj": "road_4", r".*layers\.1\.mlp\..*": "road_1"},
        group_size_pattern={r"layers\.0\.self_attn\.v_proj": 4, "down_proj": 2},
    )
    layers = _layers(peft.get_peft_model(tiny("llama"), config))
    chosen = {
        name.removeprefix("model."): (layer.variant["default"], layer.group_size["default"])
        for name, layer in layers.items()
    }
    assert chosen == {
        **{
            f"layers.{i}.self_attn.{n}": ("road_2", 8)
            for i in (0, 1)
            for n in ("k_proj", "v_proj", "o_proj")
        },
        **{f"layers.{i}.self_attn.q_proj": ("road_4", 8) for i in (0, 1)},
        "layers.0.self_attn.v_proj": ("road_2", 4),
        **{f"layers.0.mlp.{n}": ("road_2", 8) for n in ("gate_proj", "up_proj")},
        **{f"layers.1.mlp.{n}": ("road_1", 8) for n in ("gate_proj", "up_proj")},
        "layers.0.mlp.down_proj": ("road_2", 2),
        "layers.1.mlp.down_proj": ("road_1", 2),
    }
    sizes = {"road_1": 1, "road_2": 2, "road_4": 4}
    for layer in layers.values():
        wanted = layer.out_features // 2 * sizes[layer.variant["default"]]
        assert layer.road_theta["default"].shape == layer.road_alpha["default"].shape == (wanted,)


def test_a_plain_peft_configuration_gets_our_layers_with_our_defaults() -> None:
    config = stock.RoadConfig(target_modules=["up"], group_size=4, variant="road_2")
    model = peft.get_peft_model(Mlp(), config)
    (layer,) = adapted(model)
    assert isinstance(layer, RoadLayer)
    assert (layer.variant, layer.group_size) == ({"default": "road_2"}, {"default": 4})
    assert layer.exact_unmerge
    assert len(layer.road_lora_A) == 0


def test_a_plain_peft_configuration_without_targets_gets_all_linear_layers_of_the_blocks() -> None:
    model = peft.get_peft_model(tiny("llama"), stock.RoadConfig(group_size=8))
    assert len(_layers(model)) == 2 * 7


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_init_weights_false_draws_values_for_tests(variant: str) -> None:
    torch.manual_seed(1)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(2, 4096)),
        RoadConfig(target_modules=["0"], variant=variant, init_weights=False),
    )
    (layer,) = adapted(model)
    theta, alpha = layer.road_theta["default"], layer.road_alpha["default"]
    assert abs(theta.mean().item()) < 0.05
    assert abs(theta.std().item() - 0.5) < 0.05
    assert abs(alpha.mean().item() - 1) < 0.05
    assert abs(alpha.std().item() - 0.5) < 0.05
