"""One adapter per row of a batch.

| property                                        | oracle                                         |
|-------------------------------------------------|------------------------------------------------|
| row i of a layer                                | that layer with only the adapter of row i      |
| row i of a model, whatever its head             | the row alone, or the batch, with its adapter  |
| rows of `__base__` and of adapters without layer| the base, bit for bit                          |
| modules to save                                 | each row's own, different, copy                |
| permuted rows, padding                          | the same values, in the order of the rows      |
| calls that cannot be served                     | the message; no hook stays                     |
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from road_peft import RoadConfig
from tests.helpers import TOLERANCES, assert_close
from tests.road_peft._models import (
    Mlp,
    adapted,
    bytes_of,
    no_hooks,
    registered,
    tiny,
    with_adapters,
)
from tests.road_peft._rows import (
    BASE,
    DECODERS,
    FIELDS,
    LENGTH,
    NAMES,
    SEQ2SEQ,
    assert_network_close,
    configs,
    inputs_of,
    mixed_model,
    only,
    tokens_for_rows,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- layers -----------------------------------------------------------------------------------

BASES: dict[str, Any] = {
    "linear": lambda: (nn.Linear(6, 16), (5, 6)),
    "linear, one token": lambda: (nn.Linear(6, 16), (6,)),
    "linear, images": lambda: (nn.Linear(6, 16), (3, 2, 6)),
    "no tokens": lambda: (nn.Linear(6, 16), (0, 6)),
    "conv1d": lambda: (Conv1D(16, 6), (5, 6)),
    "embedding": lambda: (nn.Embedding(7, 16), (5,)),
}


def _input(base: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(base, nn.Embedding):
        return torch.randint(7, shape)
    return torch.randn(shape).to(dtype)


def _check_rows(layer: Any, x: Tensor, names: list[str], dtype: torch.dtype) -> None:
    z, h = layer(x, adapter_names=names), layer.base_layer(x)
    assert z.dtype == h.dtype
    assert z.shape == h.shape
    for i, name in enumerate(names):
        if name not in layer.road_theta:
            assert torch.equal(z[i], h[i])
            continue
        layer.set_adapter(name)
        if z.numel():
            assert_close(z[i], layer(x)[i], f"row {i} of {name}", dtype=dtype)
            assert not torch.equal(z[i], h[i])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_every_row_of_a_layer_is_that_of_its_adapter(kind: str, dtype) -> None:
    base, row = BASES[kind]()
    here = "abcf" if kind == "embedding" else "abcdef"
    model = with_adapters(nn.Sequential(base).to(dtype), configs(*here, target_modules=["0"]))
    names = [*here, BASE, *reversed(here), "nobody"]
    layer = model.base_model.model[0]
    _check_rows(layer, _input(base, (len(names), *row), dtype), names, dtype)


@given(st.lists(st.sampled_from([*FIELDS, BASE]), min_size=1, max_size=9), st.sampled_from(DTYPES))
def test_any_list_of_names_is_served(names: list[str], dtype) -> None:
    base = nn.Linear(6, 16)
    model = with_adapters(nn.Sequential(base).to(dtype), configs(*FIELDS, target_modules=["0"]))
    _check_rows(model.base_model.model[0], torch.randn(len(names), 2, 6).to(dtype), names, dtype)


def test_a_batch_of_the_base_alone_is_the_base_bit_for_bit() -> None:
    model, x = _mlp(), torch.randn(2, 3, 8)
    wanted = only(model, BASE, lambda: model(x))
    assert torch.equal(model(x, adapter_names=[BASE, BASE]), wanted)


@pytest.mark.parametrize("count", [1, 2, 16, 64])
def test_batches_of_up_to_sixty_four_adapters(count: int) -> None:
    names = [f"n{i}" for i in range(count)]
    variants = ("road_1", "road_2", "road_4")
    configs = {
        name: RoadConfig(target_modules=["0"], group_size=2 << i % 3, variant=variants[i % 3])
        for i, name in enumerate(names)
    }
    model = with_adapters(nn.Sequential(nn.Linear(6, 16)), configs)
    rows = [*names, BASE, *names[::-1]]
    _check_rows(model.base_model.model[0], torch.randn(len(rows), 3, 6), rows, torch.float32)


def test_permuted_rows_give_permuted_outputs_bit_for_bit() -> None:
    model = with_adapters(
        nn.Sequential(nn.Linear(6, 16, bias=False)), configs(*FIELDS, target_modules=["0"])
    )
    names = [*FIELDS, BASE, "a"]
    x, order = torch.randn(8, 4, 6), torch.randperm(8).tolist()
    z = model(x, adapter_names=names)
    permuted = model(x[order], adapter_names=[names[i] for i in order])
    assert torch.equal(permuted, z[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_reach_the_inputs_through_a_mixed_batch(dtype) -> None:
    model = with_adapters(
        nn.Sequential(nn.Linear(6, 16)).to(dtype), configs("a", "d", target_modules=["0"])
    )
    x = torch.randn(3, 6).to(dtype).requires_grad_()
    (mixed,) = torch.autograd.grad(model(x, adapter_names=["a", BASE, "d"]).sum(), x)
    for i, name in ((0, "a"), (2, "d")):
        model.set_adapter(name)
        (alone,) = torch.autograd.grad(model(x).sum(), x)
        assert_close(mixed[i], alone[i])


class _Operations(TorchDispatchMode):
    """Count the operations that give a tensor of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.elements:
            self.count += 1
        return result


