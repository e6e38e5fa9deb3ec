"""torch.compile of mixed batches: one graph for each list of names, and equal results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

from tests.helpers import assert_close
from tests.road_peft._models import Mlp, call_silently, no_hooks, with_adapters
from tests.road_peft._rows import (
    BASE,
    NAMES,
    assert_network_close,
    configs,
    gradients,
    inputs_of,
    mixed_model,
    tokens_for_rows,
)

LISTS = (["a", "e", BASE, "b"], ["b", "a", "a", "e"], [BASE] * 4)

TRACES_OUR_FORWARDS = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13.0"),
    reason="torch 2.11 cannot trace that modules to save are switched for the time of a call",
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(*, saving: bool = False) -> Any:
    """Give a model that trains all its adapters; each has its own last layer if `saving`."""
    names = ("a", "b", "e")
    if not saving:
        model = with_adapters(Mlp(), configs(*names, target_modules=["up", "down"]))
        model.base_model.set_adapter(list(names))
        return model.train()
    model = with_adapters(Mlp(), configs(*names, target_modules=["up"], modules_to_save=["down"]))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".modules_to_save." in parameter_name:
                parameter.normal_()
    model.set_requires_grad(list(names))
    return model.train()


def _step(function: Any, model: Any, x: Tensor, names: list[str]) -> dict[str, Tensor]:
    y = function(x, adapter_names=names)
    if y.requires_grad:
        # not the norm, which most rotations keep
        (y.square() * torch.linspace(-1, 2, y.shape[-1])).sum().backward()
    return {"output": y.detach(), **gradients(model)}


def _assert_alike(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_network_close(actual[name], tensor, name)


@pytest.mark.parametrize(
    ("backend", "saving"),
    [
        ("aot_eager", False),
        pytest.param("aot_eager", True, marks=TRACES_OUR_FORWARDS),
        ("inductor", False),
    ],
)
def test_steps_of_any_list_of_names_are_those_of_the_eager_model(backend, saving) -> None:
    model = _model(saving=saving)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for turn in range(2):
        for names in LISTS[: 1 if backend == "inductor" else 3]:
            x = torch.randn(4, 8)
            _assert_alike(_step(compiled, model, x, names), _step(model, model, x, names))
        if not turn:
            graphs = counter.frame_count
    assert counter.frame_count == graphs  # a list that comes again has its graph
    assert no_hooks(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.base_model.routing.current is None
    x = torch.randn(4, 8)
    assert_close(compiled(x), model(x))  # and without names, the active adapters


def test_new_values_of_adapters_are_seen() -> None:
    model, x, names = _model(), torch.randn(4, 8), LISTS[0]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    outputs = []
    for _ in range(3):
        y = compiled(x, adapter_names=names)
        assert_close(y, model(x, adapter_names=names))
        outputs.append(y.detach())
        y.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(outputs[0], outputs[-1])
    assert counter.frame_count == 1


def test_sizes_may_vary_for_a_list_of_names() -> None:
    model, names = _model(), LISTS[0]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for tokens in (3, 5, 9):
        x = torch.randn(4, tokens, 8)
        _assert_alike(_step(compiled, model, x, names), _step(model, model, x, names))
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]
    x = torch.randn(2, 3, 8)
    with pytest.raises(Exception, match=r"Length of `adapter_names`|raised exception .*ValueError"):
        compiled(x, adapter_names=names)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_language_model_is_one_graph(name: str) -> None:
    """OPT flattens rows and tokens, which the graph must know without a hook."""
    model = mixed_model(name, torch.float32, use_cache=False, num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = inputs_of(model, tokens_for_rows())
    wanted = model(**inputs, adapter_names=NAMES).logits
    assert_network_close(compiled(**inputs, adapter_names=NAMES).logits, wanted)


def test_compiled_blocks_take_the_rows_of_each_call() -> None:
    model = mixed_model("llama", torch.float32, use_cache=False, num_hidden_layers=1)
    tokens = tokens_for_rows()
    lists = (NAMES, None, ["c", BASE, BASE, BASE])
    wanted = [model(tokens, adapter_names=names).logits for names in lists]
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.get_base_model().model.layers:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        for names, logits in zip(lists, wanted, strict=True):
            assert_network_close(model(tokens, adapter_names=names).logits, logits)
    assert counter.frame_count == len(lists)


def test_a_compiled_forward_generates_with_a_static_cache() -> None:
    model, tokens = mixed_model("llama", num_hidden_layers=1), tokens_for_rows()
    settings: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
    }
    lists = (NAMES, NAMES[::-1])
    wanted = [call_silently(model.generate, **settings, adapter_names=n) for n in lists]
    base: PreTrainedModel = model.get_base_model()
    base.generation_config.cache_implementation = "static"
    counter = CompileCounterWithBackend("aot_eager")
    base.forward = torch.compile(base.forward, backend=counter, fullgraph=True)
    for names, sequences in zip(lists, wanted, strict=True):
        ours = call_silently(model.generate, **settings, adapter_names=names)
        assert torch.equal(ours, sequences)
    assert counter.frame_count >= len(lists)
