"""Training settings that RoAd needs: no weight decay on its parameters, the paper's rates."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from road_peft.interventions import Site
from road_peft.layer import RoadLayer

_NOT_DECAYED = ("road_theta", "road_alpha")
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def road_parameter_groups(
    model: nn.Module, *, weight_decay: float = 0.0, **options: Any
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` into groups for an optimizer.

    `weight_decay` applies to everything but the angles and scales of RoAd: decay pulls a scale
    towards 0, while the value that changes nothing is 1. `options` (`lr`, ...) go to both groups.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    fixed = {id(p) for p in _undecayed(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter; add an adapter before this call")
    groups = (
        {"params": [p for p in trainable if id(p) in fixed], "weight_decay": 0.0},
        {"params": [p for p in trainable if id(p) not in fixed], "weight_decay": weight_decay},
    )
    return [{**group, **options} for group in groups if group["params"]]


@dataclass(frozen=True)
class Preset:
    """Training settings of an experiment of the paper."""

    learning_rate: float
    epochs: int
    batch_size: int

    def training_arguments(self) -> dict[str, Any]:
        """Give the keyword arguments for `transformers.TrainingArguments`."""
        return {
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "weight_decay": 0.0,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,  # a share of all steps, since it is below 1
            "optim": "adamw_torch",
        }


# RoAd (arXiv:2409.00119), section 4 and appendix C: AdamW, no weight decay, linear schedule with a
# tenth of the steps as warmup, all linear layers. "small" tasks are RTE, MRPC, STS-B and CoLA.
PRESETS = {
    "glue_base_small": Preset(3e-3, 20, 32),
    "glue_base_large": Preset(1e-3, 10, 16),
    "commonsense": Preset(3e-3, 6, 32),
    "math": Preset(3e-3, 12, 32),
    "composition": Preset(5e-3, 5, 8),
}


def warn_of_decay(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Warn once, at an optimizer's first step, if it decays the scales of a RoAd layer."""
    if optimizer in _seen:
        return
    _seen.add(optimizer)
    decayed = {
        id(p)
        for group in optimizer.param_groups
        if group.get("weight_decay")
        for p in group["params"]
    }
    if decayed and any(id(p) in decayed for p in _scales()):
        warnings.warn(
            "this optimizer applies weight decay to road_alpha, or alpha of an intervention, which"
            " pulls the scales towards 0 instead of 1; set weight_decay=0 or use"
            " road_peft.road_parameter_groups",
            stacklevel=3,
        )


def _scales() -> Iterator[nn.Parameter]:
    for layer in list(RoadLayer.instances):
        yield from layer.road_alpha.values()
    for site in list(Site.instances):
        yield from site.alpha


def _undecayed(model: nn.Module) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, RoadLayer):
            found += [p for name in _NOT_DECAYED for p in getattr(module, name).values()]
        elif isinstance(module, Site):
            found += module.parameters()
    return found


def watch_optimizers() -> Any:
    """Call `warn_of_decay` before every optimizer step; `.remove()` of the result ends it."""
    return register_optimizer_step_pre_hook(warn_of_decay)
