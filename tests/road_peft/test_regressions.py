"""Defects of PEFT's own RoAd, each beside what this library does.

Every test runs twice. With `stock` it asserts the defect, so that it says what is wrong and falls
when upstream mends it; with `ours` it asserts the behaviour.

| defect of stock PEFT 0.21                        | here                                         |
|--------------------------------------------------|----------------------------------------------|
| merging and unmerging wears a weight down        | bytes come back                              |
| a disabled merged model is unmerged, and altered | bytes stay                                   |
| a failing safe merge leaves a half-merged layer  | nothing is changed                           |
| a singular block is inverted to garbage          | refused, or restored                         |
| mixed batches: half precision, beams, sequences  | served                                       |
| mixed batches: modules to save of another row    | each row's own                               |
| mixed batches: hooks stay after an error         | removed                                      |
| in-place writes break the backward               | none                                         |
| fields and layers that are missing               | there                                        |
| a module named like the prefix keeps its adapter | deleted                                      |

Defects that are about targets, memory, dtypes and files are in the files on those.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from road_peft import RoadConfig
from tests.helpers import assert_close
from tests.road_peft._models import (
    LIBRARIES,
    VOCABULARY,
    Mlp,
    adapted,
    bytes_of,
    call_silently,
    no_hooks,
    registered,
    set_values,
    tiny,
    with_adapters,
)

BASE = "__base__"
both = pytest.mark.parametrize("library", LIBRARIES)


def _mlp(library: str, *names: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    with registered(library) as config_class:
        config = config_class(**{"target_modules": ["up", "down"], "group_size": 4, **fields})
        return with_adapters(Mlp().to(dtype), dict.fromkeys(names or ("default",), config))


def _weight(model: nn.Module) -> Tensor:
    return next(adapted(model)).base_layer.weight


# ---- merging ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ten_merges_and_unmerges_wear_a_half_precision_weight_down(library: str, dtype) -> None:
    model = _mlp(library, dtype=dtype)
    before = _weight(model).detach().clone()
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    after = _weight(model)
    assert torch.equal(after, before) == (library == "ours")
    if library == "stock":
        error = (after.double() - before.double()).norm() / before.double().norm()
        assert error > torch.finfo(dtype).eps / 2  # more than rounding once


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabling_a_merged_model_unmerges_it_for_good_and_alters_the_base(library, dtype) -> None:
    model, x = _mlp(library, dtype=dtype), torch.randn(3, 8).to(dtype)
    with model.disable_adapter():
        base = model(x)
    before = bytes_of(model)
    model.merge_adapter()
    merged = bytes_of(model)
    with model.disable_adapter():
        disabled = model(x)
    ours = library == "ours"
    assert torch.equal(disabled, base) == ours
    assert (bytes_of(model) == merged) == ours
    assert all(layer.merged == ours for layer in adapted(model))
    call_silently(model.unmerge_adapter)
    assert (bytes_of(model) == before) == ours


@both
@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_safe_merge_that_finds_nan_in_a_later_layer_is_half_done(library: str, what: str) -> None:
    model = _mlp(library)
    up, down = adapted(model)
    with torch.no_grad():
        getattr(down.base_layer, what)[0] = float("nan")
    before = bytes_of(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    ours = library == "ours"
    assert (bytes_of(model) == before) == ours
    assert up.merged != ours


@both
def test_a_safe_merge_writes_the_weight_before_it_looks_at_the_bias(library: str) -> None:
    model = _mlp(library, target_modules=["up"])
    (layer,) = adapted(model)
    with torch.no_grad():
        layer.base_layer.bias[0] = float("nan")
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged bias"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, before) == (library == "ours")


@both
def test_a_singular_block_is_inverted_to_garbage_without_a_word(library: str) -> None:
    """Rows turned a right angle apart collapse the pair, but for the rounding of pi / 2."""
    model = _mlp(library, variant="road_2", target_modules=["up"], group_size=2)
    (layer,) = adapted(model)
    angles = torch.tensor([0.0, torch.pi / 2]).repeat(8)
    set_values(layer, angles, torch.ones(16))
    before = _weight(model).detach().clone()
    model.merge_adapter()
    call_silently(model.unmerge_adapter)
    error = (_weight(model) - before).abs().max()
    assert (error == 0) if library == "ours" else (error > 1e-2)


@both
def test_a_scale_of_zero_makes_unmerge_fail_with_the_layer_called_unmerged(library: str) -> None:
    model = _mlp(library, target_modules=["up"])
    (layer,) = adapted(model)
    with torch.no_grad():
        layer.road_alpha["default"][0] = 0
    before = bytes_of(model)
    model.merge_adapter()
    if library == "stock":
        with pytest.raises(RuntimeError, match="singular"):
            model.unmerge_adapter()
        assert not layer.merged
        assert bytes_of(model) != before
    else:
        model.unmerge_adapter()
        assert bytes_of(model) == before


# ---- mixed batches ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mixed_batch_in_half_precision_does_not_run(library: str, dtype) -> None:
    model, x = _mlp(library, "a", "b", dtype=dtype), torch.randn(2, 8).to(dtype)
    if library == "stock":
        with pytest.raises(RuntimeError, match=r"Index put requires .* dtypes match"):
            model(x, adapter_names=["a", "b"])
    else:
        assert model(x, adapter_names=["a", "b"]).dtype == dtype


GENERATE = {"num_beams": {"num_beams": 2}, "num_return_sequences": {"num_return_sequences": 2}}


@both
@pytest.mark.parametrize("argument", GENERATE)
def test_a_mixed_batch_does_not_generate_repeated_rows(library: str, argument: str) -> None:
    with registered(library) as config_class:
        config = config_class(target_modules=["q_proj", "v_proj"], group_size=8)
        model = with_adapters(tiny("llama"), {"a": config, "b": config})
    tokens = torch.randint(3, VOCABULARY, (2, 4))
    settings = {"max_new_tokens": 2, "do_sample": argument != "num_beams", **GENERATE[argument]}

    def generate() -> Tensor:
        return call_silently(model.generate, input_ids=tokens, adapter_names=["a", "b"], **settings)

    if library == "stock":
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            generate()
    else:
        assert len(generate()) == (2 if argument == "num_beams" else 4)


@both
def test_a_mixed_batch_uses_the_active_adapters_module_to_save_for_every_row(library: str) -> None:
    model = _mlp(library, "a", "b", target_modules=["up"], modules_to_save=["down"])
    with torch.no_grad():
        for module in model.base_model.model.down.modules_to_save.values():
            module.weight.normal_()
    x = torch.randn(2, 8)
    mixed = model(x, adapter_names=["a", "b"])
    model.set_adapter("b")
    alone = model(x)[1]
    if library == "stock":
        assert (mixed[1] - alone).abs().max() > 0.1
    else:
        assert_close(mixed[1], alone)


@both
def test_hooks_stay_after_a_failing_call_and_break_the_next(library: str) -> None:
    model, x = _mlp(library, "a", "b"), torch.randn(2, 8)
    wanted = model(x)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=["a"])
    assert no_hooks(model) == (library == "ours")
    if library == "stock":
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            model(x)
    else:
        assert torch.equal(model(x), wanted)


class Exponential(nn.Linear):
    """A linear layer whose output is kept for its own backward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp()


