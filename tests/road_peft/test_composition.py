"""Combining adapters: products, sums and interpolations, of coefficients and of whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from road_peft import RoadConfig
from road_peft.composition import COMBINATIONS, interpolation, linear, multiply, product
from road_peft.variants import VARIANTS
from tests.helpers import assert_close, dense_rotation
from tests.road_peft._models import VOCABULARY, tiny, with_adapters

GROUP_SIZES = (2, 4, 8)


def coefficients(variant: str, group_size: int, features: int = 8) -> tuple[Tensor, Tensor]:
    row = VARIANTS[variant]
    theta = torch.empty(row.size(features), dtype=torch.float64).uniform_(-1, 1)
    alpha = torch.empty(row.size(features), dtype=torch.float64).uniform_(0.5, 1.5)
    return row.coefficients(theta, alpha, group_size)


def dense(pair: tuple[Tensor, Tensor], group_size: int) -> Tensor:
    return dense_rotation(*pair, group_size, pair[0].numel())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_multiply_is_the_matrix_product(variant: str, group_size: int) -> None:
    left, right = (coefficients(variant, group_size) for _ in range(2))
    expected = dense(left, group_size) @ dense(right, group_size)
    assert_close(dense(multiply(left, right, group_size), group_size), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_product_applies_adapters_in_turn(variant: str, group_size: int) -> None:
    pairs = [coefficients(variant, group_size) for _ in range(3)]
    one, two, three = (dense(pair, group_size) for pair in pairs)
    assert_close(dense(product(pairs, [1, 1, 1], group_size), group_size), three @ two @ one)


def test_a_weighted_product_of_rotations_is_a_power() -> None:
    pair = coefficients("road_1", 4)
    half = product([pair], [0.5], 4)
    assert_close(dense(half, 4) @ dense(half, 4), dense(pair, 4))
    assert_close(dense(product([pair], [-1], 4), 4) @ dense(pair, 4), torch.eye(8).double())


def test_angles_are_taken_the_short_way_and_scales_made_positive() -> None:
    row, two_pi = VARIANTS["road_1"], 2 * torch.pi
    theta, alpha = torch.tensor([0.3, -0.2]).double(), torch.tensor([1.2, 0.8]).double()
    plain = row.coefficients(theta, alpha, 2)
    wound = row.coefficients(theta + two_pi, alpha, 2)
    mirrored = row.coefficients(theta + torch.pi, -alpha, 2)
    expected = product([plain], [0.5], 2)
    for same in (wound, mirrored):
        for actual, wanted in zip(product([same], [0.5], 2), expected, strict=True):
            assert_close(actual, wanted)


def test_a_power_of_other_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="weights of 1 only"):
        product([coefficients("road_2", 4)], [0.5], 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_and_interpolation_are_sums_of_matrices(variant: str) -> None:
    pairs, weights, one = [coefficients(variant, 4) for _ in range(2)], [0.3, -0.6], torch.eye(8)
    summed = sum(w * dense(pair, 4) for pair, w in zip(pairs, weights, strict=True))
    assert_close(dense(linear(pairs, weights, 4), 4), summed)
    moved = one + sum(w * (dense(pair, 4) - one) for pair, w in zip(pairs, weights, strict=True))
    assert_close(dense(interpolation(pairs, weights, 4), 4), moved)


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_closure_holds_every_combination(variant: str, kind: str) -> None:
    pairs = [coefficients(variant, 4) for _ in range(2)]
    result = COMBINATIONS[kind](pairs, [1, 1], 4)
    closure = VARIANTS[VARIANTS[variant].closure]
    again = closure.coefficients(*closure.parameters(*result, 4), 4)
    for actual, wanted in zip(again, result, strict=True):
        assert_close(actual, wanted)


def adapters(**settings: Any) -> Any:
    shared = {"group_size": 4, **settings}
    return with_adapters(
        tiny("llama"),
        {
            "a": RoadConfig(**shared),
            "b": RoadConfig(target_modules=["q_proj", "down_proj"], **shared),
        },
    )


def logits(model: Any, adapter: str | list[str]) -> Tensor:
    model.base_model.set_adapter(adapter)
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6) % VOCABULARY).logits


@pytest.mark.parametrize(("variant", "closure"), [("road_1", "road_1"), ("road_2", "road_4")])
def test_a_product_adapter_computes_what_two_active_ones_do(variant: str, closure: str) -> None:
    model = adapters(variant=variant)
    model.add_weighted_adapter(["a", "b"], [1, 1], "both")
    assert model.peft_config["both"].variant == closure
    assert model.active_adapters == ["a"]
    assert_close(logits(model, "both"), logits(model, ["a", "b"]), dtype=torch.float16)


def test_weights_of_nothing_give_the_base_and_of_one_the_adapter() -> None:
    model = adapters(variant="road_4")
    model.add_weighted_adapter(["a", "b"], [0, 0], "none", "interpolation")
    model.add_weighted_adapter(["a", "b"], [1, 0], "first", "interpolation")
    with model.disable_adapter():
        base = logits(model, "a")
    assert_close(logits(model, "none"), base)
    assert_close(logits(model, "first"), logits(model, "a"), dtype=torch.float16)


def test_a_combined_adapter_saves_and_loads_in_plain_peft_form(tmp_path: Any) -> None:
    from peft import PeftModel

    model = adapters()
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "blend", "linear")
    expected = logits(model, "blend")
    model.save_pretrained(tmp_path, selected_adapters=["blend"])
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "blend", adapter_name="blend")
    assert torch.equal(logits(again, "blend"), expected)


REFUSED = {
    "name taken": ((["a"], [1], "b"), "already; choose another name"),
    "unknown adapter": ((["a", "z"], [1, 1], "c"), "'z'.*choose from"),
    "no adapter": (([], [], "c"), "do not exist"),
    "one weight missing": ((["a", "b"], [1], "c"), "2 adapters but 1 weights"),
    "unknown kind": ((["a"], [1], "c", "ties"), "'ties'; choose from interpolation, linear"),
    "name of an attribute": ((["a"], [1], "half"), "'half' cannot name an adapter"),
    "not finite": ((["a"], [float("inf")], "c", "linear"), "not finite"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_changes_nothing(arguments: tuple[Any, ...], message: str) -> None:
    model = adapters()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"a", "b"}
    assert set(model.state_dict()) == before


def test_different_group_sizes_and_loras_do_not_combine() -> None:
    sizes = {"a": RoadConfig(group_size=4), "b": RoadConfig(group_size=8)}
    with pytest.raises(ValueError, match=r"layers\.0.*group sizes \[4, 8\]"):
        with_adapters(tiny("llama"), sizes).add_weighted_adapter(["a", "b"], [1, 1], "c")
    with pytest.raises(ValueError, match="'a' has a LoRA"):
        adapters(lora_rank=2).add_weighted_adapter(["a", "b"], [1, 1], "c")
