"""Quantising a model layer after layer, on the inputs that the quantised layers before it make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from apiq_peft import ApiQConfig, PackedLinear
from apiq_peft.calibration.stacks import find_stacks, groups_of
from apiq_peft.layer import weight_of
from benchmarks._quantizer_peers import Found

# weights of layers with one input, that input in full precision, and in the quantised model
Solve = Callable[[dict[str, Tensor], list[Tensor], list[Tensor]], Mapping[str, Found]]


@torch.no_grad()
def walk(model: Any, samples: Tensor, names: Sequence[str], solve: Solve) -> dict[str, Found]:
    """Solve the layers `names`, front to back; their weights become what was found, in place.

    Shapes:
        samples: (samples, length), token ids.
    Raises:
        ValueError: the model is no plain row of blocks.
    """
    found: dict[str, Found] = {}
    stacks = find_stacks(model, list(names))
    if len(stacks) != 1:
        raise ValueError(f"the model has {len(stacks)} stacks of blocks; only one can be walked")
    blocks = list(stacks[0].blocks)
    full, calls = _capture(model, blocks, samples)
    quantized = list(full)
    for index, block in enumerate(blocks):
        prefix = f"{stacks[0].block_name(index)}."
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        layers = {name: block.get_submodule(name) for name in inside}
        run = partial(_run, block, calls[index])
        if not layers:
            full, quantized = run(full), run(quantized)
            continue
        groups = groups_of(block, layers, partial(_run, block, calls[index][:1], full[:1]))
        with _inputs({group[0]: layers[group[0]] for group in groups}) as seen:
            full = run(full)
        for group in groups:
            now = _inputs_of(layers[group[0]], block, calls[index], quantized)
            weights = {name: _weight(layers[name]) for name in group}
            for name, layer in solve(weights, seen[group[0]], now).items():
                weights[name].copy_(layer.weight())
                found[prefix + name] = layer
        quantized = run(quantized)
    return found


Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, without its states


def _capture(
    model: Any, blocks: Sequence[nn.Module], samples: Tensor
) -> tuple[list[Tensor], list[list[Arguments]]]:
    """Give the states that enter the first block, and what else each block gets, by sample."""
    states: list[Tensor] = []
    calls: list[list[Arguments]] = [[] for _ in blocks]

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[places[block]].append((args[1:], kwargs))
        if places[block] == 0:
            states.append(args[0])

    places = {block: number for number, block in enumerate(blocks)}
    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in blocks]
    try:
        for sample in samples.split(1):
            model(input_ids=sample, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states, calls


def _run(block: nn.Module, calls: Sequence[Arguments], states: Sequence[Tensor]) -> list[Tensor]:
    outputs = [
        block(entering, *args, **kwargs)
        for entering, (args, kwargs) in zip(states, calls, strict=True)
    ]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _weight(module: nn.Module) -> Tensor:
    weight = weight_of(module)
    assert weight is not None
    return weight.detach()


class _ReachedError(Exception):
    """Raised to leave a block once the input of a layer was seen."""


def _inputs_of(
    layer: nn.Module, block: nn.Module, calls: Sequence[Arguments], states: Sequence[Tensor]
) -> list[Tensor]:
    """Give what enters a layer of a block, without running what comes after."""
    inputs: list[Tensor] = []

    def leave(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        raise _ReachedError

    handle = layer.register_forward_pre_hook(leave)
    try:
        for call, entering in zip(calls, states, strict=True):
            with suppress(_ReachedError):
                _run(block, [call], [entering])
    finally:
        handle.remove()
    return inputs


@contextmanager
def _inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Note all inputs of some modules."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def weights_of(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Give the weights (N, K) of some layers by name; writing into one changes its layer."""
    return {name: _weight(model.get_submodule(name)) for name in names}


def assemble(model: Any, found: Mapping[str, Found], config: ApiQConfig) -> PeftModel:
    """Pack the layers that were found, with a LoRA beside each: its correction, or nothing yet."""
    for name, layer in found.items():
        module: Any = model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        dtype = module.weight.dtype
        packed = PackedLinear.from_codes(layer.codes, config.bits, module.bias, dtype)
        setattr(model.get_submodule(parent), child, packed)
    peft_model = get_peft_model(model, config)
    tuner: Any = peft_model.base_model
    adapted = dict(tuner.model.named_modules())
    with torch.no_grad():
        for name, layer in found.items():
            if layer.lora_A is not None and layer.lora_B is not None:
                adapted[name].lora_A["default"].weight.zero_()[: len(layer.lora_A)] = layer.lora_A
                b = adapted[name].lora_B["default"].weight.zero_()
                b[:, : layer.lora_B.shape[1]] = layer.lora_B
    return peft_model
