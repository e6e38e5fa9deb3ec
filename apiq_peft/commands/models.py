"""Models and texts that commands are given by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from apiq_peft.export import ADAPTER, BASE
from apiq_peft.folder import is_quantised

_WINDOW = 2048  # as in the papers
_WANTED = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")


def folder_of(name: str) -> Path:
    """Give the folder of a model, or of its copy if it is the id of one on the hub.

    Raises:
        ValueError: there is no such model.
    """
    place = Path(name)
    if not place.exists():
        try:
            place = Path(snapshot_download(name, allow_patterns=list(_WANTED)))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} is no folder, and no model of the hub that can be reached"
                f" ({type(error).__name__})"
            ) from error
    if not is_quantised(place) and not (place / "config.json").is_file():
        raise ValueError(f"{name} has no config.json; give the folder of a model")
    return place


def window_of(folder: Path) -> int:
    """Give how many tokens a sample of a model has: 2048, or all its positions if it has fewer."""
    config = AutoConfig.from_pretrained(folder / BASE if is_quantised(folder) else folder)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(_WINDOW, positions or _WINDOW)


def load(folder: Path, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Load a model, with its adapter if the folder is a quantised one."""
    quantised = is_quantised(folder)
    base = AutoModelForCausalLM.from_pretrained(
        folder / BASE if quantised else folder, dtype=dtype or "auto", use_safetensors=True
    )
    if quantised:
        base = PeftModel.from_pretrained(base, str(folder / ADAPTER))
    return base.to(device)


def tokenizer_of(folder: Path) -> Any:
    """Load the tokenizer of a model."""
    return AutoTokenizer.from_pretrained(folder / BASE if is_quantised(folder) else folder)
