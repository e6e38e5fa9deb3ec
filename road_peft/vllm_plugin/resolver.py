"""RoAd adapters by the name of their folder, loaded when a request first asks for one."""

from __future__ import annotations

from pathlib import Path

from vllm import envs
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from road_peft.vllm_plugin.adapter import config_of, is_road

_NAME = "road_peft"


class RoadFolderResolver(LoRAResolver):
    """Finds `folder`/name for a model; vLLM's own resolver of that folder takes LoRA only."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Give the request of an adapter of that name for that model, None if there is none."""
        path = (self.folder / lora_name).resolve()
        if Path(lora_name).name != lora_name or path.parent != self.folder or not is_road(path):
            return None
        theirs = config_of(path).get("base_model_name_or_path") or base_model_name
        if Path(theirs).name.lower() != Path(base_model_name).name.lower():
            return None
        return LoRARequest(lora_name, 1, str(path))  # vLLM numbers it anew


def install() -> None:
    """Register the resolver, if the environment names a folder and there is none yet."""
    folder = envs.VLLM_LORA_RESOLVER_CACHE_DIR
    if folder and _NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(_NAME, RoadFolderResolver(folder))
