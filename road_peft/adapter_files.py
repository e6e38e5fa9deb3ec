"""Reading the files of a saved adapter: safetensors and JSON, nothing else."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from road_peft.config import RoadConfig

_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key in the file


def load_adapter_files(path: str | Path) -> tuple[RoadConfig, dict[str, Tensor]]:
    """Read an adapter's configuration and tensors from a folder or a hub repository.

    Raises:
        ValueError: the folder holds no RoAd adapter, or its tensors are not in safetensors format.
    """
    folder = Path(path)
    try:
        config = RoadConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no readable adapter_config.json; give the folder that"
            f" save_pretrained wrote, or a hub repository ({error})"
        ) from error
    if not isinstance(config, RoadConfig):
        raise ValueError(f"{path} holds a {config.peft_type} adapter; a ROAD adapter is needed")
    try:
        file = folder / _FILE if folder.is_dir() else Path(hf_hub_download(str(path), _FILE))
        return config, load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} holds no readable {_FILE}; only the safetensors format is loaded ({error})"
        ) from error
