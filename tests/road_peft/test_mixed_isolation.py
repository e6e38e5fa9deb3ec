"""What a mixed batch leaves behind, and what it shares: nothing.

After a call, and after an error anywhere inside, the model has no hook and no route. Threads that
run one model each have rows of their own. Copies and pickles work, and are apart.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.road_peft._models import VOCABULARY, Mlp, adapted, tiny, with_adapters
from tests.road_peft._rows import (
    BASE,
    NAMES,
    assert_network_close,
    configs,
    gradients,
    loss_of,
    mixed_model,
    only,
    tokens_for_rows,
    trained_model,
)

ROUNDS = 15


def _saving(**settings: Any) -> Any:
    """Give a model of which each adapter has its own head."""
    given = configs("c", "e", modules_to_save=["lm_head"])
    model = with_adapters(tiny("llama", dtype=torch.float64, **settings), given)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.normal_(0, 0.5)
    return model


def _state(model: Any) -> list[Any]:
    """Give what a call may leave: hooks, functions put on modules, and the route."""
    functions = ("_gradient_checkpointing_func", "checkpoint_fn", "forward")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    found: list[Any] = [model.base_model.routing.current]
    for module in model.modules():
        found += [vars(module).get(name) for name in functions]
        found += [list(vars(module)[name].values()) for name in hooks]
    return found


# ---- threads ------------------------------------------------------------------------------------


def _at_once(*tasks: Callable[[], None]) -> None:
    """Run each task in a thread of its own, many times, and raise what one raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def work(task: Callable[[], None]) -> None:
        try:
            start.wait(30)
            for _ in range(ROUNDS):
                task()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", ["plain", "modules to save", "flattened"])
def test_threads_have_rows_of_their_own(kind: str) -> None:
    model = {
        "plain": lambda: mixed_model("llama"),
        "modules to save": _saving,
        "flattened": lambda: mixed_model("opt"),
    }[kind]()
    model.set_adapter("c")
    before = _state(model)
    lists = [NAMES, [BASE, "e"], None, ["e", "c", "c", BASE, "e"]]

    def task(length: int, names: list[str] | None) -> Callable[[], None]:
        tokens = tokens_for_rows(len(names or NAMES), length)
        wanted = model(tokens, adapter_names=names).logits

        def check() -> None:
            assert_network_close(model(tokens, adapter_names=names).logits, wanted)

        return check

    _at_once(*(task(3 + i, names) for i, names in enumerate(lists)))
    assert _state(model) == before


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_train_with_checkpoints_have_rows_of_their_own() -> None:
    model = trained_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = _state(model)

    def task(names: list[str]) -> Callable[[], None]:
        inputs = {"input_ids": tokens_for_rows(len(names))}

        def run() -> tuple[Tensor | None, ...]:
            loss = loss_of(model, inputs, adapter_names=names)
            return torch.autograd.grad(loss, parameters, allow_unused=True)

        wanted = run()

        def check() -> None:
            for ours, gradient in zip(run(), wanted, strict=True):
                assert (ours is None) == (gradient is None)
                if ours is not None and gradient is not None:
                    assert_network_close(ours, gradient)

        return check

    _at_once(task(["c", BASE, "e"]), task(["a", "d"]), task(["e", "e", "c", "a"]))
    assert _state(model) == before


# ---- copies -------------------------------------------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled], ids=["copy", "pickle"])
def test_a_copy_serves_rows_apart_from_the_original(duplicate: Callable[..., Any]) -> None:
    model, tokens = _saving(), tokens_for_rows()
    wanted = model(tokens, adapter_names=NAMES).logits
    twin = duplicate(model)
    assert torch.equal(twin(tokens, adapter_names=NAMES).logits, wanted)
    assert twin.base_model.routing is not model.base_model.routing
    assert {id(layer.routing) for layer in adapted(twin)} == {id(twin.base_model.routing)}
    with torch.no_grad():
        for layer in adapted(twin):
            layer.road_theta["c"].add_(0.5)
    assert torch.equal(model(tokens, adapter_names=NAMES).logits, wanted)
    changed = twin(tokens, adapter_names=NAMES).logits
    assert torch.equal(changed[1], wanted[1])
    assert not torch.allclose(changed[0], wanted[0])


