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
RANK, LORA_SCALE = 8, 2.0

# Part of a parameter's name -> mean and standard deviation of its values.
_VALUES = {
    "road_theta": (0.0, 0.3),
    "road_alpha": (1.0, 0.1),
    "ia3_l": (1.0, 0.1),
    "lora_A": (0.0, 0.02),
    "lora_B": (0.0, 0.02),
}

Parameters = Mapping[str, Tensor]  # of one adapter in one layer, by the first part of the name
Dense = Callable[[Tensor, Parameters], Tensor]


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

    def build(
        self,
        base: nn.Module,
        targets: Sequence[str],
        names: Sequence[str] = (ADAPTER,),
        *,
        share: bool = False,
        upcast: bool = True,
    ) -> nn.Module:
        """Give a copy of `base` with an adapter for each name; only the first one is trained.

        With `share` the copy has the parameters of `base` itself. Adapters are float32, or of the
        dtype of `base` without `upcast`.
        """
        known: dict[int, Any] = {id(p): p for p in base.parameters()} if share else {}
        model = copy.deepcopy(base, known).requires_grad_(False)
        if self.tuner is None or self.config is None:
            return model
        adapted: Any = self.tuner(model, self.config(list(targets)), names[0])
        for name in names[1:]:
            adapted.peft_config[name] = self.config(list(targets))
            adapted.inject_adapter(adapted.model, name)
        for name in names:
            adapted._cast_adapter_dtype(name, upcast)  # what PeftModel does
        of_adapter: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in names}
        for full_name, parameter in adapted.named_parameters():
            for name in of_adapter.keys() & set(full_name.split(".")):
                of_adapter[name].append((full_name, parameter))
        for seed, parameters in enumerate(of_adapter.values()):
            generator = torch.Generator().manual_seed(seed)
            for full_name, parameter in parameters:
                key = next(key for key in _VALUES if key in full_name)
                parameter.data.copy_(draw(key, parameter.shape, generator))
        return adapted


def draw(key: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Give random values for the parameter of a kind, "lora_A" or so."""
    mean, std = _VALUES[key]
    return torch.randn(*shape, generator=generator) * std + mean


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Give the adapted layers by their names in the base model."""
    inner = getattr(model, "model", model) if hasattr(model, "peft_config") else model
    modules = inner.named_modules()
    return {n: m for n, m in modules if isinstance(m, BaseTunerLayer) and isinstance(m, nn.Module)}


def plain(weight: Tensor, parameters: Parameters) -> Tensor:
    """Give the weight of a layer without an adapter."""
    return weight


def _rotated(weight: Tensor, parameters: Parameters, variant: str) -> Tensor:
    theta, alpha = parameters["road_theta"], parameters["road_alpha"]
    first, second = VARIANTS[variant].coefficients(theta, alpha, GROUP_SIZE)
    return rotate_reference(weight, first, second, GROUP_SIZE, dim=0)


def low_rank(weight: Tensor, parameters: Parameters) -> Tensor:
    """Give the weight of a layer with a LoRA."""
    return weight + LORA_SCALE * (parameters["lora_B"] @ parameters["lora_A"])


def scaled(weight: Tensor, parameters: Parameters) -> Tensor:
    """Give the weight of a layer with an (IA)3 at its outputs."""
    return weight * parameters["ia3_l"].reshape(-1, 1)


def _lora_config(targets: list[str], rank: int) -> LoraConfig:
    alpha = int(LORA_SCALE * rank)
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)


def _ia3_config(targets: list[str]) -> IA3Config:
    # without feedforward modules, which scale inputs, every layer is adapted at its outputs
    return IA3Config(target_modules=targets, feedforward_modules=[])


def _road(config: Callable[..., Any], targets: list[str], variant: str, **options: Any) -> Any:
    return config(variant=variant, group_size=GROUP_SIZE, target_modules=targets, **options)


def _road_provider(package: Any, variant: str, **options: Any) -> Provider:
    config = partial(_road, package.RoadConfig, variant=variant, **options)
    return Provider(package.RoadModel, config, partial(_rotated, variant=variant))


def lora_provider(rank: int) -> Provider:
    """Give PEFT's LoRA of a rank."""
    return Provider(LoraModel, partial(_lora_config, rank=rank), low_rank)


BASE, STOCK, OURS, LORA = "base", "stock road_1", "road_1", "lora r8"

TRAINED = {
    BASE: Provider(None, None, plain),
    OURS: _road_provider(road_peft, "road_1"),
    "road_1 recompute": _road_provider(road_peft, "road_1", recompute=True),
    "road_2": _road_provider(road_peft, "road_2"),
    "road_4": _road_provider(road_peft, "road_4"),
    STOCK: _road_provider(stock, "road_1"),
    LORA: lora_provider(RANK),
    "ia3": Provider(IA3Model, _ia3_config, scaled),
}

MERGED = {
    STOCK: TRAINED[STOCK],
    OURS: TRAINED[OURS],
    "road_1 inverse": _road_provider(road_peft, "road_1", exact_unmerge=False),
}
