"""A quantised model on disk: what it holds, read from its configuration and headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from apiq_peft.checkpoint import METHOD, ApiQQuantizationConfig
from apiq_peft.export import ADAPTER, BASE
from kernels_peft.packing import RUN

_ITEM_BITS = {"I32": 32, "F16": 16, "BF16": 16, "F32": 32}
_LORA = "base_model.model."  # before the name of a layer in the files of PEFT


@dataclass(frozen=True)
class StoredLayer:
    """A packed layer: its sizes, its grid, what its files hold, and the rank of its LoRA."""

    layer: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    stored_bits: int  # of codes, zero points and scales
    rank: int  # 0 without a LoRA

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.in_features * self.out_features

    @property
    def bits_per_weight(self) -> float:
        """Of codes, zero points and scales."""
        return self.stored_bits / self.weights

    @property
    def lora_values(self) -> int:
        """How many values A and B have."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class StoredModel:
    """A quantised model: its layers, and the bytes of all files of its two folders."""

    layers: list[StoredLayer]
    scheme: str
    base_disk_bytes: int
    adapter_disk_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Of codes, zero points and scales of all packed layers."""
        return sum(x.stored_bits for x in self.layers) / sum(x.weights for x in self.layers)

    @property
    def bits_with_adapters(self) -> float:
        """The same, with the adapters counted at 16 bits a value, whatever the file has."""
        values = sum(layer.lora_values for layer in self.layers)
        return self.bits_per_weight + 16 * values / sum(x.weights for x in self.layers)


def is_quantised(folder: str | Path) -> bool:
    """Tell whether a folder holds a packed base and the adapter that belongs to it."""
    return (Path(folder) / BASE).is_dir() and (Path(folder) / ADAPTER).is_dir()


def disk_bytes(folder: str | Path) -> int:
    """Give the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def read_folder(folder: str | Path) -> StoredModel:
    """Describe a quantised folder, or a packed base alone, without loading any tensor.

    Raises:
        ValueError: the folder holds no model of packed layers, or its files contradict each other.
        SafetensorError: a file is damaged.
    """
    place = Path(folder)
    base, adapter = (place / BASE, place / ADAPTER) if is_quantised(place) else (place, None)
    config = _config(base)
    headers = _headers(base)
    lora = {} if adapter is None else _headers(adapter)
    return StoredModel(
        [_layer(base, name, grid, headers, lora) for name, grid in config.layers.items()],
        config.scheme,
        disk_bytes(base),
        0 if adapter is None else disk_bytes(adapter),
    )


def _config(base: Path) -> ApiQQuantizationConfig:
    path = base / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{base} has no config.json; give a folder that holds {BASE} and {ADAPTER}, or a model"
        )
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        settings = values.get("quantization_config") or {}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration of a model ({error})") from error
    if settings.get("quant_method") != METHOD or not settings.get("layers"):
        raise ValueError(f"{base} has no packed layers; give a model that was quantised by ApiQ")
    return ApiQQuantizationConfig(**settings)


@dataclass(frozen=True)
class _Tensor:
    """What a header says of a tensor."""

    shape: list[int]
    dtype: str


def _headers(folder: Path) -> dict[str, _Tensor]:
    """Give every tensor in the safetensors files of a folder."""
    found: dict[str, _Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                held = file.get_slice(name)
                found[name] = _Tensor(list(held.get_shape()), held.get_dtype())
    return found


def _layer(
    base: Path,
    name: str,
    grid: list[int],
    headers: Mapping[str, _Tensor],
    lora: Mapping[str, _Tensor],
) -> StoredLayer:
    stored_bits = 0
    for part in ("qweight", "qzeros", "scales"):
        tensor = headers.get(f"{name}.{part}")
        if tensor is None:
            raise ValueError(f"{base} has no {name}.{part}, though config.json has the layer")
        if tensor.dtype not in _ITEM_BITS or len(tensor.shape) != 2:
            raise ValueError(f"{name}.{part} is {tensor.dtype} of shape {tensor.shape}")
        stored_bits += math.prod(tensor.shape) * _ITEM_BITS[tensor.dtype]
    rows, outputs = headers[f"{name}.qweight"].shape
    inputs = rows * RUN // grid[0]
    groups = headers[f"{name}.scales"].shape[0]
    a = lora.get(f"{_LORA}{name}.lora_A.weight")
    return StoredLayer(
        name, inputs, outputs, grid[0], inputs // groups, stored_bits, a.shape[0] if a else 0
    )
