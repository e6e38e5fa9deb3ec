"""Load a causal language model by name, folder or hub id; GGUF files are converted once."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from recipes_peft import tiny
from recipes_peft.assets import ASSETS, cache_dir, fetch, once
from recipes_peft.errors import UserError, explained

__all__ = ["NAMES", "linear_layers", "load", "locate", "target_modules"]

# What a model goes by here; everything else is a folder or a hub id.
NAMES = (*(name for name, asset in ASSETS.items() if asset.file.endswith(".gguf")), "tiny")


def locate(model: str) -> str:
    """Give the folder of a model that has a name here, making it the first time, else `model`."""
    if model == "tiny":
        return str(once(cache_dir() / "tiny-model", tiny.save))
    if model in NAMES:
        file = Path(ASSETS[model].file)
        folder = cache_dir() / file.stem
        return str(folder if folder.exists() else once(folder, lambda to: _convert(model, to)))
    return model


def load(model: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a model, in evaluation mode, and its tokenizer, which has a token for padding.

    Raises:
        UserError: there is no such model, or what is there is not a causal language model.
    """
    logging.disable_progress_bar()
    place = locate(model)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}; choose float32, bfloat16 or float16")
    hint = (
        f"; give a folder with a causal language model in transformers' format, the id of one on"
        f" the hub, or one of {', '.join(NAMES)}"
    )
    with explained(
        OSError,
        ValueError,
        SafetensorError,
        before=f"cannot load the model {model!r}: ",
        after=hint,
    ):
        tokenizer = AutoTokenizer.from_pretrained(place)
        loaded = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {model!r} has no end-of-sequence token; set one in it")
    return loaded.eval(), tokenizer


def linear_layers(model: torch.nn.Module) -> str:
    """List a model's linear layers by the last part of their names, with their outputs."""
    found = {
        f"{name.rpartition('.')[2]} ({module.out_features})"
        for name, module in model.named_modules()
        if hasattr(module, "out_features")
    }
    return ", ".join(sorted(found))


def target_modules(words: list[str] | None) -> list[str] | str | None:
    """Give words of a command line as PEFT's target modules: names, or one expression as text.

    A single word with other signs than a name has is an expression, or `all-linear`.
    """
    if words and len(words) == 1 and not re.fullmatch(r"[\w.]+", words[0]):
        return words[0]
    return words


def _convert(model: str, folder: Path) -> None:
    file = fetch(model)
    if find_spec("gguf") is None:
        raise UserError(f"{file.name} needs the package gguf; run: pip install gguf==0.19.0")
    print(f"converting {file.name}, once")
    options = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    with _quiet():
        converted = AutoModelForCausalLM.from_pretrained(
            file.parent,
            dtype=torch.float32,
            # Without this transformers calls the model quantised and refuses to save or train it.
            quantization_config=GgufConfig(dequantize=True),
            **options,
        )
    converted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _quiet:  # noqa: N801 - used as a word in a with statement
    """Silence transformers' notes about GGUF metadata that has no counterpart."""

    def __enter__(self) -> None:
        self.before = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        logging.set_verbosity(self.before)
