"""Merging into the base weights and back, and what happens when it cannot be done.

| property                                          | oracle                                       |
|---------------------------------------------------|----------------------------------------------|
| the merged layer computes what the adapted one did| outputs before; rounding floor in bfloat16   |
| unmerge                                           | bytes of the base                            |
| exact_unmerge=False                               | the inverse of each block, tolerance of dtype|
| disable_adapter on a merged model                 | the base's outputs and bytes                 |
| merge is all or nothing                           | bytes of the whole model after a failure     |
| tied and singular weights                         | refused by name                              |
| unload, delete, status, copies of merged models   | names, bytes, outputs                        |
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from road_peft import RoadConfig, RoadLayer
from tests.helpers import assert_close, dense_rotation
from tests.road_peft._models import (
    Mlp,
    adapted,
    by_hand,
    bytes_of,
    call_silently,
    layer_of,
    set_values,
    tiny,
    with_adapters,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.bfloat16, torch.float16)

# kind: base layer with 6 inputs and 16 outputs, and an input
BASES: dict[str, Any] = {
    "bias": lambda: (nn.Linear(6, 16), torch.randn(9, 6)),
    "no bias": lambda: (nn.Linear(6, 16, bias=False), torch.randn(9, 6)),
    "conv1d": lambda: (Conv1D(16, 6), torch.randn(9, 6)),
    "embedding": lambda: (nn.Embedding(6, 16), torch.tensor([5, 0, 0, 3])),
}
# adapters that are merged one after another, by their fields
STACKS: dict[str, list[dict[str, Any]]] = {
    "road_1": [{}],
    "road_4": [{"variant": "road_4"}],
    "two groups": [{"group_size": 2, "variant": "road_2"}, {"group_size": 8}],
    "three": [{}, {"group_size": 16, "variant": "road_4"}, {"group_size": 2}],
    "tail": [{"group_size": 6, "remainder": "identity"}, {"variant": "road_2"}],
    "lora": [{"lora_rank": 2}],
    "two loras": [{"lora_rank": 2, "variant": "road_2"}, {"lora_rank": 3, "group_size": 2}],
}


def _layer(kind: str, stack: str, dtype: torch.dtype, **settings: Any) -> tuple[RoadLayer, Tensor]:
    base, x = BASES[kind]()
    if isinstance(base, Conv1D):
        nn.init.normal_(base.bias)
    model = with_adapters(
        nn.Sequential(base.to(dtype)),
        {
            f"a{i}": RoadConfig(target_modules=["0"], **{"group_size": 4, **fields, **settings})
            for i, fields in enumerate(STACKS[stack])
        },
    )
    layer = model.base_model.model[0]
    layer.set_adapter([f"a{i}" for i in range(len(STACKS[stack]))])
    return layer, x.to(dtype) if x.is_floating_point() else x


CASES = [
    (kind, stack)
    for kind in BASES
    for stack in STACKS
    if not (kind == "embedding" and "lora" in stack)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "stack"), CASES)
def test_a_merged_layer_computes_what_the_adapters_did_and_unmerges_to_the_byte(
    kind: str, stack: str, dtype
) -> None:
    layer, x = _layer(kind, stack, dtype)
    before, wanted = bytes_of(layer), layer(x)
    base_output = layer.base_layer(x)
    layer.merge()
    assert layer.merged_adapters == layer.active_adapters
    assert bytes_of(layer) != before
    merged = layer(x)
    assert merged.dtype == wanted.dtype == dtype
    assert (merged - base_output).abs().max() > 0.05
    if dtype in HALF:  # every step of both ways rounds; the floor has a test of its own
        assert (merged - wanted).abs().max() < 0.05 * wanted.abs().max()
    else:
        assert_close(merged, wanted)
    layer.unmerge()
    assert bytes_of(layer) == before
    assert torch.equal(layer(x), wanted)
    assert layer.merged_adapters == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stack", ["two groups", "three", "two loras"])
def test_adapters_merged_one_after_another_are_as_if_merged_at_once(stack: str, dtype) -> None:
    layer, _ = _layer("bias", stack, dtype)
    before = bytes_of(layer)
    layer.merge()
    at_once = bytes_of(layer)
    layer.unmerge()
    for name in list(layer.active_adapters):
        call_silently(layer.merge, adapter_names=[name])
    assert bytes_of(layer) == at_once
    assert layer.merged_adapters == layer.active_adapters
    layer.unmerge()
    assert bytes_of(layer) == before


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("stack", ["road_1", "two groups", "lora"])
def test_a_half_precision_merge_is_at_the_rounding_floor(stack: str, dtype) -> None:
    layer, _ = _layer("bias", stack, dtype)
    names = layer.active_adapters
    weight, bias = (p.data.double() for p in (layer.base_layer.weight, layer.base_layer.bias))
    for name in names:
        theta, alpha = layer.road_theta[name].double(), layer.road_alpha[name].double()
        group = layer.group_size[name]
        dense = dense_rotation(*by_hand(layer.variant[name], theta, alpha, group), group, 16)
        weight, bias = dense @ weight, dense @ bias
    for name in names:
        if name in layer.road_lora_A:
            a, b = layer.road_lora_A[name].double(), layer.road_lora_B[name].double()
            weight = weight + layer.lora_scale[name] * b @ a
    layer.merge()
    for exact, merged in ((weight, layer.base_layer.weight), (bias, layer.base_layer.bias)):
        floor = (exact.to(dtype).double() - exact).norm()
        assert (merged.double() - exact).norm() <= floor * 1.001


def test_a_double_precision_merge_is_exact_to_double_precision() -> None:
    layer, x = _layer("bias", "road_1", torch.float64)
    wanted = layer(x)
    layer.merge()
    assert_close(layer(x), wanted)


@pytest.mark.parametrize("cycles", [1, 10])
def test_merging_again_and_again_changes_nothing(cycles: int) -> None:
    model = with_adapters(
        Mlp().bfloat16(), {"default": RoadConfig(target_modules=["up"], group_size=4)}
    )
    before = bytes_of(model)
    for _ in range(cycles):
        model.merge_adapter()
        model.unmerge_adapter()
    assert bytes_of(model) == before


# ---- without the copy -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "stack"), CASES)
def test_without_the_copy_unmerging_inverts_each_block(kind: str, stack: str, dtype) -> None:
    layer, x = _layer(kind, stack, dtype, exact_unmerge=False)
    base, wanted = layer.base_layer, layer(x)
    tensors = {n: p.data.clone() for n, p in base.named_parameters()}
    layer.merge()
    if dtype not in HALF:
        assert_close(layer(x), wanted)
    largest = {n: p.abs().max().double() for n, p in base.named_parameters()}
    assert (base.weight - tensors["weight"]).abs().max() > 0.05 * largest["weight"]
    layer.unmerge()
    for name, parameter in base.named_parameters():
        error = (parameter.double() - tensors[name].double()).abs().max()
        # the merged weight is rounded, and its error is multiplied by the inverse
        assert error <= 16 * torch.finfo(dtype).eps * largest[name]


def test_an_adapter_added_without_the_copy_does_not_take_it_from_another() -> None:
    fields = {"target_modules": ["up"], "group_size": 4}
    configs = {"a": RoadConfig(**fields), "b": RoadConfig(**fields, exact_unmerge=False)}
    model = with_adapters(Mlp().bfloat16(), configs)
    before = bytes_of(model)
    model.merge_adapter(adapter_names=["a"])
    model.unmerge_adapter()
    assert bytes_of(model) == before


def test_without_the_copy_a_disabled_merged_layer_inverts_the_rotation_of_its_output() -> None:
    for stack in ("road_4", "two groups", "two loras"):
        layer, x = _layer("bias", stack, torch.float32, exact_unmerge=False)
        wanted = layer.base_layer(x)
        layer.merge()
        merged = bytes_of(layer)
        layer.enable_adapters(False)
        assert (layer(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert bytes_of(layer) == merged


# ---- disabled while merged --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert classifier"])
def test_disable_adapter_on_a_merged_model_gives_the_base_and_changes_no_byte(name, dtype) -> None:
    base = tiny(name, dtype=dtype)
    tokens = torch.arange(12).view(2, 6)
    wanted = base(tokens).logits
    model = with_adapters(base, {"default": RoadConfig(group_size=8)})
    model.merge_adapter()
    merged, output = bytes_of(model), model(tokens).logits
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, wanted)
    assert bytes_of(model) == merged
    assert torch.equal(model(tokens).logits, output)
    assert all(layer.merged for layer in adapted(model))
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, wanted)


# ---- all or nothing ---------------------------------------------------------------------------

BROKEN = ("weight", "bias", "road_alpha", "road_lora_B")
WAYS: dict[str, Any] = {
    "merge_adapter": lambda m: m.merge_adapter(safe_merge=True),
    "merge_and_unload": lambda m: m.merge_and_unload(safe_merge=True),
    "by name": lambda m: m.merge_adapter(adapter_names=["default"], safe_merge=True),
}


def _break(layer: RoadLayer, what: str, value: float = float("nan")) -> None:
    with torch.no_grad():
        if what in ("weight", "bias"):
            getattr(layer.get_base_layer(), what).view(-1)[1] = value
        else:
            getattr(layer, what)["default"].view(-1)[1] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("way", WAYS)
def test_a_safe_merge_that_fails_in_a_later_layer_changes_no_byte_of_any(way, what, value) -> None:
    model = with_adapters(
        Mlp(), {"default": RoadConfig(target_modules=["up", "down"], group_size=4, lora_rank=2)}
    )
    up, down = adapted(model)
    _break(down, what, value)
    before = bytes_of(model)
    kind = "bias" if what == "bias" else "weights"
    with pytest.raises(ValueError, match=f"^down: NaNs detected in the merged {kind}.*default"):
        WAYS[way](model)
    assert bytes_of(model) == before
    assert not up.merged
    assert not down.merged
    assert set(model.peft_config) == {"default"}
    _break(down, what, 0.5)
    model.merge_adapter(safe_merge=True)
    assert up.merged
    assert down.merged


def test_a_safe_merge_of_one_layer_that_fails_changes_no_byte_of_it() -> None:
    layer = layer_of(nn.Linear(6, 8))
    _break(layer, "bias")
    before = bytes_of(layer)
    with pytest.raises(ValueError, match="NaNs detected in the merged bias"):
        layer.merge(safe_merge=True)
    assert bytes_of(layer) == before
    assert not layer.merged


def test_a_safe_merge_sees_what_overflows_in_half_precision() -> None:
    layer = layer_of(nn.Linear(6, 8).half())
    with torch.no_grad():
        layer.base_layer.weight.fill_(40000)
        layer.road_alpha["default"].fill_(2)
        layer.road_theta["default"].zero_()
    before = bytes_of(layer)
    with pytest.raises(ValueError, match="merged weights"):
        layer.merge(safe_merge=True)
    assert bytes_of(layer) == before


# ---- singular blocks --------------------------------------------------------------------------


def _singular(layer: RoadLayer) -> None:
    """Make the second of two pairs (1, 3) collapse: rows turned a right angle apart."""
    set_values(layer, [0.1, 0.0, 0.2, torch.pi / 2], [1.0, 1.0, 1.0, 1.0])


def test_a_singular_block_is_refused_by_name_if_the_weight_is_not_kept() -> None:
    settings = {"group_size": 4, "variant": "road_2", "exact_unmerge": False}
    model = with_adapters(Mlp(), {"default": RoadConfig(target_modules=["up", "down"], **settings)})
    up, down = adapted(model)
    _singular(down)
    before = bytes_of(model)
    with pytest.raises(
        ValueError,
        match=r"^down: adapter 'default' has 1 singular block.* number 1:.*exact_unmerge",
    ):
        model.merge_adapter()
    assert bytes_of(model) == before
    assert not up.merged


@pytest.mark.parametrize("alpha", [0.0, float("nan")])
def test_a_scale_of_zero_or_nan_is_singular(alpha: float) -> None:
    layer = layer_of(nn.Linear(6, 8), exact_unmerge=False)
    with torch.no_grad():
        layer.road_alpha["default"][2] = alpha
    before = bytes_of(layer)
    with pytest.raises(ValueError, match=r"1 singular block.* number 2"):
        layer.merge()
    assert bytes_of(layer) == before


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_a_small_or_large_scale_is_not_singular(scale: float) -> None:
    layer = layer_of(nn.Linear(6, 8), exact_unmerge=False)
    weight = layer.base_layer.weight.data.clone()
    with torch.no_grad():
        layer.road_alpha["default"].fill_(scale)
    layer.merge()
    layer.unmerge()
    assert (layer.base_layer.weight - weight).abs().max() <= 1e-5 * weight.abs().max()


def test_a_singular_block_merges_and_comes_back_if_the_weight_is_kept() -> None:
    layer = layer_of(nn.Linear(6, 4), variant="road_2")
    _singular(layer)
    before, x = bytes_of(layer), torch.randn(3, 6)
    wanted = layer(x)
    layer.merge()
    assert_close(layer(x), wanted)
    layer.unmerge()
    assert bytes_of(layer) == before


def test_a_block_that_becomes_singular_after_merging_makes_unmerge_refuse_and_change_nothing() -> (
    None
):
    layer = layer_of(nn.Linear(6, 8), exact_unmerge=False)
    layer.merge()
    with torch.no_grad():
        layer.road_alpha["default"].zero_()
    before = bytes_of(layer)
    with pytest.raises(ValueError, match="singular"):
        layer.unmerge()
    assert bytes_of(layer) == before
    assert layer.merged_adapters == ["default"]


# ---- tied weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_a_tied_weight_is_refused_with_the_names_of_both(way: str, target: str) -> None:
    model = with_adapters(
        tiny("llama", tie_word_embeddings=True),
        {"default": RoadConfig(target_modules=["q_proj", target], group_size=8)},
    )
    before = bytes_of(model)
    with pytest.raises(ValueError, match="tied") as error:
        call_silently(getattr(model, way))
    for name in ("lm_head", "model.embed_tokens", "tie_word_embeddings=False", "target_modules"):
        assert name in str(error.value)
    assert bytes_of(model) == before
    assert not any(layer.merged for layer in adapted(model))


def test_untied_embedding_and_head_are_merged() -> None:
    base, tokens = tiny("llama"), torch.arange(12).view(2, 6)
    model = with_adapters(
        base.double(),
        {"default": RoadConfig(target_modules=["lm_head", "embed_tokens"], group_size=8)},
    )
    before, wanted = bytes_of(model), model(tokens).logits
    model.merge_adapter()
    assert (model(tokens).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    model.unmerge_adapter()
    assert bytes_of(model) == before


def test_a_tied_head_that_has_no_active_adapter_does_not_stop_a_merge() -> None:
    model = with_adapters(
        tiny("llama", tie_word_embeddings=True),
        {
            "default": RoadConfig(target_modules=["q_proj"], group_size=8),
            "head": RoadConfig(target_modules=["lm_head"], group_size=8),
        },
    )
    model.merge_adapter()
    assert [m.merged_adapters for m in adapted(model)].count(["default"]) == 2


# ---- whole models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "roberta"])
def test_merge_and_unload_gives_a_plain_model_that_computes_the_same(name: str) -> None:
    base, tokens = tiny(name, dtype=torch.float64), torch.arange(12).view(2, 6)
    kinds = {n: type(m) for n, m in base.named_modules()}
    model = with_adapters(base, {"default": RoadConfig(group_size=8)})
    wanted = model(tokens)[0]
    merged = model.merge_and_unload()
    assert {n: type(m) for n, m in merged.named_modules()} == kinds
    assert (merged(tokens)[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not any("road_" in n for n in merged.state_dict())


def test_merge_and_unload_of_several_adapters_by_name() -> None:
    fields = {"target_modules": ["up", "down"], "variant": "road_2"}
    model = with_adapters(
        Mlp(),
        {
            "a": RoadConfig(**fields, group_size=4),
            "b": RoadConfig(**fields, group_size=2),
            "c": RoadConfig(**fields, group_size=4),
        },
    )
    model.base_model.set_adapter(["a", "c"])
    x = torch.randn(3, 8)
    wanted = model(x)
    model.base_model.set_adapter("b")
    merged = model.merge_and_unload(adapter_names=["a", "c"])
    assert_close(merged(x), wanted)


def test_unload_gives_the_very_base_back() -> None:
    base = Mlp()
    modules, before = [base.up, base.down], bytes_of(base)
    model = with_adapters(
        base, {"default": RoadConfig(target_modules=["up", "down"], group_size=4)}
    )
    unloaded = model.unload()
    assert unloaded is base
    assert [base.up, base.down] == modules
    assert bytes_of(base) == before


def test_merging_twice_warns_and_changes_nothing() -> None:
    model = with_adapters(Mlp(), {"default": RoadConfig(target_modules=["up"], group_size=4)})
    model.merge_adapter()
    before = bytes_of(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert bytes_of(model) == before


def test_unmerging_what_is_not_merged_warns() -> None:
    layer = layer_of(nn.Linear(6, 8))
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_a_merged_model_cast_to_half_precision_unmerges_to_the_cast_base() -> None:
    base = Mlp()
    wanted = copy.deepcopy(base).bfloat16()
    model = with_adapters(base, {"default": RoadConfig(target_modules=["up"], group_size=4)})
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    (layer,) = adapted(model)
    assert torch.equal(layer.base_layer.weight, wanted.up.weight)
    assert torch.equal(layer.base_layer.bias, wanted.up.bias)


def test_an_optimizer_sees_the_same_base_parameters_before_and_after() -> None:
    model = with_adapters(Mlp(), {"default": RoadConfig(target_modules=["up"], group_size=4)})
    (layer,) = adapted(model)
    parameters = list(layer.base_layer.parameters())
    model.merge_adapter()
    assert all(a is b for a, b in zip(layer.base_layer.parameters(), parameters, strict=True))
    model.unmerge_adapter()
    assert all(a is b for a, b in zip(layer.base_layer.parameters(), parameters, strict=True))
