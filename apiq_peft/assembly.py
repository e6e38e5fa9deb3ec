"""The folders of a model that was quantised block by block: base and adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor

from apiq_peft.calibration.progress_files import appearing, read_part
from apiq_peft.config import ApiQConfig

# what belongs to a model beside its weights and its configuration
_BESIDE = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)


def write_base(model: Any, source: Path, folder: Path) -> None:
    """Write what a packed model has beside its weights: configurations, and a tokenizer if any."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for pattern in _BESIDE:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def write_adapter(model: Any, config: ApiQConfig, blocks: list[str], files: Path) -> None:
    """Write the folder `adapter` of a packed model as `PeftModel.save_pretrained` does.

    `model` is on the meta device; A and B are taken one by one from the files of the finished
    blocks, beside which the folder is made.
    """
    folder = files / "adapter"
    peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    peft_model.save_pretrained(str(folder), state_dict={}, save_embedding_layers=False)

    def read(key: str) -> Tensor:
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        block = next(block for block in blocks if name.startswith(block + "."))
        return read_part(files, block, name.removeprefix(block + ".")).to(torch.float32)

    shapes = {key: tensor.shape for key, tensor in sorted(state.items())}
    _write_floats(folder / "adapter_model.safetensors", shapes, read)


def _write_floats(
    path: Path, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file of float32 tensors, of which one at a time is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with appearing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == shape
            file.write(tensor.contiguous().numpy().tobytes())
