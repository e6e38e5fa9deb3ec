"""Adapters on a model that several processes share: keeping them whole, and merging from shards."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch import distributed as dist

from road_peft.experts import ParamWrapper
from road_peft.layer import RoadLayer
from road_peft.shards import is_shared, whole


def replicate_adapters(
    model: nn.Module, group: dist.ProcessGroup | None = None
) -> set[nn.Parameter]:
    """Keep the trainable adapters of `model` whole on every process, and average their gradients.

    For engines that shard parameters: give the result to `fully_shard` as `ignored_params`, or name
    the modules to accelerate (`fsdp_ignored_modules: .*road_(theta|alpha|lora_A|lora_B)`), after
    this call. The adapter then keeps float32 under a policy that casts what is sharded to half
    precision, where 1 - 1e-3 rounds to 1. Processes start from the values of the first; each
    gradient is averaged over `group` (all processes if not given) as soon as it is there.

    Raises:
        ValueError: no processes were started, there is no trainable adapter, or one is sharded.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "no process group is there; call torch.distributed.init_process_group (accelerate does"
            " it) before replicate_adapters"
        )
    found = [p for layer in _layers(model).values() for p in _adapter(layer) if p.requires_grad]
    if not found or any(map(is_shared, found)):
        raise ValueError(
            "there is no trainable RoAd adapter to replicate, or it is sharded already; call"
            " replicate_adapters after get_peft_model and before fully_shard"
        )
    count = dist.get_world_size(group)

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(count)

    for parameter in found:
        dist.broadcast(parameter.data, group=group, group_src=0)
        parameter.register_post_accumulate_grad_hook(average)
    return set(found)


@torch.no_grad()
def merged_state_dict(
    model: nn.Module, adapter_names: list[str] | None = None
) -> dict[str, Tensor]:
    """Give the weights of the base model with the active (or named) adapters merged, from shards.

    Every process must call it. Each tensor is gathered by itself, so a device holds one whole layer
    at a time; the first process gets all of them in the memory of its host, the others nothing.
    Give the result to `save_pretrained(folder, state_dict=...)` of the base model. `model` is not
    changed.

    Raises:
        ValueError: a layer that cannot be merged so: quantised, of experts, with a tied weight, or
            beside modules that were trained whole. No process has sent anything by then.
    """
    layers = _layers(model)
    _check(model, layers)
    first = not dist.is_initialized() or dist.get_rank() == 0
    names = {name: layer._mergeable(adapter_names) for name, layer in layers.items()}
    result: dict[str, Tensor] = {}

    def keep(key: str, tensor: Tensor) -> None:
        if first:
            result[key] = tensor.detach().to("cpu", copy=True)

    inside = tuple(f"{name}." for name in layers)
    for key, tensor in _base(model).state_dict(keep_vars=True).items():
        if not key.startswith(inside):
            keep(key, whole(tensor))
    for name, layer in layers.items():
        weight, bias = layer._merged(names[name])
        keep(f"{name}.weight", weight)
        if bias is not None:
            keep(f"{name}.bias", bias)
    return result


def _check(model: nn.Module, layers: dict[str, RoadLayer]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in _base(model).named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in _base(model).named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{name} was trained whole or by tokens (modules_to_save, trainable_token_indices);"
                " save the adapter and merge it into a model that one process holds"
            )
        if isinstance(module, BaseTunerLayer) and name not in layers:
            raise ValueError(f"{name} carries an adapter of another method; unload it first")
    for name, layer in layers.items():
        weight: Any = getattr(layer.get_base_layer(), layer.weight_name, None)
        if layer.quantization_backend is not None or isinstance(layer, ParamWrapper):
            kind = "quantised" if layer.quantization_backend is not None else "of experts"
            raise ValueError(f"{name} is {kind}; merge it in a model that one process holds")
        if layer.merged:
            raise ValueError(f"{name} is merged already; use the state_dict of the base model")
        if len(owners[id(weight)]) > 1:
            raise ValueError(
                f"{name}: its weight is tied ({', '.join(owners[id(weight)])}); leave the layer out"
                " of target_modules, or load the model with tie_word_embeddings=False"
            )


def _base(model: nn.Module) -> nn.Module:
    """Give the model that was adapted, without PEFT's wrapper around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _layers(model: nn.Module) -> dict[str, RoadLayer]:
    return {n: m for n, m in _base(model).named_modules() if isinstance(m, RoadLayer)}


def _adapter(layer: RoadLayer) -> list[nn.Parameter]:
    return [p for name in layer.adapter_layer_names for p in getattr(layer, name).values()]