def test_a_copy_made_inside_a_call_has_no_route() -> None:
    model, copies = mixed_model("llama"), []
    layer = next(adapted(model))

    def duplicate(*_: Any) -> None:
        handle.remove()
        copies.append(copy.deepcopy(model))

    handle = layer.register_forward_pre_hook(duplicate)
    model(tokens_for_rows(), adapter_names=NAMES)
    (twin,) = copies
    tokens = tokens_for_rows(2)
    assert twin.base_model.routing.current is None
    assert torch.equal(twin(tokens).logits, model(tokens).logits)


# ---- errors -------------------------------------------------------------------------------------


class _StopError(Exception):
    """Raised inside a call."""


def _raise(*_: Any, **__: Any) -> None:
    raise _StopError


PLACES: dict[str, Callable[[Any], nn.Module]] = {
    "an adapted layer": lambda model: list(adapted(model))[-1],
    "its base layer": lambda model: list(adapted(model))[-1].base_layer,
    "a block": lambda model: model.get_base_model().model.layers[1],
    "a module to save": lambda model: model.get_base_model().lm_head,
    "an adapter's copy": lambda model: model.get_base_model().lm_head.modules_to_save["e"],
    "the original": lambda model: model.get_base_model().lm_head.original_module,
}


@pytest.mark.parametrize("call", ["forward", "generate", "train"])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_anywhere_leaves_nothing_behind(place: str, call: str) -> None:
    model, tokens = _saving(), tokens_for_rows()
    wanted = model(tokens, adapter_names=NAMES).logits
    if call == "train":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    settings = {"max_new_tokens": 2} if call == "generate" else {}
    function = model.generate if call == "generate" else model
    before = _state(model)
    handle = PLACES[place](model).register_forward_pre_hook(_raise)
    mask = torch.ones_like(tokens)
    with pytest.raises(_StopError):
        function(input_ids=tokens, attention_mask=mask, adapter_names=NAMES, **settings)
    handle.remove()
    assert _state(model) == before
    model.eval()
    assert torch.equal(model(tokens, adapter_names=NAMES).logits, wanted)
    base = only(model, BASE, lambda: model(tokens).logits)
    assert_network_close(base[1], wanted[1])


def test_errors_of_the_arguments_leave_nothing_behind() -> None:
    model = mixed_model("llama")
    tokens, before = tokens_for_rows(2), _state(model)
    calls: dict[type[Exception], dict[str, Any]] = {
        ValueError: {"input_ids": tokens, "adapter_names": ["c", "nobody"]},
        IndexError: {"input_ids": tokens + VOCABULARY, "adapter_names": ["c", "e"]},
    }
    for error, arguments in calls.items():
        for function in (model, model.generate):
            with pytest.raises(error):
                function(**arguments)
            assert _state(model) == before


def test_a_call_inside_a_call_has_its_own_rows() -> None:
    """A hook of the user's may run the model again; the outer rows are in force after it."""
    model = with_adapters(Mlp(), configs("a", "e", target_modules=["up", "down"]))
    x, results = torch.randn(3, 8), []
    names = ["e", BASE, "a"]
    wanted, inner = model(x, adapter_names=names), model(x[:2], adapter_names=["a", "e"])
    with torch.no_grad():
        active = model(x)

    def again(*_: Any) -> None:
        handle.remove()
        results.append(model(x[:2], adapter_names=["a", "e"]))

    handle = model.base_model.model.down.register_forward_pre_hook(again)
    assert torch.equal(model(x, adapter_names=names), wanted)
    assert torch.equal(results[0], inner)
    assert torch.equal(model(x), active)
    assert gradients(model) == {}
