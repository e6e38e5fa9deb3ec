"""A RoAd adapter in vLLM's host memory: read from PEFT's folder, checked, and cut for a process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.lora.lora_model import LoRAModel
from vllm.lora.utils import parse_fine_tuned_lora_name

from road_peft.adapter_files import PREFIX, load_adapter_files
from road_peft.adapter_values import AdapterValues
from road_peft.vllm_plugin.rotations import Shard, shards_of, widths_of


class RoadAdapter(LoRAModel):
    """A RoAd in the place of a LoRA: no matrices, and rotations by the name of vLLM's layer."""

    def __init__(self, adapter_id: int, layers: Mapping[str, Sequence[Shard | None]]) -> None:
        super().__init__(adapter_id, rank=0, loras={})
        self.layers = layers


def config_of(folder: str | Path) -> dict[str, Any]:
    """Give the adapter_config.json of a folder, empty if there is none that can be read."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # vLLM tells what is wrong with it
    return config if isinstance(config, dict) else {}


def is_road(folder: str | Path) -> bool:
    """Tell whether a folder holds a RoAd adapter."""
    return config_of(folder).get("peft_type") == "ROAD"


def read_adapter(folder: str, adapter_id: int, manager: Any) -> RoadAdapter:
    """Read the folder of a RoAd adapter for the layers of `manager`.

    Raises:
        ValueError: the adapter does not fit the model, holds more than rotations, or the server
            runs in a mode that cannot rotate.
    """
    if manager.lora_config.fully_sharded_loras or envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise ValueError(
            f"{folder} is a RoAd adapter, which needs the whole output of a layer; start vLLM"
            " without fully_sharded_loras and without VLLM_LORA_ENABLE_DUAL_STREAM"
        )
    config, tensors = load_adapter_files(folder)
    members = _members(manager)
    widths = {name: width for held in members.values() for name, width in held.items()}
    names = {hf: _name_in_vllm(hf, widths, manager) for hf in _layers_of(tensors)}
    known = {hf: widths[name] for hf, name in names.items() if name in widths}
    if all(hf == name for hf, name in names.items()):
        known = widths  # so that layers that the file lacks are noticed too
    values = AdapterValues.check(folder, config, tensors, known, "", {})
    pairs = values.coefficients(torch.device("cpu"), torch.float32)
    rotations = {names[hf]: (pairs[hf], layer.group_size) for hf, layer in values.layers.items()}
    return RoadAdapter(
        adapter_id,
        {
            name: shards_of(name, manager.modules[name], [rotations.get(m) for m in held])
            for name, held in members.items()
            if rotations.keys() & held.keys()
        },
    )


def _members(manager: Any) -> dict[str, dict[str, int]]:
    """Give for every layer that can rotate its members, as checkpoints name them, and widths."""
    found: dict[str, dict[str, int]] = {}
    for name in manager.rotations:
        members = manager.packed_modules.get(name, [name])
        widths = widths_of(manager.modules[name])
        if len(members) == 1:
            widths = [sum(widths)]
        if len(members) == len(widths):
            found[name] = dict(zip(members, widths, strict=True))
    return found


def _layers_of(tensors: Mapping[str, Any]) -> list[str]:
    keys = [key.removeprefix(PREFIX) for key in tensors]
    return sorted({k.rpartition(".")[0] for k in keys if k.endswith(("_theta", "_alpha"))})


def _name_in_vllm(layer: str, widths: Mapping[str, int], manager: Any) -> str:
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    name: str = parse_fine_tuned_lora_name(f"{PREFIX}{layer}.lora_A.weight", mapper)[0]
    if name not in widths and f"model.{name}" in widths and manager.is_pooling_model:
        return f"model.{name}"
    return name
