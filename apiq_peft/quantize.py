"""Quantising a model and finding its LoRA together, in one call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from apiq_peft.calibration import BlockReport, Calibration, calibrate
from apiq_peft.config import ApiQConfig

Samples = Tensor | Sequence[Mapping[str, Tensor]]


def quantize(
    model: Any,
    samples: Samples,
    config: ApiQConfig,
    calibration: Calibration | None = None,
    *,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> tuple[PeftModel, list[BlockReport]]:
    """Quantise `model` in place to the bits of `config` and initialise a LoRA that makes up for it.

    Gives the model with the adapter "default", ready to be trained, and a report of every block.
    With `folder`, finished blocks are kept there; a call that was interrupted is repeated with the
    same arguments and goes on from the last one, with the same result to the bit.

    Shapes:
        samples: token ids (samples, length), or batches of what the model takes, all tokens real.
    Raises:
        ValueError: samples or layers that do not fit; the model is unchanged then.
        CalibrationError: a loss is not finite.
    Source:
        ApiQ (arXiv:2402.05147); by default block-wise, as in the published script.
    """
    settings = calibration or Calibration()
    config = copy.deepcopy(config)
    batches = _batches(model, samples, settings.batch_size)
    result = calibrate(
        model, batches, config, settings, Path(folder) if folder else None, show_progress
    )
    if config.target_modules == "all-linear":
        config.target_modules = sorted(result.solutions)
    peft_model = get_peft_model(model, config)
    tuner: Any = peft_model.base_model
    layers = dict(tuner.model.named_modules())
    with torch.no_grad():
        for name, solution in result.solutions.items():
            layer: Any = layers[name]
            layer.lora_A["default"].weight.copy_(solution.lora_A)
            layer.lora_B["default"].weight.copy_(solution.lora_B)
    return peft_model, result.reports


def _batches(model: Any, samples: Samples, size: int) -> list[Mapping[str, Tensor]]:
    if not isinstance(samples, Tensor):
        if not samples:
            raise ValueError("there are no samples; give at least one batch")
        return list(samples)
    if samples.dim() != 2 or samples.is_floating_point() or not samples.numel():
        raise ValueError(
            f"samples have shape {tuple(samples.shape)} and dtype {samples.dtype}; give token ids"
            " (samples, length), or batches as dictionaries of tensors"
        )
    names = ["input_ids"]
    if getattr(model.config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    return [dict.fromkeys(names, part) for part in samples.split(size)]