@both
def test_writing_rows_in_place_breaks_the_backward_of_the_base_layer(library: str) -> None:
    with registered(library) as config_class:
        config = config_class(target_modules=["0"], group_size=4)
        model = with_adapters(nn.Sequential(Exponential(6, 8)), {"a": config, "b": config})
    x = torch.randn(2, 6, requires_grad=True)
    z = model(x, adapter_names=["a", "b"])
    if library == "stock":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
    else:
        z.sum().backward()
        for i, name in enumerate(("a", "b")):
            model.set_adapter(name)
            (alone,) = torch.autograd.grad(model(x)[i].sum(), x)
            assert_close(x.grad[i], alone[i])


# ---- what is missing --------------------------------------------------------------------------

MISSING = sorted(set(RoadConfig.__dataclass_fields__) - set(peft.RoadConfig.__dataclass_fields__))


@pytest.mark.parametrize("field", MISSING)
def test_a_field_that_stock_peft_lacks(field: str) -> None:
    default = getattr(RoadConfig(), field)
    with registered("stock") as config_class, pytest.raises(TypeError, match=field):
        config_class(**{field: default})
    assert getattr(RoadConfig(**{field: default}), field) == default


@both
def test_one_layer_of_an_odd_size_stops_the_whole_model(library: str) -> None:
    with registered(library) as config_class:
        config = config_class(target_modules=["up", "down"], group_size=4)
        with pytest.raises(ValueError, match="divisible by group_size"):
            peft.get_peft_model(Mlp(outputs=5), config)
    if library == "ours":
        config.remainder = "identity"
        assert len(list(adapted(peft.get_peft_model(Mlp(outputs=5), config)))) == 2


@both
def test_an_embedding_cannot_be_adapted(library: str) -> None:
    with registered(library) as config_class:
        config = config_class(target_modules=["0"], group_size=4)
        model = nn.Sequential(nn.Embedding(5, 8))
        if library == "stock":
            with pytest.raises(ValueError, match="not supported"):
                peft.get_peft_model(model, config)
        else:
            tokens = torch.tensor([[1, 4]])
            assert peft.get_peft_model(model, config)(tokens).shape == (1, 2, 8)


class Broad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.broad_proj = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.broad_proj(x))


@both
@pytest.mark.parametrize("deleted", ["a", "b"])
def test_deleting_leaves_the_adapter_of_a_module_whose_name_holds_the_prefix(
    library: str, deleted: str
) -> None:
    with registered(library) as config_class:
        config = config_class(target_modules=["broad_proj", "other"], group_size=4)
        model = with_adapters(Broad(), {"a": config, "b": config})
    kept = "b" if deleted == "a" else "a"
    model.delete_adapter(deleted)
    left = [n for n, _ in model.named_parameters() if n.endswith(f".{deleted}")]
    assert bool(left) == (library == "stock")
    if library == "ours":
        assert all(layer.active_adapters == [kept] for layer in adapted(model))
        assert model.base_model.active_adapters == [kept]


@both
def test_road_in_a_mixed_model_is_refused_whatever_upstreams_registration_says(library) -> None:
    with (
        registered(library) as config_class,
        pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"),
    ):
        peft.get_peft_model(Mlp(), config_class(target_modules=["up"], group_size=4), mixed=True)
