"""The tuner: which modules are adapted, and what PEFT asks of a model with adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft.tuners.road as upstream
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from road_peft.config import RoadConfig
from road_peft.layer import RoadEmbedding, RoadLayer, RoadLinear
from road_peft.mixed_batch import route_rows

_BLOCK_NUMBER = re.compile(r"\.\d+\.")


class RoadModel(upstream.RoadModel):
    """A model with RoAd adapters; made by `peft.get_peft_model(model, RoadConfig(...))`.

    Source:
        RoAd (arXiv:2409.00119).
    """

    tuner_layer_cls = RoadLayer

    # ---- which modules ------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            if not isinstance(self.model, PreTrainedModel):
                raise ValueError(
                    "Please specify `target_modules` in `peft_config`: the default, every linear"
                    " layer of the blocks, is known for transformers models only"
                )
            peft_config.target_modules = _linear_layers_of_blocks(self.model, _ours(peft_config))
        return peft_config

    def _create_and_replace(
        self,
        road_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        config = _ours(road_config)
        try:
            if isinstance(target, RoadLayer):
                layer = target
            else:
                layer = self._create_new_module(
                    config, adapter_name, target, **get_quantization_kwargs(self.model)
                )
            layer.update_layer(adapter_name, **_layer_arguments(config, current_key))
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _create_new_module(
        road_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> RoadLayer:
        layer = _wrap(target, **kwargs)
        layer._active_adapter = adapter_name
        return layer

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add the layers of one adapter; see `peft.tuners.tuners_utils.BaseTuner`."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.peft_config[adapter_name]._resolved_modules = sorted(
            name
            for name, layer in model.named_modules()
            if isinstance(layer, RoadLayer) and adapter_name in layer.road_theta
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # layers hold float32; a user who declines the upcast gets the dtype of the base layer
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for _, layer in self.road_layers():
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if dtype is None or not dtype.is_floating_point:
                continue
            for parameters in (getattr(layer, name) for name in layer.adapter_layer_names):
                if adapter_name in parameters:
                    parameters[adapter_name].data = parameters[adapter_name].data.to(dtype)

    def road_layers(self) -> Iterator[tuple[str, RoadLayer]]:
        """Give every adapted layer with its name in the base model."""
        for name, module in self.model.named_modules():
            if isinstance(module, RoadLayer):
                yield name, module

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter, also from layers whose own name contains PEFT's prefix `road_`."""
        super().delete_adapter(adapter_name)
        for _, layer in self.road_layers():
            if adapter_name in layer.road_theta:
                layer.delete_adapter(adapter_name)
                self.active_adapter = layer.active_adapters

    # ---- merging ------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge the active (or the named) adapters into every layer, or into none.

        Raises:
            ValueError: the name of a layer and why it cannot be merged.
        """
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        shared = _shared_weights(self.model)
        for name, layer in self.road_layers():
            weight = getattr(layer.get_base_layer(), "weight", None)
            others = [n for n in shared.get(id(weight), []) if not n.startswith(name + ".")]
            if others and layer._mergeable(adapter_names):
                raise ValueError(
                    f"{name}: its weight is tied with {', '.join(others)}; merging would rotate"
                    " those as well. Untie them (load the model with tie_word_embeddings=False) or"
                    " leave the layer out of target_modules"
                )
            try:
                with onload_layer(layer):
                    layer.check_merge(adapter_names, safe_merge)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    # ---- one adapter per row ------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        with route_rows(self.model, adapter_names, kwargs):
            yield


def _ours(config: Any) -> RoadConfig:
    """Give `config` as our class; a plain `peft.RoadConfig` lacks fields, which keep defaults."""
    if isinstance(config, RoadConfig):
        return config
    known = RoadConfig.__dataclass_fields__
    return RoadConfig(**{k: v for k, v in vars(config).items() if k in known and k != "peft_type"})


def _layer_arguments(config: RoadConfig, key: str) -> dict[str, Any]:
    variant_key = get_pattern_key(list(config.variant_pattern), key)
    group_size_key = get_pattern_key(list(config.group_size_pattern), key)
    return {
        "variant": config.variant_pattern.get(variant_key, config.variant),
        "group_size": config.group_size_pattern.get(group_size_key, config.group_size),
        "init_weights": config.init_weights,
        "remainder": config.remainder,
        "recompute": config.recompute,
        "exact_unmerge": config.exact_unmerge,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "inference_mode": config.inference_mode,
    }


def _wrap(target: nn.Module, **backend_kwargs: Any) -> RoadLayer:
    if isinstance(target, BaseTunerLayer):
        raise ValueError(
            f"this layer already carries an adapter of another method ({type(target).__name__});"
            " for a LoRA beside the rotation set lora_rank, else unload the other adapter first"
        )
    if isinstance(target, nn.Embedding):
        sizes = (target.num_embeddings, target.embedding_dim)
        return RoadEmbedding(target, *sizes, feature_dim=1, **backend_kwargs)
    if isinstance(target, Conv1D):
        sizes = (target.weight.shape[0], target.nf)
        return RoadLinear(target, *sizes, feature_dim=1, **backend_kwargs)
    if _is_linear(target, **backend_kwargs):
        return RoadLinear(target, target.in_features, target.out_features, **backend_kwargs)
    raise ValueError(
        f"Target module {target} is not supported. Currently, only the following modules are"
        " supported: `torch.nn.Linear`. Also `torch.nn.Embedding`, `Conv1D` of transformers, and"
        " the quantised linear layers that PEFT knows."
    )


def _is_linear(base: nn.Module, **backend_kwargs: Any) -> bool:
    if isinstance(base, nn.Linear | Conv1D):
        return True
    backend = resolve_quantization_backend(base, **backend_kwargs)
    return backend is not None and backend.layer_type == "linear"


def _linear_layers_of_blocks(model: nn.Module, config: RoadConfig) -> set[str]:
    """Name every linear layer inside a numbered block, by suffixes where these are unambiguous."""
    names, targets, left_out, inside = [], set(), [], ()
    kwargs = get_quantization_kwargs(model)
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        names.append(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if base is not module:
            inside = (*inside, name + ".")
        if not _BLOCK_NUMBER.search(name) or not _is_linear(base, **kwargs):
            continue
        features = base.nf if isinstance(base, Conv1D) else base.out_features
        size = _layer_arguments(config, name)["group_size"]
        if features < size or (features % size and config.remainder == "error"):
            left_out.append(f"{name} ({features})")
        else:
            targets.add(name)
    if left_out:
        warnings.warn(
            f"group_size={config.group_size} does not divide the outputs of {len(left_out)} linear"
            f" layer(s), which are left out: {', '.join(left_out[:4])}"
            + (", ..." if len(left_out) > 4 else ""),
            stacklevel=2,
        )
    others = [name for name in names if name not in targets]
    return {_shortest_suffix(name, others) for name in targets}


def _shortest_suffix(name: str, others: list[str]) -> str:
    """Shorten a module's name as long as PEFT, which matches suffixes, cannot take it for another.

    A full name would match exactly, whatever `layers_to_transform` says.
    """
    parts = name.split(".")
    for length in range(1, len(parts)):
        suffix = ".".join(parts[-length:])
        if not any(other == suffix or other.endswith("." + suffix) for other in others):
            return suffix
    return name


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners
