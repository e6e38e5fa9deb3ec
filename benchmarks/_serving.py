"""Models that serve every row of a batch with an adapter of its own: how each is built.

All of them share the parameters of one base model. Adapters that a library mixes by itself are of
its own tuner class, used as `generate(adapter_names=...)` uses it. Adapters are float32, as PEFT
makes them, but for two on a bfloat16 model: PEFT's RoAd, whose mixed batch fails with float32 ones,
and PEFT's LoRA on CUDA. On a CPU float32 makes LoRA faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import road_peft
from benchmarks._measure import relative_error
from benchmarks._models import LINEARS_OF_BLOCK, VOCABULARY
from benchmarks._providers import (
    BASE,
    LORA,
    MERGED,
    OURS,
    RANK,
    STOCK,
    TRAINED,
    Dense,
    Parameters,
    Provider,
    adapted_layers,
    lora_provider,
    low_rank,
    plain,
    scaled,
)
from benchmarks._row_layers import BmmLora, GroupedLora, RowLayer, ScaledRows, row_layer

Layers = Mapping[str, Parameters]  # of one adapter: the name of a layer -> its parameters

_CHECK_TOKENS = 9


@dataclass(frozen=True)
class Server:
    """A model with adapters.

    Inside `rows(names)` row i of a batch takes the adapter `names[i]`. `layers` gives the
    parameters of an adapter, `dense` the weight that they stand for.
    """

    model: Any  # a LlamaForCausalLM, or a tuner around one
    rows: Callable[[Sequence[str]], AbstractContextManager[object]]
    layers: Callable[[str], Layers]
    dense: Dense


@dataclass(frozen=True)
class Served:
    """A provider: `build` puts adapters of some names on a base model.

    Without `mixed` all rows take the first adapter (or none), whatever is asked for. `captured`
    says for a dtype whether a decode step can be captured in a CUDA graph: whether nothing waits
    for the device.
    """

    build: Callable[[nn.Module, Sequence[str]], Server]
    mixed: bool = True
    captured: Callable[[torch.dtype], bool] = lambda dtype: True


def _bare(base: nn.Module, names: Sequence[str]) -> Server:
    return Server(base, lambda rows: nullcontext(), lambda name: {}, plain)


def _merged(base: nn.Module, names: Sequence[str]) -> Server:
    provider = MERGED["road_1 inverse"]  # keeps no second copy of the weights
    model: Any = provider.build(base, LINEARS_OF_BLOCK, names[:1])
    layers = _copied(_layers_of_tuner(model, names[0]))
    return Server(
        model.merge_and_unload(), lambda rows: nullcontext(), lambda name: layers, provider.dense
    )


def _by_tuner(base: nn.Module, names: Sequence[str], provider: Provider, upcast: bool) -> Server:
    model: Any = provider.build(base, LINEARS_OF_BLOCK, names, share=True, upcast=upcast)
    return Server(
        model.eval(),
        lambda rows: model._enable_peft_forward_hooks(adapter_names=list(rows)),
        partial(_layers_of_tuner, model),
        provider.dense,
    )


def _active(base: nn.Module, names: Sequence[str], provider: Provider, upcast: bool) -> Server:
    server = _by_tuner(base, names[:1], provider, upcast)
    layers = partial(server.layers, names[0])
    return Server(server.model, lambda rows: nullcontext(), lambda name: layers(), server.dense)


def _by_bank(base: nn.Module, names: Sequence[str]) -> Server:
    provider = TRAINED[OURS]
    adapted: Any = provider.build(base, LINEARS_OF_BLOCK, names, share=True)
    layers = {name: _layers_of_tuner(adapted, name) for name in names}
    model = _shared(base)
    bank = _BANK(model, slots=len(names), target_modules=list(LINEARS_OF_BLOCK), base_model="")
    for name in names:
        tensors = {
            f"base_model.model.{layer}.{kind}": value.detach()
            for layer, parameters in layers[name].items()
            for kind, value in parameters.items()
        }
        bank.add(name, (adapted.peft_config[name], tensors))
    return Server(model, bank.rows, layers.__getitem__, provider.dense)


def _by_rows(
    base: nn.Module, names: Sequence[str], cls: type[RowLayer], dense: Dense, rank: int = RANK
) -> Server:
    model = _shared(base)
    layers: dict[str, RowLayer] = {}
    for name, linear in _linears(model).items():
        layers[name] = row_layer(cls, linear, len(names), rank)
        _replace(model, name, layers[name])
    slots = {name: slot for slot, name in enumerate(names)}
    return Server(
        model,
        partial(_selected, model, layers, slots),
        lambda name: {n: layer.parameters_of(slots[name]) for n, layer in layers.items()},
        dense,
    )


@contextmanager
def _selected(
    model: nn.Module,
    layers: Mapping[str, RowLayer],
    slots: Mapping[str, int],
    names: Sequence[str],
) -> Iterator[None]:
    """Select the adapters of the rows; rows of one adapter go through the model side by side."""
    device = next(model.parameters()).device
    wanted = torch.tensor([slots[name] for name in names], device=device)
    order = wanted.argsort(stable=True)
    for layer in layers.values():
        layer.select(wanted[order])
    if torch.equal(order, torch.arange(len(order), device=device)):
        yield
        return
    back = order.argsort()

    def sort(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = {key: _permuted(value, order) for key, value in kwargs.items()}
        return tuple(_permuted(value, order) for value in args), kwargs

    def restore(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits[back]
        return output

    handles = [
        model.register_forward_pre_hook(sort, with_kwargs=True),
        model.register_forward_hook(restore),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _permuted(value: Any, order: Tensor) -> Any:
    """Put the rows of a tensor in order; what has one row for all stays."""
    fits = isinstance(value, Tensor) and value.dim() > 1 and len(value) == len(order)
    return value[order] if fits else value


def _shared(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEARS_OF_BLOCK
    }


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _layers_of_tuner(model: nn.Module, adapter: str) -> Layers:
    return {
        name: {
            parts[0]: parameter
            for full_name, parameter in layer.named_parameters()
            if adapter in (parts := full_name.split("."))
        }
        for name, layer in adapted_layers(model).items()
    }


def _copied(layers: Layers) -> Layers:
    return {n: {k: v.detach().clone() for k, v in found.items()} for n, found in layers.items()}


def _never(dtype: torch.dtype) -> bool:
    return False


def _has_grouped_kernel(dtype: torch.dtype) -> bool:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return hopper and dtype == torch.bfloat16  # else groups are read on the host


def _quickest_lora(
    base: nn.Module, names: Sequence[str], provider: Provider, build: Callable[..., Server]
) -> Server:
    on_cpu = next(base.parameters()).device.type == "cpu"
    return build(base, names, provider=provider, upcast=on_cpu)


def bmm_lora(rank: int) -> Served:
    """Give the batched product with LoRA of a rank."""
    return Served(partial(_by_rows, cls=BmmLora, dense=low_rank, rank=rank))


def active_lora(rank: int) -> Served:
    """Give PEFT's LoRA of a rank as a single active adapter, without names."""
    build = partial(_quickest_lora, provider=lora_provider(rank), build=_active)
    return Served(build, mixed=False)


