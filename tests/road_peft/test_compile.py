"""torch.compile and torch.export: one graph, no new one when values change, equal results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from road_peft import RoadConfig
from tests.helpers import assert_close
from tests.road_peft._models import VOCABULARY, Mlp, layer_of, randomize, tiny

# name: settings of the adapter
CASES: dict[str, dict[str, Any]] = {
    "road_1": {"variant": "road_1"},
    "road_2": {"variant": "road_2"},
    "road_4": {"variant": "road_4"},
    "recompute": {"variant": "road_1", "recompute": True},
    "LoRA beside": {"variant": "road_2", "lora_rank": 2},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _mlp(**settings: Any) -> PeftModel:
    config = RoadConfig(target_modules=["up", "down"], **{"group_size": 4, **settings})
    return randomize(get_peft_model(Mlp(), config))


def _step(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Give the output and the gradient of the input and of every trained parameter."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = function(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def _assert_all_close(actual: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(actual) == len(wanted) > 2
    for i, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert_close(a, b, f"tensor {i}")


@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward_are_one_graph(case: str) -> None:
    model, x = _mlp(**CASES[case]), torch.randn(3, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    _assert_all_close(_step(compiled, model, x), _step(model, model, x))
    assert counter.frame_count == 1


def test_inductor_forward_and_backward() -> None:
    layer, x = layer_of(nn.Linear(8, 4), variant="road_2"), torch.randn(3, 8)
    compiled = torch.compile(layer, backend="inductor", fullgraph=True)
    _assert_all_close(_step(compiled, layer, x), _step(layer, layer, x))


def test_a_language_model_is_one_graph() -> None:
    model = randomize(
        get_peft_model(
            tiny("llama", use_cache=False, num_hidden_layers=1), RoadConfig(group_size=8)
        )
    )
    ids = torch.arange(12).view(2, 6) % VOCABULARY
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


def test_new_values_need_no_new_graph() -> None:
    model, x = _mlp(variant="road_4"), torch.randn(3, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for change in (optimizer.step, lambda: randomize(model), lambda: _overwrite(model)):
        seen.append(_step(compiled, model, x)[0])
        change()
        _assert_all_close(_step(compiled, model, x), _step(model, model, x))
    assert not torch.allclose(seen[0], seen[1])
    assert counter.frame_count == 1


def _overwrite(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(0.5)  # past the version counter


def test_sizes_may_vary() -> None:
    model = _mlp()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((3, 8), (5, 8), (11, 8)):
        x = torch.randn(shape)
        _assert_all_close(_step(compiled, model, x), _step(model, model, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("state", ["merged", "disabled", "merged and disabled", "unmerged"])
def test_states_of_the_model_compile(state: str) -> None:
    model, x = _mlp().eval(), torch.randn(3, 8)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    with torch.no_grad():
        rotated = model(x)
        if "merged" in state:
            model.merge_adapter()
        if state == "unmerged":
            model.unmerge_adapter()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        if "disabled" in state:
            with model.disable_adapter():
                assert_close(compiled(x), base)
        assert_close(compiled(x), rotated)  # also after the context has ended


def test_a_switch_of_adapters_is_noticed() -> None:
    model, x = _mlp().eval(), torch.randn(3, 8)
    config = RoadConfig(target_modules=["up"], variant="road_2", group_size=8, init_weights=False)
    model.add_adapter("other", config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        results.append(compiled(x))
        assert_close(results[-1], model(x))
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_exported(dtype: torch.dtype) -> None:
    layer = layer_of(nn.Linear(8, 12, dtype=dtype), variant="road_2").eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    example = torch.randn(3, 8, dtype=dtype)
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: rows},))
    x = torch.randn(7, 8, dtype=dtype)
    assert torch.equal(program.module()(x), layer(x))
    assert any("rotate" in str(node.target) for node in program.graph.nodes)


def test_a_compiled_model_trains_like_an_eager_one() -> None:
    losses: list[list[float]] = []
    x, target = torch.randn(16, 8), torch.randn(16, 4)
    for compiling in (False, True):
        torch.manual_seed(0)
        model = _mlp()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiling else model
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(5):
            loss = (run(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
