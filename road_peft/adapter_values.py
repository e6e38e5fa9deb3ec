"""The values of one adapter for the layers of one model: checked once, then only read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from road_peft.adapter_files import PREFIX
from road_peft.config import RoadConfig
from road_peft.variants import VARIANTS

# what a saved adapter may hold beside rotations; a table of coefficients cannot hold it
_BESIDE = ("lora_rank", "modules_to_save", "trainable_token_indices", "target_parameters")
_VECTORS = ("road_theta", "road_alpha")
# One row that overflows spoils the others of a packed batch: masked attention multiplies its
# infinities by 0. A trained scale stays within a few per cent of 1.
LARGEST_SCALE = 1e3
_BASE_WEIGHT = ".base_layer.weight"  # PEFT saves those of embeddings along, trained or not


@dataclass(frozen=True)
class LayerValues:
    """What one layer of an adapter holds: angles, scales and how to read them."""

    variant: str
    group_size: int
    theta: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class AdapterValues:
    """The rotations of an adapter by the name of the layer, in the memory of the host."""

    layers: Mapping[str, LayerValues]

    @property
    def nbytes(self) -> int:
        """The bytes of all angles and scales."""
        return sum(v.theta.nbytes + v.alpha.nbytes for v in self.layers.values())

    @classmethod
    def check(
        cls,
        name: str,
        config: Any,
        tensors: Mapping[str, Tensor],
        widths: Mapping[str, int],
        base_model: str,
        shapes: Mapping[str, Sequence[int]],
    ) -> AdapterValues:
        """Take over an adapter whose layers are among `widths`, a map from name to out_features.

        `tensors` are named as in a saved file. `base_model` is the name that the adapter must state
        as its base; "" accepts any. `shapes` are those of the weights of the layers.

        Raises:
            ValueError: the adapter was trained on another base, holds more than rotations, names
                other layers, or has values of a wrong size or that are not finite.
        """
        config = RoadConfig.of(config)
        theirs = config.base_model_name_or_path or ""
        if base_model and theirs and _last(theirs) != _last(base_model):
            raise ValueError(
                f"adapter {name!r} was trained on {theirs!r}, but this model is {base_model!r};"
                " choose an adapter of this model, or set base_model to the name that its adapters"
                " state ('' accepts any)"
            )
        beside = [field for field in _BESIDE if getattr(config, field)]
        if beside:
            raise ValueError(
                f"adapter {name!r} has {', '.join(beside)}, but a bank serves rotations only; use"
                " PEFT's load_adapter and generate(adapter_names=...) for it"
            )
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            layer, _, vector = key.removeprefix(PREFIX).rpartition(".")
            if key.endswith(_BASE_WEIGHT):
                _check_base_weight(name, key, tensor, shapes)
                continue
            if vector not in _VECTORS:
                raise ValueError(f"adapter {name!r} holds {key!r}, which is no part of a RoAd")
            found.setdefault(layer, {})[vector] = tensor
        unknown = sorted(found.keys() - widths.keys())
        if unknown:
            raise ValueError(
                f"adapter {name!r} adapts {len(unknown)} layer(s) that are not served"
                f" ({', '.join(unknown[:3])}): it belongs to another base model, or the bank was"
                " made with target_modules that leave them out"
            )
        targeted = {n for n in widths if config.target_modules and _targets(config, n)}
        missing = sorted(targeted - found.keys())
        if missing or not found:
            raise ValueError(
                f"adapter {name!r} holds nothing for {len(missing)} layer(s) that its configuration"
                f" names ({', '.join(missing[:3])}); the file is not whole"
            )
        return cls({n: _layer(name, n, config, found[n], widths[n]) for n in sorted(found)})

    @torch.no_grad()
    def coefficients(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Give (first, second) of every layer, computed on `device`.

        Layers of one variant and group size are computed together, in one go.

        Shapes:
            (2, n) each, n the rotated features of the layer.
        """
        kinds: dict[tuple[str, int], list[str]] = {}
        for name, values in self.layers.items():
            kinds.setdefault((values.variant, values.group_size), []).append(name)
        result: dict[str, Tensor] = {}
        for (variant, group_size), names in kinds.items():
            theta = torch.cat([self.layers[n].theta for n in names]).to(device, dtype)
            alpha = torch.cat([self.layers[n].alpha for n in names]).to(device, dtype)
            pair = torch.stack(VARIANTS[variant].coefficients(theta, alpha, group_size))
            per_pair = VARIANTS[variant].per_pair
            sizes = [2 * self.layers[n].theta.numel() // per_pair for n in names]
            result |= dict(zip(names, pair.split(sizes, 1), strict=True))
        return result


def _check_base_weight(
    adapter: str, key: str, weight: Tensor, shapes: Mapping[str, Sequence[int]]
) -> None:
    own = shapes.get(key.removeprefix(PREFIX).removesuffix(_BASE_WEIGHT), weight.shape)
    if tuple(weight.shape) != tuple(own):
        raise ValueError(
            f"adapter {adapter!r} was trained beside {key} of shape {tuple(weight.shape)}, but this"
            f" model's has {tuple(own)}; resize the embeddings of the model as for the training"
        )


def _last(name: str) -> str:
    """Give what a local copy and its repository have in common: the last part of the path."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _targets(config: RoadConfig, name: str) -> bool:
    return bool(check_target_module_exists(config, name))


def _layer(
    adapter: str, name: str, config: RoadConfig, vectors: dict[str, Tensor], width: int
) -> LayerValues:
    arguments = config.layer_arguments(name)
    variant, group_size = arguments["variant"], arguments["group_size"]
    rotated = width - width % group_size
    if not rotated or (rotated != width and config.remainder == "error"):
        raise ValueError(
            f"adapter {adapter!r}: its group size {group_size} does not divide the {width} outputs"
            f" of {name}; was it trained on another base model?"
        )
    size = VARIANTS[variant].size(rotated)
    for vector in _VECTORS:
        shape = tuple(vectors[vector].shape) if vector in vectors else "nothing"
        if shape != (size,):
            raise ValueError(
                f"adapter {adapter!r} holds {shape} for {name}.{vector}, but {variant} on {width}"
                f" outputs needs ({size},); was it trained on another base model?"
            )
        if not torch.isfinite(vectors[vector]).all():
            raise ValueError(f"adapter {adapter!r}: {name}.{vector} has values that are not finite")
    largest = float(vectors["road_alpha"].abs().max())
    if largest > LARGEST_SCALE:
        raise ValueError(
            f"adapter {adapter!r}: {name}.road_alpha has a scale of {largest:.3g}; above"
            f" {LARGEST_SCALE:g} outputs overflow, and with them those of other requests"
        )
    theta, alpha = (vectors[v].detach().to("cpu", copy=True) for v in _VECTORS)
    return LayerValues(variant, group_size, theta, alpha)