@pytest.mark.parametrize(("library", "grows"), [("stock", True), ("ours", False)])
def test_operations_on_data_do_not_grow_with_the_number_of_adapters(library, grows) -> None:
    counts = []
    for adapters in (2, 8):
        names = [f"n{i}" for i in range(adapters)]
        with registered(library) as config_class:
            config = config_class(target_modules=["0"], group_size=8)
            model = with_adapters(nn.Sequential(nn.Linear(6, 16)), dict.fromkeys(names, config))
        x = torch.randn(8, 40, 6)
        with _Operations(40 * 8) as operations:  # half a row's output, more than all tables
            model(x, adapter_names=names * (8 // adapters))
        counts.append(operations.count)
    assert (counts[1] > counts[0]) == grows


# ---- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ, "roberta", "bert classifier"])
def test_every_row_of_a_model_is_the_row_alone(name: str) -> None:
    model, tokens = mixed_model(name), tokens_for_rows()
    mixed = model(**inputs_of(model, tokens), adapter_names=NAMES)[0]
    for i, adapter in enumerate(NAMES):
        row = inputs_of(model, tokens[i : i + 1])
        alone = only(model, adapter, lambda row=row: model(**row)[0])
        # a network adds up the roundings of its layers
        error = (mixed[i] - alone[0]).abs().max()
        assert error <= 100 * TOLERANCES[torch.float64] * alone.abs().max()
        batch = inputs_of(model, tokens)
        other = only(model, "c" if adapter != "c" else "e", lambda batch=batch: model(**batch)[0])
        assert (mixed[i] - other[i]).abs().max() > 1e-3 * alone.abs().max()


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("CAUSAL_LM", "llama"),
        ("SEQ_2_SEQ_LM", "t5"),
        ("SEQ_CLS", "bert classifier"),
        ("SEQ_CLS", "llama classifier"),
        ("FEATURE_EXTRACTION", "roberta"),
    ],
)
def test_every_task_of_peft_takes_names(task: str, name: str) -> None:
    model = with_adapters(tiny(name, dtype=torch.float64), configs("c", "e", task_type=task))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".modules_to_save." in parameter_name:  # a classifier is saved with its adapter
                parameter.normal_(0, 0.5)
    inputs = inputs_of(model, tokens_for_rows())
    mixed = model(**inputs, adapter_names=NAMES)[0]
    for i, adapter in enumerate(NAMES):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        alone = only(model, adapter, lambda row=row: model(**row)[0])
        assert_network_close(mixed[i], alone[0], f"row {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_rows_of_the_base_are_those_of_the_base_model_bit_for_bit(name: str, dtype) -> None:
    model, tokens = mixed_model(name, dtype), tokens_for_rows()
    inputs = inputs_of(model, tokens)
    mixed = model(**inputs, adapter_names=NAMES)[0]
    base = only(model, BASE, lambda: model(**inputs)[0])
    assert mixed.dtype == base.dtype
    assert torch.equal(mixed[1], base[1])
    for i in (0, 2, 3):
        assert not torch.equal(mixed[i], base[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_rows_in_half_precision_are_those_of_the_batch_with_their_adapter(name: str, dtype) -> None:
    model, tokens = mixed_model(name, dtype), tokens_for_rows()
    mixed = model(tokens, adapter_names=NAMES)[0]
    for i, adapter in enumerate(NAMES):
        wanted = only(model, adapter, lambda: model(tokens)[0])[i]
        assert (mixed[i] - wanted).abs().max() <= 5 * TOLERANCES[dtype] * wanted.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_padded_rows_are_the_rows_without_padding(name: str, side: str) -> None:
    model, tokens = mixed_model(name), tokens_for_rows()
    mask = torch.ones_like(tokens)
    lengths = [LENGTH, 2, 3, 1]
    for i, length in enumerate(lengths):
        empty = slice(0, LENGTH - length) if side == "left" else slice(length, LENGTH)
        mask[i, empty], tokens[i, empty] = 0, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    extra = {} if name == "opt" else {"position_ids": positions}
    mixed = model(input_ids=tokens, attention_mask=mask, **extra, adapter_names=NAMES).logits
    for i, adapter in enumerate(NAMES):
        real = mask[i].bool()
        alone = only(model, adapter, lambda i=i, real=real: model(tokens[i][real][None]).logits)
        error = (mixed[i][real] - alone[0]).abs().max()
        assert error <= 100 * TOLERANCES[torch.float64] * alone.abs().max()


# ---- modules to save --------------------------------------------------------------------------


def _classifier(name: str, module: str, owners: str) -> peft.PeftModel:
    """Give each owner its own, different, copy of the module."""
    owned = configs("a", "b", "c")
    for owner in owners:
        owned[owner].modules_to_save = [module]
    model = with_adapters(tiny(name, dtype=torch.float64), owned)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".modules_to_save." in parameter_name:
                parameter.normal_(0, 0.5)
    return model


@pytest.mark.parametrize(
    ("name", "module", "active", "owners"),
    [
        *(("bert classifier", "classifier", a, o) for a in "abc" for o in ("abc", "ac", "b")),
        ("llama classifier", "score", "a", "abc"),
        ("llama", "lm_head", "b", "abc"),
    ],
)
def test_every_row_has_its_own_copy_of_a_module_to_save(name, module, active, owners) -> None:
    model = _classifier(name, module, owners)
    names = ["c", "a", BASE, "b", "a"]
    tokens = tokens_for_rows(len(names))
    model.set_adapter(active)
    mixed = model(input_ids=tokens, adapter_names=names).logits
    for i, adapter in enumerate(names):
        wanted = only(model, adapter, lambda: model(input_ids=tokens).logits)[i]
        assert (mixed[i] - wanted).abs().max() <= 1e-10 * wanted.abs().max(), (i, adapter)
    assert no_hooks(model)


def test_trained_tokens_are_those_of_each_row() -> None:
    given = configs("a", "b")
    for config in given.values():
        config.trainable_token_indices = [5, 6]
    model = with_adapters(tiny("llama", dtype=torch.float64), given)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in parameter_name:
                parameter.normal_()
    tokens = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
    mixed = model(tokens, adapter_names=["b", BASE, "a"]).logits
    for i, adapter in enumerate(("b", BASE, "a")):
        wanted = only(model, adapter, lambda: model(tokens).logits)[i]
        assert (mixed[i] - wanted).abs().max() <= 1e-10 * wanted.abs().max()


# ---- what cannot be served --------------------------------------------------------------------


def _mlp(**fields: Any) -> peft.PeftModel:
    return with_adapters(Mlp(), configs("a", "b", target_modules=["up"], **fields))


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_the_wrong_length_is_refused_and_leaves_no_hook(count: int) -> None:
    model, x = _mlp(), torch.randn(2, 8)
    wanted = model(x)
    with pytest.raises(ValueError, match=f"Length of `adapter_names` .* {count} and 2"):
        model(x, adapter_names=["a"] * count)
    assert no_hooks(model)
    assert torch.equal(model(x), wanted)


def test_an_empty_list_of_names_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no adapter_names"):
        _mlp()(torch.randn(2, 8), adapter_names=[])


def test_an_empty_list_is_refused() -> None:
    model = _mlp()
    with pytest.raises(ValueError, match="there are no adapter_names"):
        model(torch.randn(2, 8), adapter_names=[])
    assert no_hooks(model)


def test_features_are_not_taken_for_tokens() -> None:
    model = _mlp()
    with pytest.raises(ValueError, match=r"Length of `adapter_names` .* 2 and 16"):
        model(torch.randn(16, 8), adapter_names=["a", "b"])


@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_a_list_of_the_wrong_length_is_refused_by_models(name: str) -> None:
    model = mixed_model(name)
    for rows, names in ((4, ["c", "e"]), (2, ["c", "e", "c"]), (1, ["c", "e"]), (6, ["c"] * 5)):
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            model(**inputs_of(model, tokens_for_rows(rows, length=2)), adapter_names=names)
    assert no_hooks(model)


def test_unknown_names_are_refused_all_at_once_in_order() -> None:
    model = _mlp()
    with pytest.raises(
        ValueError, match=r"Trying to infer with non-existing adapter\(s\): nobody, zero$"
    ):
        model(torch.randn(4, 8), adapter_names=["zero", "a", BASE, "nobody"])
    assert no_hooks(model)


def test_merged_adapters_are_refused_with_the_way_out() -> None:
    model, x = _mlp(), torch.randn(2, 8)
    model.merge_adapter()
    before = bytes_of(model)
    with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
        model(x, adapter_names=["a", "b"])
    assert bytes_of(model) == before
    assert no_hooks(model)


def test_an_exception_inside_the_forward_leaves_no_hook_and_a_working_model() -> None:
    model, x = _mlp(), torch.randn(2, 8)
    wanted = model(x, adapter_names=["b", BASE])

    def fail(*args: Any) -> None:
        raise RuntimeError("inside")

    handle = model.base_model.model.down.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        model(x, adapter_names=["b", BASE])
    handle.remove()
    assert no_hooks(model)
    assert torch.equal(model(x, adapter_names=["b", BASE]), wanted)
    model.set_adapter("a")
    assert model(x).shape == (2, 4)


def test_a_disabled_model_serves_the_base_whatever_the_names() -> None:
    model, x = _mlp(), torch.randn(2, 8)
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=["a", "b"]), model(x))


def test_an_adapter_that_has_no_layer_somewhere_is_the_base_there() -> None:
    model = with_adapters(
        Mlp(),
        {**configs("a", target_modules=["up"]), **configs("b", target_modules=["down"])},
    )
    x = torch.randn(3, 8)
    mixed = model(x, adapter_names=["b", "a", BASE])
    for i, adapter in enumerate(("b", "a", BASE)):
        assert_close(mixed[i], only(model, adapter, lambda: model(x))[i])
    assert len(list(adapted(model))) == 2


def test_a_mixed_batch_in_half_precision_adapters() -> None:
    model = with_adapters(
        nn.Sequential(nn.Linear(6, 16)).bfloat16(),
        configs("a", target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    x = torch.randn(2, 6).bfloat16()
    mixed = model(x, adapter_names=["a", BASE])
    assert mixed.dtype == torch.bfloat16
    assert_close(mixed[0], model(x)[0])
