"""Batches whose rows take different adapters: the models, adapters and inputs of their tests."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor

from road_peft import RoadConfig
from tests.road_peft._models import (
    VOCABULARY,
    tiny,
    with_adapters,
)

BASE = "__base__"
# adapters that may meet in a batch, by their fields
FIELDS: dict[str, dict[str, Any]] = {
    "a": {"group_size": 4},
    "b": {"group_size": 4, "variant": "road_2"},
    "c": {"group_size": 8, "variant": "road_4"},
    "d": {"group_size": 2, "lora_rank": 2},
    "e": {"group_size": 4, "variant": "road_4", "lora_rank": 3, "lora_alpha": 5},
    "f": {"group_size": 6, "remainder": "identity"},
}


def configs(*names: str, **common: Any) -> dict[str, RoadConfig]:
    return {n: RoadConfig(**{**FIELDS[n], **common}) for n in names}


LENGTH = 5
NAMES = ["c", BASE, "e", "c"]
DECODERS = ("llama", "opt", "gpt2")
SEQ2SEQ = ("t5", "bart")


def mixed_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> peft.PeftModel:
    base = tiny(name, dtype=dtype, **settings)
    return with_adapters(base, configs("c", "e"))


def tokens_for_rows(rows: int = len(NAMES), length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def inputs_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": tokens}
    if model.get_base_model().config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :3].contiguous()
    return inputs


def only(model: Any, name: str, function: Any) -> Any:
    """Call with one adapter, or none, for the whole model."""
    if name == BASE:
        with model.disable_adapter():
            return function()
    model.set_adapter(name)
    return function()
