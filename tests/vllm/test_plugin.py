"""What happens before any model: versions, registration, and names of folders."""

from __future__ import annotations

import asyncio
import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

import apiq_peft.vllm_plugin
import road_peft.vllm_plugin
from tests.vllm._models import lora_configs, road_configs, save_adapters

PLUGINS = [road_peft.vllm_plugin, apiq_peft.vllm_plugin]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_another_version_turns_the_plugin_off(
    plugin: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    before = LRUCacheWorkerLoRAManager._manager_cls
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        plugin.register()
    assert "vLLM is 0.33.0" in caplog.text
    assert "0.32" in caplog.text
    assert LRUCacheWorkerLoRAManager._manager_cls is before


def test_registering_twice_does_nothing() -> None:
    for plugin in PLUGINS * 2:
        plugin.register()
        held = (
            LRUCacheWorkerLoRAManager._load_adapter,
            BaseLinearLayerWithLoRA._apply_lora_to_output,
        )
    for plugin in PLUGINS:
        plugin.register()
    assert held == (
        LRUCacheWorkerLoRAManager._load_adapter,
        BaseLinearLayerWithLoRA._apply_lora_to_output,
    )


def test_the_mapping_of_an_encoder_leaves_the_slots_of_the_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from road_peft.vllm_plugin.adapter import RoadAdapter
    from road_peft.vllm_plugin.manager import RoadLoRAModelManager

    given: list[LoRAMapping] = []
    monkeypatch.setattr(
        LRUCacheLoRAModelManager, "_set_adapter_mapping", lambda _, mapping: given.append(mapping)
    )
    manager: Any = object.__new__(RoadLoRAModelManager)
    adapters = {7: RoadAdapter(7, {}), 8: LoRAModel(8, rank=4, loras={})}
    manager.lora_index_to_id = [8, 7]
    manager._registered_adapters = SimpleNamespace(cache=adapters)
    manager.device = torch.device("cpu")
    manager.slots = torch.full((4,), -1, dtype=torch.int32)
    manager.active = torch.zeros(1, dtype=torch.bool)

    manager._set_adapter_mapping(LoRAMapping((7, 8, 0), (7,)))
    for kind in (LoRAMappingType.TOWER, LoRAMappingType.CONNECTOR):
        manager._set_adapter_mapping(LoRAMapping((8, 8, 7, 7), (8, 7), type=kind))
    assert manager.slots.tolist() == [1, -1, -1, -1]
    assert manager.active.item()
    assert [m.index_mapping for m in given] == [(0, 8, 0), (8, 8, 0, 0), (8, 8, 0, 0)]
    manager._set_adapter_mapping(LoRAMapping((8,), (8,)))
    assert manager.slots.tolist() == [-1] * 4
    assert not manager.active.item()


def test_names_are_folders_of_road_adapters_of_the_model(model: Any, tmp_path: Path) -> None:
    from road_peft.vllm_plugin.resolver import RoadFolderResolver

    inside = tmp_path / "adapters"
    save_adapters(copy.deepcopy(model), road_configs(["one"]), inside)
    save_adapters(copy.deepcopy(model), lora_configs(["low"]), inside)
    save_adapters(copy.deepcopy(model), road_configs(["two"]), tmp_path)
    resolver = RoadFolderResolver(inside)

    def find(name: str, base: str = "anything/base") -> Any:
        return asyncio.run(resolver.resolve_lora(base, name))

    found = find("one")
    assert found.lora_path == str(inside / "one")
    assert find("one", "another") is None
    for name in ("low", "nobody", "../two", "one/../../two", str(tmp_path / "two"), ".", ""):
        assert find(name) is None, name
