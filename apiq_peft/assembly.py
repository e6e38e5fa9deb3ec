"""The folders of a model that was quantised block by block: base and adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from apiq_peft.calibration.progress_files import appearing, read_part
from apiq_peft.config import ApiQConfig

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # of safetensors
_HEADS = ("classifier", "score", "qa_outputs")  # which PEFT saves by the task_type
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


def check_adapter(config: ApiQConfig) -> None:
    """Refuse what `write_adapter` has no values for.

    Raises:
        ValueError: an option of LoRA that needs the whole model.
    """
    for name in ("trainable_token_indices", "layer_replication"):
        if getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r}, which is not written block by block; leave"
                " it out, or load the model and give it to apiq_peft.quantize"
            )


def in_adapter(config: ApiQConfig, name: str) -> bool:
    """Tell whether the files of an adapter hold a copy of a tensor of the model."""
    saved = (*(config.modules_to_save or ()), *_HEADS)
    modules = [name[:end] for end, letter in enumerate(name) if letter == "."]
    return any(m.endswith(saved) for m in modules) or (config.bias != "none" and "bias" in name)


def write_adapter(
    model: Any, config: ApiQConfig, blocks: list[str], files: Path, own: Mapping[str, Tensor]
) -> None:
    """Write the folder `adapter` of a packed model as `PeftModel.save_pretrained` does.

    `model` is on the meta device; A and B are taken one by one from the files of the finished
    blocks, beside which the folder is made. `own` has the tensors of the model that an adapter
    copies: modules to save, and biases if they are trained.
    """
    folder = files / "adapter"
    peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    nothing = {
        f"{name}.modules_to_save.default.{key}": torch.empty(0)
        for name, module in peft_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key in module.modules_to_save["default"].state_dict()
    }
    peft_model.save_pretrained(str(folder), state_dict=nothing, save_embedding_layers=False)

    def read(key: str) -> Tensor:
        name = key.removeprefix("base_model.model.")
        if name.endswith("lora_B.bias"):
            return torch.zeros(state[key].shape)
        if not name.endswith(("lora_A.weight", "lora_B.weight")):
            return own[name.replace(".base_layer", "")]
        name = name.removesuffix(".weight")
        block = next(block for block in blocks if name.startswith(block + "."))
        return read_part(files, block, name.removeprefix(block + ".")).to(torch.float32)

    _write(folder / "adapter_model.safetensors", dict(sorted(state.items())), read)


def _write(path: Path, like: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a safetensors file of tensors like those given, of which one at a time is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with appearing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, wanted in like.items():
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
