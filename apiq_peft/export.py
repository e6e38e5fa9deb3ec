"""Writing an ApiQ adapter so that plain PEFT reads it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from apiq_peft.config import ApiQConfig


def export_lora(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", base_model: str = ""
) -> Path:
    """Write one adapter of `model` as an ordinary LoRA.

    It belongs on the dequantised base (`apiq_peft.dequantize`, then `save_pretrained`) or on
    another copy of the same codes; on the original full-precision model it would correct an error
    that is not there. `base_model` is the name to write for the base.

    Raises:
        ValueError: there is no such adapter, or it is not ApiQ's, or the folder exists.
    """
    target = Path(folder)
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, ApiQConfig):
        raise ValueError(
            f"adapter {adapter_name!r} is no ApiQ adapter of this model; it has"
            f" {', '.join(model.peft_config)}"
        )
    own = {f.name for f in fields(ApiQConfig)} - {f.name for f in fields(LoraConfig)}
    values: dict[str, Any] = {k: v for k, v in config.to_dict().items() if k not in own}
    values |= {"peft_type": "LORA", "inference_mode": True}
    if base_model:
        values["base_model_name_or_path"] = base_model
    for name, value in values.items():
        if isinstance(value, set):
            values[name] = sorted(value)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)

    def save(part: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, part / "adapter_model.safetensors", {"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True))

    save_whole(target, save)
    return target


def save_whole(folder: Path, save: Callable[[Path], None]) -> None:
    """Make a folder that appears when `save` has filled it, or not at all.

    Raises:
        ValueError: the folder exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".part", dir=folder.parent))
    try:
        save(part)
        part.chmod(0o755)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
