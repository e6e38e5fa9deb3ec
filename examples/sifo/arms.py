"""The arms: which chains are trained on, with which tuner, on which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from samples import SifoSample

from apiq_peft import ApiQConfig, preset, quantize
from recipes_peft import models
from road_peft import RoadConfig

__all__ = ["ARMS", "Arm", "add_apiq", "add_lora", "add_road", "mismatched"]


@dataclass(frozen=True)
class Arm:
    """What an arm trains.

    `tuner` is "" for the base as it is. `bits` is that of the weights, None in full precision.
    With `mismatched` every chain has the answers of another: the form without the content.
    """

    tuner: str
    bits: int | None = None
    mismatched: bool = False


ARMS: Mapping[str, Arm] = {
    "base": Arm(""),
    "tasks": Arm("road"),  # an adapter for each task, all four in one batch
    "joint": Arm("road"),
    "mismatched": Arm("road", mismatched=True),
    "lora": Arm("lora"),
    "apiq-4": Arm("apiq", 4),
    "apiq-3": Arm("apiq", 3),
    "apiq-2": Arm("apiq", 2),
}


def add_road(model: Any, given: Any, name: str = "default") -> Any:
    """Put a RoAd adapter of this name into a model."""
    settings = RoadConfig(
        variant=given.variant,
        group_size=given.group_size,
        target_modules=models.target_modules(given.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings, adapter_name=name)


def add_lora(model: Any, given: Any) -> Any:
    """Put a LoRA of the rank of ApiQ's beside the layers that ApiQ adapts."""
    return get_peft_model(model, LoraConfig(target_modules="all-linear", **_low_rank(given)))


def add_apiq(model: Any, given: Any, bits: int, samples: Any, folder: Path | None = None) -> Any:
    """Quantise a model, on samples of chains, with the LoRA that makes up for it.

    `folder` keeps finished blocks of a calibration that may be interrupted.
    """
    settings = ApiQConfig(bits=bits, group_size=given.bits_group_size, **_low_rank(given))
    how = preset(given.preset)
    if how.epochs:
        how = preset(given.preset, epochs=given.calibration_epochs)
    return quantize(model, samples, settings, how, folder=folder)[0]


def _low_rank(given: Any) -> dict[str, Any]:
    return {"r": given.rank, "lora_alpha": given.alpha, "task_type": "CAUSAL_LM"}


def mismatched(samples: Sequence[SifoSample]) -> list[SifoSample]:
    """Give each chain the answers of the next of its task and length; lone ones are left out."""
    groups: dict[tuple[str, int], list[SifoSample]] = {}
    for sample in samples:
        groups.setdefault((sample.task, len(sample.steps)), []).append(sample)
    return [
        replace(sample, golds=group[(i + 1) % len(group)].golds)
        for group in groups.values()
        if len(group) > 1
        for i, sample in enumerate(group)
    ]
