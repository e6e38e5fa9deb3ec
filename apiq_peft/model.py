"""The tuner: LoRA over packed layers, and what PEFT asks of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from apiq_peft.checkpoint import grids_of, mark_quantized, packed_layers, scheme_of
from apiq_peft.config import ApiQConfig
from apiq_peft.fingerprint import codes_digest, fingerprint
from apiq_peft.layer import ApiQLinear, pack_layer
from apiq_peft.packed import PackedLinear

_OTHER_BASE = (
    "load the base that the adapter belongs to, or give a new adapter the bits, group_size and"
    " scheme of this one"
)


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
        if not isinstance(base, PackedLinear) and not isinstance(target, ApiQLinear):
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
        """Pack and adapt the layers of one adapter; see `peft.tuners.tuners_utils.BaseTuner`.

        Raises:
            ValueError: the adapter is for another grid than that of the packed layers, or for other
                codes, or it is for a packed base and this one is not. Nothing was changed then.
        """
        config: Any = ApiQConfig.of(self.peft_config[adapter_name])
        packed, scheme = packed_layers(model), scheme_of(model)
        if packed and not config.grid_given:
            config = config.on_grids(grids_of(packed), scheme or config.scheme)
        if packed and config.target_modules == "all-linear":  # PEFT does not know packed layers
            config.target_modules = set(packed)
        if scheme not in (None, config.scheme):
            raise ValueError(
                f"the adapter is for the scheme {config.scheme!r}, but the model is packed in"
                f" {scheme!r}; {_OTHER_BASE}"
            )
        self._check_targets(model, config)
        if config.packed_base or not all(layer.reproducible for layer in packed.values()):
            config = copy.copy(config)  # the one that was given may serve other models as well
            config.packed_base, config.base_codes = True, self._codes(packed, config)
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if packed_layers(model):
            mark_quantized(model, config.scheme)

    def _codes(self, packed: Mapping[str, PackedLinear], config: Any) -> str | None:
        """Give the fingerprint of the codes under an adapter, and refuse other ones."""
        digests = {
            name: codes_digest(layer)
            for name, layer in packed.items()
            if self._check_target_module_exists(config, name)
        }
        found = fingerprint(digests)
        if found and config.base_codes and found != config.base_codes:
            raise ValueError(
                "the adapter belongs to other codes than those of this model, in the same grid"
                f" (base_codes is {config.base_codes}, here it is {found}); load the base that it"
                " was saved with, or give a new adapter a configuration without base_codes"
            )
        return config.base_codes or found

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        """Refuse layers that are not as the adapter needs them."""
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(inside):
                continue
            base = module
            if isinstance(module, BaseTunerLayer):
                inside, base = (*inside, name + "."), module.get_base_layer()
            if not name or not self._check_target_module_exists(config, name):
                continue
            if isinstance(base, PackedLinear):
                bits, group_size = config.grid_of(name)
                whole = base.in_features if group_size == -1 else group_size
                if (bits, whole) != (base.bits, base.group_size):
                    raise ValueError(
                        f"the adapter is for {bits} bits in groups of {group_size}, but {name} is"
                        f" packed in {base.bits} bits in groups of {base.group_size}; {_OTHER_BASE}"
                    )
            elif config.packed_base and not isinstance(module, ApiQLinear):
                raise ValueError(
                    f"the adapter belongs to the codes of a packed base, but {name} of this model"
                    " is in full precision; load the folder of the packed base first, and the"
                    " adapter onto that (PeftModel.from_pretrained), or the two folders of"
                    " apiq_peft.export_plain"
                )

    def _check_merge(self, adapter_names: list[str] | None, finite: bool) -> None:
        """Refuse to merge unless every layer can; nothing has changed then."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, ApiQLinear):
                try:
                    layer.check_merge(adapter_names, finite)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge into layers that were dequantised: all of them, or none.

        Raises:
            ValueError: a layer is packed, or with `safe_merge` a merged weight would not be finite.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        unload: Any = super()._unload_and_optionally_merge
        return unload(merge, progressbar, safe_merge, adapter_names)
