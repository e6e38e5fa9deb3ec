"""The tuner: LoRA over packed layers, and what PEFT asks of it."""

from __future__ import annotations

from typing import Any

from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from apiq_peft.checkpoint import mark_quantized, packed_layers
from apiq_peft.config import ApiQConfig
from apiq_peft.layer import _NO_MERGE, ApiQLinear, pack_layer
from apiq_peft.packed import PackedLinear


class ApiQModel(LoraModel):
    """A model of packed layers with LoRA; made by `peft.get_peft_model(model, ApiQConfig(...))`.

    Layers of a full-precision model are packed in place, without data, when they are adapted;
    `apiq_peft.quantize` does it with data. Only the adapter that was calibrated together with the
    codes makes up for them: with it disabled the bare low-bit weights are left, and a further
    adapter starts from those.

    Source:
        ApiQ (arXiv:2402.05147).
    """

    def _create_and_replace(  # type: ignore[override]  # the argument's name is upstream's
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        config = ApiQConfig.of(lora_config)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, PackedLinear):
            try:
                target = pack_layer(base, *config.grid_of(current_key), config.scheme)
            except ValueError as error:
                raise ValueError(f"{current_key}: {error}") from error
            setattr(parent, target_name, target)
        super()._create_and_replace(
            config, adapter_name, target, target_name, parent, current_key, **kwargs
        )

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        kept = {name: kwargs[name] for name in ("r", "lora_alpha") if name in kwargs}
        return ApiQLinear(target, adapter_name, config=lora_config, **kept)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Pack and adapt the layers of one adapter; see `peft.tuners.tuners_utils.BaseTuner`."""
        config: Any = self.peft_config[adapter_name]
        packed = packed_layers(model)
        if packed and config.target_modules == "all-linear":  # PEFT does not know packed layers
            config.target_modules = set(packed)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        mark_quantized(model, ApiQConfig.of(self.peft_config[adapter_name]).scheme)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Refuse.

        Raises:
            ValueError: always, with what to do instead.
        """
        raise ValueError(_NO_MERGE)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            raise ValueError(_NO_MERGE)
        unload: Any = super()._unload_and_optionally_merge
        return unload(merge, progressbar, safe_merge, adapter_names)
