"""Quantise the weights of pretrained models with ApiQ, with and without 8-bit activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attention
import torch
from measure import rounded_loss
from peft import get_peft_model
from pretrain import FAMILIES, Text, batches, loss
from transfer import LINEARS

from apiq_peft import ApiQConfig, CalibrationError, preset, quantize
from recipes_peft.errors import explained

__all__ = ["STARTS", "measure"]

STARTS = ("rounded", "apiq")


def measure(
    given: Any, family: str, folder: Path, bits: int, start: str, text: Text, device: Any
) -> dict[str, float]:
    """Give the loss of a model of low bits, with activations in full precision and of 8 bits.

    `rounded` is rounding without data, beside a LoRA that is zero; `apiq` calibrates codes and LoRA
    on windows of the training text.
    """
    model = attention.restore(folder, FAMILIES[family].auto_class).to(device)
    config = ApiQConfig(
        bits=bits,
        group_size=given.bits_group_size,
        target_modules=LINEARS[family],
        r=given.rank,
        lora_alpha=given.alpha,
    )
    with explained(ValueError, CalibrationError, before=f"{start}, {bits} bits: "):
        if start == "rounded":
            quantized: Any = get_peft_model(model, config)
        else:
            quantized = quantize(model, samples(given, family, text), config, preset(given.preset))[
                0
            ]
    return {
        "a32": loss(quantized, batches(given, family, text, given.length)),
        "a8": rounded_loss(given, family, text, quantized, rounded_weights=False),
    }


def samples(given: Any, family: str, text: Text) -> torch.Tensor:
    """Give windows of the training text to calibrate on, masked as in pretraining if they were."""
    count = given.calibration_samples
    rows = batches(given, family, text, given.length, count, "train")
    return torch.cat([batch["input_ids"] for batch in rows])[:count]
