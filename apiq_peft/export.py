"""Writing an ApiQ model so that others read it: plain PEFT, and every reader of GPTQ files."""

from __future__ import annotations

import copy
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from apiq_peft.checkpoint import dequantize, grids_of, packed_layers, unmark_quantized
from apiq_peft.config import ApiQConfig
from apiq_peft.gptq import VERSIONS, scheme_of, shift_zeros
from apiq_peft.packed import PackedLinear

BASE, ADAPTER = "base", "adapter"  # the folders of a model and its LoRA


def export_plain(
    model: Any,
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
    tokenizer: Any = None,
    adapter_name: str = "default",
) -> Path:
    """Write the base in full precision and, of a model with ApiQ's adapter, a plain LoRA for it.

    They are `folder`/base and `folder`/adapter, for transformers and PEFT without this library.
    `model` stays as it is.

    Raises:
        ValueError: the folder exists, there is no such adapter, or `dtype` cannot hold a value.
    """

    def convert(bare: Any) -> None:
        dequantize(bare, dtype)

    return _export(model, Path(folder), dtype, tokenizer, adapter_name, convert)


def export_gptq(
    model: Any,
    folder: str | Path,
    checkpoint_format: str = "gptq_v2",
    dtype: torch.dtype = torch.float16,
    tokenizer: Any = None,
    adapter_name: str = "default",
) -> Path:
    """Write the base as a GPTQ checkpoint and, of a model with ApiQ's adapter, a plain LoRA for it.

    They are `folder`/base and `folder`/adapter. `checkpoint_format` "gptq", which more programs
    read, is for the scheme "gptq_symmetric" only. Layers that differ in bits or groups are written
    as exceptions (`dynamic`), which GPTQModel reads and transformers refuses. `dtype` is that of
    what is not packed; readers take scales, too, to the dtype of the model, and only float16 and
    float32 keep them. `model` stays as it is.

    Raises:
        ValueError: the folder exists, there is no packed layer or no such adapter, the format
            cannot hold the zero points, or `dtype` cannot hold a value.
    """
    layers = packed_layers(model)
    if not layers:
        raise ValueError("the model has no packed layers; quantise it first")
    if checkpoint_format not in VERSIONS:
        raise ValueError(
            f"checkpoint_format is {checkpoint_format!r}; choose from {', '.join(VERSIONS)}"
        )
    symmetric = scheme_of((m.qzeros, m.bits) for m in layers.values()) == "gptq_symmetric"
    if not symmetric and VERSIONS[checkpoint_format] == 1:
        raise ValueError(
            f"checkpoint_format {checkpoint_format!r} is for the scheme 'gptq_symmetric'; readers"
            " of it get other zero points wrong, so give 'gptq_v2'"
        )

    def convert(bare: Any) -> None:
        settings = _settings(bare, symmetric, checkpoint_format)
        for name, layer in packed_layers(bare).items():
            parent, _, child = name.rpartition(".")
            stored = _Stored(layer, VERSIONS[checkpoint_format])
            setattr(bare.get_submodule(parent), child, stored)
        unmark_quantized(bare)
        bare.config.quantization_config = settings

    return _export(model, Path(folder), dtype, tokenizer, adapter_name, convert)


def export_lora(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", base_model: str = ""
) -> Path:
    """Write one adapter of `model` as an ordinary LoRA.

    It belongs on the dequantised base (`apiq_peft.dequantize`, then `save_pretrained`) or on
    another copy of the same codes, where `PeftModel.from_pretrained` needs
    `config=ApiQConfig.of(LoraConfig.from_pretrained(folder))`; on the original full-precision model
    it would correct an error that is not there. `base_model` is the name to write for the base.

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
    transposed = any(layer.conv1d for layer in packed_layers(model).values())
    values |= {"peft_type": "LORA", "inference_mode": True, "fan_in_fan_out": transposed}
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


def _export(
    model: Any,
    target: Path,
    dtype: torch.dtype,
    tokenizer: Any,
    adapter_name: str,
    convert: Callable[[Any], None],
) -> Path:
    def save(part: Path) -> None:
        bare = _copy_of(model)
        if isinstance(model, PeftModel):
            base = str((target / BASE).resolve())
            export_lora(model, part / ADAPTER, adapter_name, base_model=base)
            bare = bare.unload()
        convert(bare.to(dtype))
        for name, tensor in bare.named_parameters():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{name} has values that {dtype} cannot hold; choose bfloat16 or float32"
                )
        bare.save_pretrained(part / BASE)
        if tokenizer is not None:
            tokenizer.save_pretrained(part / BASE)

    save_whole(target, save)
    return target


def _copy_of(model: nn.Module) -> Any:
    """Copy the modules of a model but not its tensors, so that the copy can be taken apart."""
    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, shared | {id(b): b for b in model.buffers()})


class _Stored(nn.Module):
    """The tensors of a packed layer as a GPTQ file has them."""

    def __init__(self, layer: PackedLinear, format_version: int) -> None:
        super().__init__()
        words = layer.qzeros.detach()
        groups = torch.arange(layer.in_features, dtype=torch.int32) // layer.group_size
        self.register_buffer("qweight", layer.qweight.detach())
        self.register_buffer(
            "qzeros", words if format_version == 2 else shift_zeros(words, layer.bits, -1)
        )
        self.register_buffer("scales", layer.scales)
        self.register_buffer("g_idx", groups)
        self.register_parameter("bias", layer.bias)


def _settings(model: Any, symmetric: bool, checkpoint_format: str) -> dict[str, Any]:
    """Say in GPTQ's words which layers of `model` are packed, and how."""
    layers = packed_layers(model)
    grids = grids_of(layers)
    (bits, group_size), _ = Counter(grids.values()).most_common(1)[0]
    head = model.get_output_embeddings()  # which readers leave alone
    left_out = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, (Conv1D, nn.Conv2d))
        if module is not head
    ]
    dynamic: dict[str, Mapping[str, Any]] = {f"-:^{re.escape(name)}$": {} for name in left_out}
    dynamic |= {
        f"+:^{re.escape(name)}$": {"bits": grid[0], "group_size": grid[1]}
        for name, grid in grids.items()
        if grid != (bits, group_size)
    }
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in layers),
        "meta": {"quantizer": [f"apiq_peft:{version('road-apiq-peft')}"]},
        "dynamic": dynamic or None,  # GPTQModel's; the rest is transformers'
        "block_name_to_quantize": _common_parent(grids),
        "modules_in_block_to_quantize": [list(grids)] if left_out else None,
    }


def _common_parent(names: Mapping[str, Any]) -> str:
    """Give the longest name that all modules of these names are inside of, "" for the model."""
    parents = ["/" + name.rpartition(".")[0].replace(".", "/") for name in names]
    return posixpath.commonpath(parents).strip("/").replace("/", ".")
