"""The references that providers are held against, and that the providers are who they claim."""

from __future__ import annotations

import peft.tuners.road.layer as stock
import pytest
import torch

import road_peft
from benchmarks._cases import TOLERANCE
from benchmarks._models import OneLinear
from benchmarks._providers import MERGED, OURS, STOCK, TRAINED, adapted_layers
from benchmarks.merge import exact_merge
from benchmarks.train import gradient_error
from tests.helpers import dense_rotation


def test_each_provider_uses_the_classes_of_its_library() -> None:
    base = OneLinear(64, 128)
    (ours,) = adapted_layers(TRAINED[OURS].build(base, base.targets)).values()
    (theirs,) = adapted_layers(TRAINED[STOCK].build(base, base.targets)).values()
    assert isinstance(ours, road_peft.RoadLinear)
    assert type(theirs) is stock.Linear


@pytest.mark.parametrize("name", list(TRAINED))
def test_adapters_are_not_the_identity_and_agree_with_their_dense_weight(name: str) -> None:
    base = OneLinear(64, 128)
    model = TRAINED[name].build(base, base.targets)
    x = torch.randn(4, 64)
    changed = not torch.allclose(model(x), base(x), atol=1e-3)
    assert changed == bool(adapted_layers(model))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert gradient_error(base, model, TRAINED[name]) <= TOLERANCE[torch.float32]


def test_a_wrong_adapter_is_seen() -> None:
    base = OneLinear(64, 128)
    model = TRAINED[OURS].build(base, base.targets)
    assert gradient_error(base, model, TRAINED["road_1 recompute"]) <= TOLERANCE[torch.float32]
    next(iter(adapted_layers(model).values())).group_size["default"] = 32  # type: ignore[operator]
    assert gradient_error(base, model, TRAINED[OURS]) > 0.1


def test_exact_merge_is_the_dense_product() -> None:
    base = OneLinear(16, 128)
    (layer,) = adapted_layers(MERGED[OURS].build(base, base.targets)).values()
    assert isinstance(layer, road_peft.RoadLinear)
    first, second = layer.coefficients("default", torch.float64)
    expected = dense_rotation(first, second, 64, 128) @ base.linear.weight.double()
    torch.testing.assert_close(exact_merge(base.linear.weight, MERGED[OURS]), expected)
