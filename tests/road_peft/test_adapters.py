"""Several adapters on one model: choosing, deleting, status, and merging some of them."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from road_peft import RoadConfig
from tests.helpers import assert_close
from tests.road_peft._models import (
    Mlp,
    adapted,
    bytes_of,
    call_silently,
    layer_of,
    randomize,
    with_adapters,
)


def test_set_adapter_on_a_merged_model_unmerges_first() -> None:
    config = RoadConfig(target_modules=["up"], group_size=4)
    model = with_adapters(Mlp(), {"a": config, "b": config})
    before, x = bytes_of(model), torch.randn(3, 8)
    model.set_adapter("b")
    wanted = model(x)
    model.set_adapter("a")
    model.merge_adapter()
    call_silently(model.set_adapter, "b")
    assert bytes_of(model) == before
    assert torch.equal(model(x), wanted)


def test_several_adapters_are_set_together() -> None:
    config = RoadConfig(target_modules=["up"], group_size=4)
    model = with_adapters(Mlp(), {"a": config, "b": config, "c": config})
    model.base_model.set_adapter(["a", "c"])
    (layer,) = adapted(model)
    assert layer.active_adapters == model.active_adapters == ["a", "c"]
    trainable = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"a", "c"}


def test_status_tells_of_merged_and_active_adapters() -> None:
    config = RoadConfig(target_modules=["up", "down"], group_size=4)
    model = with_adapters(Mlp(), {"a": config, "b": config})
    model.merge_adapter()
    layers, status = model.get_layer_status(), model.get_model_status()
    assert [layer.name for layer in layers] == ["model.up", "model.down"]
    assert all(layer.module_type == "road.RoadLinear" for layer in layers)
    assert all(layer.merged_adapters == ["a"] for layer in layers)
    assert status.peft_types == {"a": "ROAD", "b": "ROAD"}
    assert status.merged_adapters == status.active_adapters == ["a"]
    assert status.available_adapters == ["a", "b"]
    assert status.trainable_params == 16 + 4


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("deleted", ["a", "b"])
def test_a_deleted_adapter_leaves_nothing_behind(deleted: str, rank: int) -> None:
    config = RoadConfig(target_modules=["up", "down"], group_size=4, lora_rank=rank)
    model = with_adapters(Mlp(), {"a": config, "b": config})
    model.delete_adapter(deleted)
    (kept,) = {"a", "b"} - {deleted}
    assert set(model.peft_config) == {kept}
    assert model.active_adapters == [kept] if deleted == "a" else True
    for layer in adapted(model):
        assert not any(n.endswith(f".{deleted}") for n, _ in layer.named_parameters())
        for name in layer.other_param_names:
            assert deleted not in getattr(layer, name)
        assert set(layer.road_theta) == {kept}
    x = torch.randn(2, 8)
    model.set_adapter(kept)
    assert model(x).isfinite().all()


def test_a_merged_adapter_is_not_deleted() -> None:
    config = RoadConfig(target_modules=["up"], group_size=4)
    model = with_adapters(Mlp(), {"a": config, "b": config})
    model.merge_adapter()
    with pytest.raises(ValueError, match=re.escape("['a'] while they are merged")):
        model.delete_adapter("a")
    assert set(model.peft_config) == {"a", "b"}
    model.unmerge_adapter()
    model.delete_adapter("a")
    assert set(model.peft_config) == {"b"}


def test_deleting_the_last_adapter_leaves_the_base() -> None:
    base, x = Mlp(), torch.randn(3, 8)
    wanted = base(x)
    model = with_adapters(base, {"a": RoadConfig(target_modules=["up"], group_size=4)})
    call_silently(model.delete_adapter, "a")
    assert torch.equal(base(x), wanted)


def test_an_adapter_that_has_no_layer_here_merges_nothing_here() -> None:
    model = with_adapters(
        Mlp(),
        {
            "a": RoadConfig(target_modules=["up"], group_size=4),
            "b": RoadConfig(target_modules=["down"], group_size=4),
        },
    )
    up, down = adapted(model)
    model.merge_adapter(adapter_names=["b"])
    assert up.merged_adapters == []
    assert down.merged_adapters == ["b"]


def test_a_layer_that_is_merged_is_retrained_after_unmerging() -> None:
    model = with_adapters(Mlp(), {"default": RoadConfig(target_modules=["up"], group_size=4)})
    model.merge_adapter()
    model.unmerge_adapter()
    x = torch.randn(3, 8)
    before = model(x)
    before.sum().backward()
    (layer,) = adapted(model)
    assert layer.road_theta["default"].grad.abs().max() > 0
    randomize(model)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_merged_model_unmerges_by_itself(copied, exact: bool) -> None:
    config = RoadConfig(target_modules=["up", "down"], group_size=4, exact_unmerge=exact)
    model = with_adapters(Mlp(), {"default": config})
    x = torch.randn(3, 8)
    wanted, before = model(x), bytes_of(model)
    model.merge_adapter()
    merged, output = bytes_of(model), model(x)
    twin = copied(model)
    assert bytes_of(twin) == merged
    assert torch.equal(twin(x), output)
    twin.unmerge_adapter()
    assert bytes_of(model) == merged  # the copy has tensors of its own
    assert torch.equal(model(x), output)
    if exact:
        assert bytes_of(twin) == before
        assert torch.equal(twin(x), wanted)
    else:
        assert (twin(x) - wanted).abs().max() <= 1e-5
    model.unmerge_adapter()
    assert_close(model(x), wanted, dtype=torch.bfloat16 if not exact else None)


def test_a_copy_of_a_merged_layer_trains_its_own_base_after_unmerging() -> None:
    layer = layer_of(nn.Linear(6, 8))
    layer.merge()
    twin = copy.deepcopy(layer)
    for one in (layer, twin):
        one.unmerge()
    with torch.no_grad():
        twin.base_layer.weight.zero_()
    assert layer.base_layer.weight.abs().max() > 0