MERGED_ONE, BANK, ACTIVE = "merged", "road_1 bank", "road_1 active"
BMM, GROUPED, IA3 = "bmm lora r8", "grouped lora r8", "ia3"

_BANK: Any = getattr(road_peft, "RoadBank", None)

SERVED: dict[str, Served] = {
    BASE: Served(_bare, mixed=False),
    MERGED_ONE: Served(_merged, mixed=False),
    OURS: Served(partial(_by_tuner, provider=TRAINED[OURS], upcast=True)),
    **({} if _BANK is None else {BANK: Served(_by_bank)}),
    STOCK: Served(partial(_by_tuner, provider=TRAINED[STOCK], upcast=False), captured=_never),
    LORA: Served(partial(_quickest_lora, provider=TRAINED[LORA], build=_by_tuner), captured=_never),
    BMM: bmm_lora(RANK),
    GROUPED: Served(
        partial(_by_rows, cls=GroupedLora, dense=low_rank), captured=_has_grouped_kernel
    ),
    IA3: Served(partial(_by_rows, cls=ScaledRows, dense=scaled)),
}

# with one row there is nothing to mix: libraries have a path of their own for the active adapter
SINGLE: dict[str, Served] = {
    BASE: SERVED[BASE],
    MERGED_ONE: SERVED[MERGED_ONE],
    OURS: SERVED[OURS],
    ACTIVE: Served(partial(_active, provider=TRAINED[OURS], upcast=True), mixed=False),
}


# ---- is it right? -----------------------------------------------------------------------------


class _ExactLinear(nn.Module):
    """A linear layer in float64 that keeps no copy of its weight."""

    def __init__(self, weight: Tensor, dense: Dense, parameters: Parameters) -> None:
        super().__init__()
        exact = {kind: value.double() for kind, value in parameters.items()}
        self.weight = lambda: dense(weight.double(), exact)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())


@torch.no_grad()
def exact_logits(base: nn.Module, server: Server, adapter: str, ids: Tensor) -> Tensor:
    """Give the logits of `base` in float64 with the dense weights of one adapter in place."""
    linears = _linears(base)
    layers = server.layers(adapter)
    known: dict[int, Any] = {id(linear.weight): linear.weight for linear in linears.values()}
    exact: Any = copy.deepcopy(base, known)
    for name, linear in linears.items():
        _replace(exact, name, _ExactLinear(linear.weight, server.dense, layers.get(name, {})))
    return exact.double()(ids, use_cache=False).logits


@torch.no_grad()
def serving_error(base: nn.Module, server: Server, adapters: Sequence[str]) -> float:
    """Give the largest relative error of a row's logits, against the row alone in float64.

    The rows, of a few adapters out of order, go through a prefill and a decode step.
    """
    names = [adapters[-1], adapters[0], adapters[-1]]
    device = next(base.parameters()).device
    ids = torch.randint(1, VOCABULARY, (len(names), _CHECK_TOKENS), device=device)
    with server.rows(names):
        before = server.model(input_ids=ids[:, :-1], use_cache=True)
        after = server.model(
            input_ids=ids[:, -1:], past_key_values=before.past_key_values, use_cache=True
        )
    logits = torch.cat((before.logits, after.logits), 1)
    expected = torch.empty_like(logits, dtype=torch.float64)
    for adapter in dict.fromkeys(names):
        rows = [row for row, name in enumerate(names) if name == adapter]
        expected[rows] = exact_logits(base, server, adapter, ids[rows])
    return relative_error(list(logits), list(expected))
