"""Replacing an adapter's values in place, without recompiling the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from road_peft.adapter_files import PREFIX, load_adapter_files
from road_peft.config import RoadConfig
from road_peft.layer import RoadLayer
from road_peft.shards import check_writable, write


def hotswap_adapter(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Replace the values of a RoAd adapter of `model` by those of a saved one, in place.

    Parameters stay the same objects, so a compiled model or a captured CUDA graph uses the new
    values without being compiled again. Both adapters must have the same layers, variants and group
    sizes. Everything is checked before the first value changes.

    Raises:
        ValueError: what does not match, or a value that is not finite, or the adapter is merged.
    """
    config, held = load_adapter_files(path)
    # PEFT saves the weight of an adapted embedding along; it is not the adapter's
    tensors = {k: t for k, t in held.items() if not k.endswith(".base_layer.weight")}
    targets = _targets(model, adapter_name, config)
    missing, unknown = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets)
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit adapter {adapter_name!r}: {len(missing)} tensor(s) are missing"
            f" ({', '.join(missing[:3])}) and {len(unknown)} are unknown"
            f" ({', '.join(unknown[:3])}); swap only adapters of the same layers"
        )
    for key, parameter in targets.items():
        check_writable(parameter)
        if tensors[key].shape != parameter.shape:
            raise ValueError(
                f"{key} has shape {tuple(tensors[key].shape)} in {path} and"
                f" {tuple(parameter.shape)} in the model; swap only adapters of the same variant"
            )
        if not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{key} in {path} holds values that are not finite")
    for key, parameter in targets.items():
        write(parameter, tensors[key])


def _targets(model: nn.Module, adapter_name: str, config: RoadConfig) -> dict[str, nn.Parameter]:
    targets: dict[str, nn.Parameter] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, RoadLayer) or adapter_name not in layer.road_theta:
            continue
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged; unmerge it before swapping")
        key = name.removeprefix("_orig_mod.").removeprefix(PREFIX)
        theirs = config.layer_arguments(layer.module_name)
        for field, ours in (
            ("variant", layer.variant[adapter_name]),
            ("group_size", layer.group_size[adapter_name]),
        ):
            if theirs[field] != ours:
                raise ValueError(
                    f"{key} has {field} {ours!r} in the model and {theirs[field]!r} in the file;"
                    " swap only adapters of the same variant and group size"
                )
        for parameters in layer.adapter_layer_names:
            if adapter_name in getattr(layer, parameters):
                targets[f"{PREFIX}{key}.{parameters}"] = getattr(layer, parameters)[adapter_name]
    if not targets:
        raise ValueError(f"the model has no RoAd adapter named {adapter_name!r}")
    return targets
