"""Gradient checkpointing of mixed batches: what is recomputed finds the rows of its forward.

The backward runs after the call, where no names are in force any more; a block that then took the
active adapters would give wrong gradients without a word. Oracle: the run without checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.road_peft._models import Mlp, adapted, tiny, with_adapters
from tests.road_peft._rows import (
    BASE,
    assert_gradients_close,
    belongs,
    configs,
    gradients,
    inputs_of,
    loss_of,
    tokens_for_rows,
    trained_model,
)

ROWS = ["c", BASE, "e", "d", "c"]
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {"dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def _functions(model: nn.Module) -> dict[str, Any]:
    """Give the checkpoint functions that modules hold, by name."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key in ("_gradient_checkpointing_func", "checkpoint_fn")
    }


def _count(model: nn.Module) -> list[int]:
    """Count the forwards of the base layers from now on."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for layer in adapted(model):
        layer.base_layer.register_forward_hook(count)
    return calls


def _enable(model: Any, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


def _assert_equal(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.any(), name
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", NO_DROPOUT)
def test_gradients_are_equal(name: str, use_reentrant: bool) -> None:
    model = trained_model(name, **NO_DROPOUT[name])
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))
    loss_of(model, inputs, adapter_names=ROWS).backward()
    wanted = gradients(model)
    _enable(model, use_reentrant)
    functions, calls = _functions(model), _count(model)
    assert functions
    loss = loss_of(model, inputs, adapter_names=ROWS)
    once = calls[0]
    assert _functions(model) == functions  # the plain ones are back before the backward
    loss.backward()
    assert calls[0] == 2 * once
    ours = gradients(model)
    assert _functions(model) == functions
    if name == "t5":  # the encoder's output sums the gradients of blocks in another order
        assert_gradients_close(ours, wanted)
    else:
        _assert_equal(ours, wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_batches_before_one_backward(use_reentrant: bool) -> None:
    model, other = trained_model(), ["a", "c", "d", BASE, "a"]
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))

    def both() -> dict[str, Tensor]:
        first = loss_of(model, inputs, adapter_names=ROWS)
        second = loss_of(model, inputs, adapter_names=other)
        third = loss_of(model, inputs)  # the active adapters, all in turn
        (first + 2 * second + 3 * third).backward()
        return gradients(model)

    wanted = both()
    assert {name for name in "acde" if any(belongs(p, name) for p in wanted)} == set("acde")
    _enable(model, use_reentrant)
    _assert_equal(both(), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_modules_to_save_inside_a_block(use_reentrant: bool) -> None:
    given = configs("b", "c", "f", target_modules=["q_proj"], remainder="identity")
    for owner in "bf":
        given[owner].modules_to_save = ["up_proj"]
    model = with_adapters(tiny("llama", dtype=torch.float64, use_cache=False), given)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".modules_to_save." in parameter_name:
                parameter.normal_(0, 0.5)
    model.train()
    model.set_requires_grad(["b", "c", "f"])
    names = ["f", BASE, "b", "c", "f"]
    inputs = inputs_of(model, tokens_for_rows(len(names)))
    loss_of(model, inputs, adapter_names=names).backward()
    wanted = gradients(model)
    assert len([n for n in wanted if ".modules_to_save." in n]) == 4  # two blocks, two owners
    _enable(model, use_reentrant)
    before = _hooks(model)
    loss = loss_of(model, inputs, adapter_names=names)
    assert _hooks(model) == before
    loss.backward()
    assert _hooks(model) == before
    _assert_equal(gradients(model), wanted)


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _wrap_blocks(model: Any, implementation: CheckpointImpl) -> None:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=implementation),
        check_fn=lambda m: isinstance(m, GradientCheckpointingLayer),
    )


def _plain(names: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in names.items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", list(CheckpointImpl))
def test_torchs_checkpoint_wrapper(implementation: CheckpointImpl, training: bool) -> None:
    """It recomputes in evaluation mode too."""
    model = trained_model().train(training)
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))
    loss_of(model, inputs, adapter_names=ROWS).backward()
    wanted = gradients(model)
    _wrap_blocks(model, implementation)
    model.enable_input_require_grads()
    functions, calls = _functions(model), _count(model)
    assert len(functions) == 2
    loss_of(model, inputs, adapter_names=ROWS).backward()
    assert calls[0] == 2 * len(list(adapted(model)))
    assert _functions(model) == functions
    _assert_equal(_plain(gradients(model)), wanted)


@pytest.mark.parametrize("implementation", list(CheckpointImpl))
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_inside_a_checkpoint(use_reentrant, implementation: CheckpointImpl) -> None:
    """What the recomputation of the outer one saves is recomputed in its turn."""
    model = trained_model()
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))
    loss_of(model, inputs, adapter_names=ROWS).backward()
    wanted = gradients(model)
    _enable(model, use_reentrant)
    _wrap_blocks(model, implementation)
    functions = _functions(model)
    loss_of(model, inputs, adapter_names=ROWS).backward()
    assert _functions(model) == functions
    _assert_equal(_plain(gradients(model)), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_whole_model(use_reentrant: bool) -> None:
    model = with_adapters(Mlp(), configs("a", "e", target_modules=["up", "down"])).train()
    model.base_model.set_adapter(["a", "e"])
    x, names = torch.randn(3, 8, requires_grad=True), ["e", BASE, "a"]
    model(x, adapter_names=names).square().sum().backward()
    wanted = gradients(model)

    def run(rows: Tensor) -> Tensor:
        return model(rows, adapter_names=names)

    checkpoint(run, x, use_reentrant=use_reentrant).square().sum().backward()
    _assert_equal(gradients(model), wanted)


def _fails_once(model: Any) -> Callable[[], None]:
    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    return next(adapted(model)).register_forward_pre_hook(fail).remove


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_functions_are_restored_after_an_exception(use_reentrant: bool) -> None:
    model = trained_model()
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))
    _enable(model, use_reentrant)
    functions = _functions(model)
    remove = _fails_once(model)
    with pytest.raises(RuntimeError, match="inside"):
        loss_of(model, inputs, adapter_names=ROWS)
    remove()
    assert _functions(model) == functions

    loss = loss_of(model, inputs, adapter_names=ROWS)
    remove = _fails_once(model)
    with pytest.raises(RuntimeError, match="inside"):  # while it is recomputed
        loss.backward()
    remove()
    assert _functions(model) == functions
    assert model.base_model.routing.current is None
    model.zero_grad()
    loss_of(model, inputs, adapter_names=ROWS).backward()
    assert gradients(model)


def test_nothing_is_bound_without_gradients() -> None:
    model = trained_model()
    _enable(model, use_reentrant=False)
    functions, seen = _functions(model), []
    block = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    handle = block.register_forward_pre_hook(lambda *_: seen.append(_functions(model)))
    inputs = inputs_of(model, tokens_for_rows(len(ROWS)))
    with torch.no_grad():
        loss_of(model, inputs, adapter_names=ROWS)
    handle.remove()
    assert seen == [functions]
