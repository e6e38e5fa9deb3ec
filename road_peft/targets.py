"""Which modules can be adapted, which are by default, and with which layer."""

from __future__ import annotations

import re
import warnings
from typing import Any, Protocol, runtime_checkable

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from road_peft.config import RoadConfig
from road_peft.experts import ParamWrapper
from road_peft.layer import RoadEmbedding, RoadLayer, RoadLinear

# layers of these models whose weights a fused kernel reads past the layer's own forward
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_FUSED_IN_MAMBA = {"out_proj", "conv1d"}
_BLOCK_NUMBER = re.compile(r"\.\d+\.")


def wrap(target: nn.Module, parameter_name: str | None = None, **backend_kwargs: Any) -> RoadLayer:
    """Give the layer that adapts `target`, or a parameter of it, still without an adapter.

    Raises:
        ValueError: a module that is not a linear layer or an embedding, or has other adapters.
    """
    if parameter_name is not None:
        return ParamWrapper(target, parameter_name, **backend_kwargs)
    if isinstance(target, BaseTunerLayer):
        raise ValueError(
            f"this layer already carries an adapter of another method ({type(target).__name__});"
            " for a LoRA beside the rotation set lora_rank, else unload the other adapter first"
        )
    if isinstance(target, nn.Embedding):
        return RoadEmbedding(target, *_sizes(target), feature_dim=1, **backend_kwargs)
    if _is_linear(target, **backend_kwargs):
        feature_dim = 1 if isinstance(target, Conv1D) else 0
        layer = RoadLinear(target, *_sizes(target), feature_dim=feature_dim, **backend_kwargs)
        if layer.quantization_backend is None and isinstance(target, LinearLike):
            name = type(target).__name__
            layer.quantization_backend = ForwardOnlyQuantizationBackend(name)
        return layer
    raise ValueError(
        f"Target module {target} is not supported. Currently, only the following modules are"
        " supported: `torch.nn.Linear`. Also `torch.nn.Embedding`, `Conv1D` of transformers, and"
        " the quantised linear layers that PEFT knows."
    )


def why_bypassed(model: nn.Module, parent: nn.Module, name: str) -> str | None:
    """Say why an adapter on the child `name` of `parent` would have no effect, None if it has."""
    if isinstance(parent, nn.MultiheadAttention):
        return "torch's MultiheadAttention uses the weight of its layers, not the layers"
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _MAMBA and name in _FUSED_IN_MAMBA:
        return f"the kernels of {model_type} use the weight of {name}, not the layer"
    return None


def _sizes(base: nn.Module) -> tuple[int, int]:
    if isinstance(base, nn.Linear | LinearLike):  # PEFT would give a shard of a shared weight
        return base.in_features, base.out_features
    in_features, out_features = _get_in_out_features(base)
    if in_features is None or out_features is None:
        raise ValueError(f"the sizes of {base} cannot be found out")
    return in_features, out_features


@runtime_checkable
class LinearLike(Protocol):
    """A frozen linear layer of another library: its outputs can be rotated, it cannot be merged."""

    in_features: int
    out_features: int

    def dequantize(self) -> Tensor:
        """Give the weight (out_features, in_features)."""
        ...


def _is_linear(base: nn.Module, **backend_kwargs: Any) -> bool:
    if isinstance(base, nn.Linear | Conv1D | LinearLike):
        return True
    backend = resolve_quantization_backend(base, **backend_kwargs)
    return backend is not None and backend.layer_type == "linear"


def linear_layers_of_blocks(model: nn.Module, config: RoadConfig) -> set[str]:
    """Name every linear layer inside a numbered block, by suffixes where these are unambiguous."""
    names, targets, left_out = [], set(), []
    inside: tuple[str, ...] = ()
    kwargs = get_quantization_kwargs(model)
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        names.append(name)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if base is not module:
            inside = (*inside, name + ".")
        parent, _, child = name.rpartition(".")
        if not _BLOCK_NUMBER.search(name) or not _is_linear(base, **kwargs):
            continue
        if why_bypassed(model, model.get_submodule(parent), child) is not None:
            continue
        _, features = _sizes(base)
        size = config.layer_arguments(name)["group_size"]
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
