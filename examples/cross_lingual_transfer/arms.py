"""The arms: what is trained, under which condition; several adapters may share one base.

An arm is written as its tuner and its condition, `road+shuffled`; without one it is plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parallel_pairs import Row
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from prepare import CONDITIONS
from safetensors.torch import load_file, save_file
from torch import nn

from apiq_peft import ApiQConfig, preset, quantize
from apiq_peft.export import save_whole
from recipes_peft.errors import UserError
from road_peft import RoadConfig

__all__ = ["TUNERS", "Study", "build", "keep", "parse", "restore", "studies", "trained_parameters"]


@dataclass(frozen=True)
class Study:
    """What is trained on one base: a tuner, an adapter for each condition, a seed."""

    tuner: str
    conditions: tuple[str, ...]
    seed: int

    @property
    def arms(self) -> list[str]:
        return [arm_name(self.tuner, condition) for condition in self.conditions]

    @property
    def shared(self) -> bool:
        """Say whether the conditions are adapters of one model, by their names."""
        return TUNERS[self.tuner].shared


@dataclass(frozen=True)
class Tuner:
    """How a model gets what is trained, and at which of the settings' rates.

    `add` takes (model, names of adapters, settings, task, samples, folder for progress).
    """

    add: Callable[..., Any]
    rate: str
    shared: bool = False  # one base has an adapter for each condition


def linears(model: nn.Module, given: Any) -> list[str]:
    """Name the linear layers of the blocks: no embedding, no pooler, no head.

    Raises:
        UserError: there is none, or none of those that the settings name.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(part.isdigit() for part in name.split("."))
        and (
            given.target_modules is None
            or any(f".{name}".endswith(f".{end}") for end in given.target_modules)
        )
    ]
    if not found:
        wanted = ", ".join(given.target_modules or ["any linear layer"])
        raise UserError(f"no block of the model has {wanted}; change --target-modules")
    return found


def heads(model: nn.Module, task: Any) -> list[str]:
    """Name the linear layers of the head: a mixed batch needs them one by one."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and set(name.split(".")) & set(task.heads)
    ]


def _adapters(model: Any, names: Sequence[str], config: Callable[[], Any]) -> Any:
    adapted: Any = get_peft_model(model, config(), adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config())
    return adapted


def road(model: Any, names: Sequence[str], given: Any, task: Any, *_: Any) -> Any:
    """Add a RoAd for each name, with a head of its own; it starts as the identity."""
    targets, own = linears(model, given), heads(model, task)
    return _adapters(
        model,
        names,
        lambda: RoadConfig(
            variant=given.variant,
            group_size=given.group_size,
            target_modules=list(targets),
            modules_to_save=list(own),
        ),
    )


def lora(model: Any, names: Sequence[str], given: Any, task: Any, *_: Any) -> Any:
    """Add a LoRA for each name, with a head of its own."""
    targets, own = linears(model, given), heads(model, task)
    return _adapters(
        model,
        names,
        lambda: LoraConfig(
            r=given.rank,
            lora_alpha=given.alpha,
            target_modules=list(targets),
            modules_to_save=list(own),
        ),
    )


def full(model: Any, *_: Any) -> Any:
    """Train every weight, as the paper does."""
    return model.requires_grad_(True)


def apiq(bits: int) -> Callable[..., Any]:
    def add(
        model: Any, names: Sequence[str], given: Any, task: Any, samples: Any, folder: Path
    ) -> Any:
        """Quantise the model with ApiQ on training text, and train the LoRA that it gives."""
        config = ApiQConfig(
            bits=bits,
            group_size=given.bits_group_size,
            r=given.rank,
            lora_alpha=given.alpha,
            target_modules=linears(model, given),
            modules_to_save=heads(model, task),
        )
        # The last pass of a preset learns from predicted tokens, which an encoder does not give.
        how = preset(given.preset, final_epochs=0)
        return quantize(model, samples(), config, how, folder=folder, show_progress=False)[0]

    return add


TUNERS = {
    "road": Tuner(road, "road_rate", shared=True),
    "lora": Tuner(lora, "lora_rate", shared=True),
    "full": Tuner(full, "full_rate"),
    "apiq-4": Tuner(apiq(4), "lora_rate"),
    "apiq-3": Tuner(apiq(3), "lora_rate"),
    "apiq-2": Tuner(apiq(2), "lora_rate"),
}


def arm_name(tuner: str, condition: str) -> str:
    return tuner if condition == "plain" else f"{tuner}+{condition}"


def parse(arm: str) -> tuple[str, str]:
    """Give the tuner and the condition of an arm.

    Raises:
        UserError: there are none of these names.
    """
    tuner, plus, condition = arm.partition("+")
    if tuner not in TUNERS or (plus and condition not in CONDITIONS):
        raise UserError(
            f"there is no arm {arm!r}; give one of {', '.join(TUNERS)}, then perhaps + and one of"
            f" {', '.join(CONDITIONS)}"
        )
    return tuner, condition or "plain"


def studies(arms: Sequence[str], once: Sequence[str], seeds: int) -> list[Study]:
    """Put together what shares a base: conditions of a tuner and seed, where it trains adapters."""
    found: list[Study] = []
    for seed in range(seeds):
        chosen: dict[str, list[str]] = {}
        for tuner, condition in map(parse, [*arms, *(once if seed == 0 else [])]):
            if condition not in chosen.setdefault(tuner, []):
                chosen[tuner].append(condition)
        for tuner, conditions in chosen.items():
            if TUNERS[tuner].shared:
                found.append(Study(tuner, tuple(conditions), seed))
            else:
                found += [Study(tuner, (condition,), seed) for condition in conditions]
    return found


def build(
    study: Study, given: Any, task: Any, rows: Sequence[Row], device: Any, folder: Path
) -> Any:
    """Load the base and add what is trained; the head is random from the seed."""

    def samples() -> list[dict[str, torch.Tensor]]:
        encoded = task.rows(rows[: given.calibration_rows])[: given.calibration_rows]
        parts = [encoded[i : i + 8] for i in range(0, len(encoded), 8)]
        names = ("labels", "start_positions", "end_positions")
        batches = [task.join(part) for part in parts]
        return [{k: v.to(device) for k, v in batch.items() if k not in names} for batch in batches]

    model = task.load(study.seed)[0].to(device)
    tuner = TUNERS[study.tuner]
    return tuner.add(model, study.conditions, given, task, samples, folder).to(device)


def trained_parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def keep(model: Any, study: Study, condition: str, folder: Path) -> None:
    """Write an adapter as a folder that PEFT reads, or a whole model; it appears whole or never."""

    def write(part: Path) -> None:
        if not study.shared:
            model.save_pretrained(part)
            return
        model.peft_config[condition].save_pretrained(part)
        state = get_peft_model_state_dict(model, adapter_name=condition)
        whole = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items()}
        save_file(whole, part / "adapter_model.safetensors", {"format": "pt"})

    save_whole(folder, write)


def restore(model: Any, study: Study, condition: str, folder: Path) -> None:
    """Put what `keep` wrote into a model as `build` gives it."""
    device = str(next(model.parameters()).device)
    if study.tuner == "full":
        model.load_state_dict(load_file(folder / "model.safetensors", device=device))
        return
    name = condition if study.shared else "default"
    state = load_file(folder / "adapter_model.safetensors", device=device)
    set_peft_model_state_dict(model, state, adapter_name=name)
