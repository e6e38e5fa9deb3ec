"""The adapters that are compared: how each is built, and the dense weight that defines it.

Every adapter is built from its library's own tuner class on the same linears, so no registry
decides which RoAd is meant. Its parameters are drawn at random (an adapter at its initial values
is the identity) and are float32, as PEFT makes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft.tuners.road as stock
import torch
from peft import IA3Config, IA3Model, LoraConfig, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import road_peft
from benchmarks._cases import GROUP_SIZE
from kernels_peft import rotate_reference
from road_peft.variants import VARIANTS

ADAPTER = "default"
RANK, LORA_ALPHA = 8, 16

# Part of a parameter's name -> mean and standard deviation of its values.
_VALUES = {
    "road_theta": (0.0, 0.3),
    "road_alpha": (1.0, 0.1),
    "ia3_l": (1.0, 0.1),
    "lora_A": (0.0, 0.02),
    "lora_B": (0.0, 0.02),
}

Dense = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Provider:
    """One method of one library.

    `config` makes its configuration for a list of module names; None leaves the model as it is.
    `dense` gives the weight W' with W' x = the output of the adapted layer, from W and the layer's
    parameters by the first part of their names; differentiable, in the dtype of W.
    """

    tuner: Callable[..., nn.Module] | None
    config: Callable[[list[str]], Any] | None
    dense: Dense

    def build(self, base: nn.Module, targets: Sequence[str]) -> nn.Module:
        """Give a copy of `base` with the adapter, on its device; only the adapter is trained."""
        model = copy.deepcopy(base).requires_grad_(False)
        if self.tuner is None or self.config is None:
            return model
        adapted = self.tuner(model, self.config(list(targets)), ADAPTER)
        adapted._cast_adapter_dtype(ADAPTER)  # type: ignore[operator]  # what PeftModel does
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                mean, std = next(v for key, v in _VALUES.items() if key in name)
                values = torch.randn(parameter.shape, generator=generator) * std + mean
                parameter.data.copy_(values)
        return adapted


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Give the adapted layers by their names in the base model."""
    inner = getattr(model, "model", model) if hasattr(model, "peft_config") else model
    modules = inner.named_modules()
    return {n: m for n, m in modules if isinstance(m, BaseTunerLayer) and isinstance(m, nn.Module)}


def _plain(weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return weight


def _rotated(weight: Tensor, parameters: Mapping[str, Tensor], variant: str) -> Tensor:
    theta, alpha = parameters["road_theta"], parameters["road_alpha"]
    first, second = VARIANTS[variant].coefficients(theta, alpha, GROUP_SIZE)
    return rotate_reference(weight, first, second, GROUP_SIZE, dim=0)


def _low_rank(weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return weight + (LORA_ALPHA / RANK) * (parameters["lora_B"] @ parameters["lora_A"])


def _scaled(weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return weight * parameters["ia3_l"].reshape(-1, 1)


def _lora_config(targets: list[str]) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=targets)


def _ia3_config(targets: list[str]) -> IA3Config:
    # without feedforward modules, which scale inputs, every layer is adapted at its outputs
    return IA3Config(target_modules=targets, feedforward_modules=[])


def _road(config: Callable[..., Any], targets: list[str], variant: str, **options: Any) -> Any:
    return config(variant=variant, group_size=GROUP_SIZE, target_modules=targets, **options)


def _road_provider(package: Any, variant: str, **options: Any) -> Provider:
    config = partial(_road, package.RoadConfig, variant=variant, **options)
    return Provider(package.RoadModel, config, partial(_rotated, variant=variant))


BASE, STOCK, OURS, LORA = "base", "stock road_1", "road_1", "lora r8"

TRAINED = {
    BASE: Provider(None, None, _plain),
    OURS: _road_provider(road_peft, "road_1"),
    "road_1 recompute": _road_provider(road_peft, "road_1", recompute=True),
    "road_2": _road_provider(road_peft, "road_2"),
    "road_4": _road_provider(road_peft, "road_4"),
    STOCK: _road_provider(stock, "road_1"),
    LORA: Provider(LoraModel, _lora_config, _low_rank),
    "ia3": Provider(IA3Model, _ia3_config, _scaled),
}

MERGED = {
    STOCK: TRAINED[STOCK],
    OURS: TRAINED[OURS],
    "road_1 inverse": _road_provider(road_peft, "road_1", exact_unmerge=False),
}
