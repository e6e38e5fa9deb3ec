"""vLLM's manager of LoRA slots, extended: a slot holds a LoRA or a RoAd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.lora.layers import LoRAMappingType
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.torch_utils import async_tensor_h2d

from road_peft.vllm_plugin import rotations
from road_peft.vllm_plugin.adapter import RoadAdapter, is_road, read_adapter


class RoadLoRAModelManager(LRUCacheLoRAModelManager):
    """Slots for both kinds. vLLM's LoRA takes a token with a RoAd for one without an adapter."""

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        self.slots = torch.full(
            (self.max_num_batched_tokens,), -1, dtype=torch.int32, device=self.device
        )
        self.active = torch.zeros(1, dtype=torch.bool)
        wrapper = next(iter(self.punica_wrapper_mapping.values()))  # of the language model
        self.rotations = rotations.attach(
            self.modules, wrapper, self.slots, self.active, self.lora_slots
        )
        if self.device.type == "cpu":
            for module in self.modules.values():
                _end_with_zeros(module)

    def _add_adapter(self, lora: Any) -> None:
        if isinstance(lora, RoadAdapter):
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        """Bring an adapter into a slot; False if it is in one."""
        fresh = super().activate_adapter(lora_id)
        adapter = self._registered_adapters[lora_id]
        if fresh and isinstance(adapter, RoadAdapter):
            slot = self.lora_index_to_id.index(lora_id)
            for name, held in self.rotations.items():
                held.write(slot, adapter.layers.get(name))
        return bool(fresh)

    def _set_adapter_mapping(self, mapping: Any) -> None:
        road = {
            adapter_id: slot
            for slot, adapter_id in enumerate(self.lora_index_to_id)
            if adapter_id is not None
            and isinstance(self._registered_adapters.cache.get(adapter_id), RoadAdapter)
        }
        if mapping.type is LoRAMappingType.LANGUAGE:  # else of an encoder, which is not rotated
            slots = [road.get(adapter_id, -1) for adapter_id in mapping.index_mapping]
            self.slots.fill_(-1)
            self.slots[: len(slots)].copy_(
                async_tensor_h2d(slots, dtype=torch.int32, device=self.device)
            )
            # CUDA graphs are captured with LoRAs that stand for any adapter
            counted = mapping.index_mapping if self.slots.is_cuda else [s + 1 for s in slots]
            self.active[0] = any(counted)
        others = {
            field: tuple(0 if i in road else i for i in getattr(mapping, field))
            for field in ("index_mapping", "prompt_mapping")
        }
        super()._set_adapter_mapping(replace(mapping, **others))


def _end_with_zeros(module: Any) -> None:
    """Give the stacks of B one more entry, of zeros.

    vLLM's products for CPUs index the stacks with -1 for a token that has no LoRA, beside others
    that have one, and so would give it the LoRA of the last slot.
    """
    held = getattr(module, "lora_b_stacked", None)
    if isinstance(held, torch.Tensor):
        module.lora_b_stacked = torch.cat((held, torch.zeros_like(held[:1])))
    elif held is not None:
        module.lora_b_stacked = tuple(torch.cat((b, torch.zeros_like(b[:1]))) for b in held)


def install() -> None:
    """Put the manager in the place of vLLM's, and read RoAd's folders; once."""
    worker: Any = LRUCacheWorkerLoRAManager
    if worker._manager_cls is RoadLoRAModelManager:
        return
    read_lora = worker._load_adapter

    def load_adapter(self: Any, request: Any) -> Any:
        folder = get_adapter_absolute_path(request.lora_path)
        if not is_road(folder):
            return read_lora(self, request)
        return read_adapter(folder, request.lora_int_id, self._adapter_manager)

    rotations.install()
    worker._manager_cls = RoadLoRAModelManager
    worker._load_adapter = load_adapter
