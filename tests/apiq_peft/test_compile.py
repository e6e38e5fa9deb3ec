"""Packed layers in one graph, replayed, recomputed, and never written out two at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from apiq_peft import ApiQConfig, PackedLinear
from benchmarks._measure import graphed, memory_of
from kernels_peft.packed_linear import blocked, packed_linear_reference
from tests.apiq_peft._models import tiny, tokens
from tests.helpers import assert_close

WIDTH, LAYERS = 256, 4


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Chain(nn.Module):
    """Square layers, one after the other."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.recomputed = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputed else layer(x)
            x = x.tanh()
        return x


def adapted(model: nn.Module, bits: int = 2, **changes: Any) -> Any:
    """Give the model with packed layers, and a LoRA that is not at its start, in training mode."""
    targets = r".*layers\.\d+" if isinstance(model, Chain) else None
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": targets, **changes}
    model = get_peft_model(model, ApiQConfig(bits=bits, group_size=32, **settings)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    return model


def step(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Give the output and the gradients of the input and of all that is trained."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert x.grad is not None
    return {
        "y": y.detach(),
        "x": x.grad,
        **{n: g.clone() for n, g in trained.items() if g is not None},
    }


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor], least: int) -> None:
    assert one.keys() == other.keys()
    assert len(one) >= least
    for name, value in one.items():
        assert_close(value, other[name], name)


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3])
def test_layers_and_their_backward_are_one_graph(bits: int) -> None:
    model = adapted(Chain(2, 64), bits)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for rows in (3, 5):
        x = torch.randn(rows, 64)
        assert_alike(step(compiled, model, x), step(model, model, x), least=2 + 2 * 2)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]  # which counts an attempt before torch takes the scale for fixed


def test_dropout_of_the_adapter_is_in_the_graph() -> None:
    model, x = adapted(Chain(1, 64), lora_dropout=0.5), torch.randn(64, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, again = compiled(x), compiled(x)
    assert not torch.equal(first, again)
    model.eval()
    assert_close(compiled(x), model(x))


def test_inductor_compiles_a_layer() -> None:
    model, x = adapted(Chain(1, 64)), torch.randn(3, 64)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    assert_alike(step(compiled, model, x), step(model, model, x), least=4)


def test_a_language_model_trains_in_one_graph() -> None:
    model, ids = adapted(tiny()), tokens(2, 8)
    losses, gradients = [], []
    counter = CompileCounterWithBackend("aot_eager")
    for run in (model, torch.compile(model, backend=counter, fullgraph=True)):
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss)
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    assert counter.frame_count == 1
    assert_close(losses[1], losses[0])
    assert_alike(*gradients, least=2 * 7 * 2)


# ---- checkpointing and memory -------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_equal_when_blocks_are_recomputed(use_reentrant: bool) -> None:
    model, ids = adapted(tiny()), tokens(2, 8)
    gradients = []
    for recomputed in (False, True):
        if recomputed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def weights_held(model: nn.Module) -> float:
    """Give the most memory of a training step, in times of a layer's weight in float32."""
    x = torch.randn(2, WIDTH)
    used = memory_of(lambda: None, {"step": lambda _: step(model, model, x)}, x.device)
    return used["step"].peak / (4 * WIDTH * WIDTH)


@pytest.mark.parametrize("recomputed", [False, True])
def test_no_two_weights_are_written_out_at_a_time(
    recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(Chain(LAYERS, WIDTH))
    model.base_model.model.recomputed = recomputed
    assert WIDTH * WIDTH <= blocked.BLOCK_ELEMENTS  # so a whole layer is a block
    one = weights_held(model)
    assert 1 <= one < 2
    # and of a layer that is larger than a block, only a part
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", WIDTH * WIDTH // 8)
    monkeypatch.setattr(blocked, "LEAST_COLUMNS", 32)
    assert weights_held(model) < 0.5

    # the reference leaves its weights to autograd: the measure sees what is to be avoided
    def product(self: PackedLinear, x: Tensor, *others: Any) -> Tensor:
        packed = (self.qweight, self.qzeros, self.scales, self.bias, self.bits)
        return packed_linear_reference(x, *packed, *others)

    monkeypatch.setattr(PackedLinear, "product", product)
    assert weights_held(model) > (one if recomputed else LAYERS)


# ---- CUDA graphs --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_forward_is_replayed_from_a_graph(bits: int, rows: int) -> None:
    model = adapted(Chain(2, WIDTH), bits).eval().to("cuda", torch.float16)
    held: dict[str, Tensor] = {}
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.float16)

    @torch.no_grad()
    def forward() -> None:
        held["y"] = model(x)

    replay = graphed(forward, x.device)
    captured = held["y"]
    for _ in range(2):
        x.normal_()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)  # an adapter that is trained on is replayed, too
        replay()
        with torch.no_grad():
            assert torch.equal(captured, model(x))


@pytest.mark.gpu
def test_a_step_is_replayed_from_a_graph() -> None:
    model = adapted(Chain(2, WIDTH)).to("cuda", torch.float16)
    example = torch.randn(8, WIDTH, device="cuda", dtype=torch.float16, requires_grad=True)
    x = torch.randn_like(example)
    eager = step(model, model, x)
    graphs = torch.cuda.make_graphed_callables(model, (example,))
    assert_alike(step(graphs, model, x), eager, least=2 + 2 * 2)
