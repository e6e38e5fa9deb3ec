"""The arms that are compared: how each is added to a model, and what it then trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from recipes_peft.errors import UserError
from road_peft import RoadConfig

__all__ = ["ARMS", "Arm", "Count", "blocks", "count"]

# A classifier's own layers, which every arm trains and no arm's share counts. BERT's pooler is the
# first layer of its head, as RoBERTa's `classifier.dense` is; most of its training it has not seen.
HEADS = ("classifier", "score", "pooler")

# LoRA's layers in the comparisons of the paper: GLUE has those of RED and LoReFT, the language
# models have those of LLM-Adapters.
LORA_TARGETS = {
    "SEQ_CLS": ("query", "value"),
    "CAUSAL_LM": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Arm:
    """How to add the arm: (model, its task type, group size, LoRA's rank) to what is trained."""

    add: Callable[[Any, str, int, int], Any]
    rate: float  # its learning rate, as a multiple of RoAd's
    own_weights: bool = False  # it trains weights of the model, so these are held in float32


@dataclass(frozen=True)
class Count:
    """Parameters: those trained, without the head; the head's; and all of the model's."""

    trained: int
    head: int
    model: int

    @property
    def share(self) -> float:
        """Give the percentage that is trained, the head left out on both sides."""
        return 100 * self.trained / (self.model - self.head)


def blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """Give the linear layers of the blocks by name: no embedding, no pooler, no head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    }


def base(model: Any, task_type: str, group_size: int, rank: int) -> Any:
    """Train a classifier's head alone, and nothing of a model that has none."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(of_head(name))
    return model


def road(variant: str) -> Callable[[Any, str, int, int], Any]:
    def add(model: Any, task_type: str, group_size: int, rank: int) -> Any:
        return get_peft_model(
            model,
            RoadConfig(
                variant=variant,
                group_size=group_size,
                target_modules=list(blocks(model)),
                task_type=task_type,
                modules_to_save=heads(model),
            ),
        )

    return add


def lora(model: Any, task_type: str, group_size: int, rank: int) -> Any:
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(LORA_TARGETS[task_type]),
            task_type=task_type,
            modules_to_save=heads(model),
        ),
    )


def ia3(model: Any, task_type: str, group_size: int, rank: int) -> Any:
    """Scale keys, values and what enters the last layer of a block; all outputs of a causal model.

    With these the counts are those that the paper prints: 0.04 % of RoBERTa, 0.02 % of LLaMA.
    """
    targets, inner = list(blocks(model)), []
    if task_type == "SEQ_CLS":
        inner = [n for n in targets if n.endswith(".output.dense") and ".attention." not in n]
        targets = [n for n in targets if n.endswith((".key", ".value"))] + inner
    return get_peft_model(
        model,
        IA3Config(
            target_modules=targets,
            feedforward_modules=inner,
            task_type=task_type,
            modules_to_save=heads(model),
        ),
    )


def bitfit(model: Any, task_type: str, group_size: int, rank: int) -> Any:
    """Train the biases, those of norms included."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias") or of_head(name))
    if count(model).trained == 0:
        raise UserError("bitfit trains biases, and this model has none; leave it out of --arms")
    return model


def full(model: Any, task_type: str, group_size: int, rank: int) -> Any:
    return model.requires_grad_(True)


ARMS = {
    "base": Arm(base, 1.0),
    "road_1": Arm(road("road_1"), 1.0),
    "road_2": Arm(road("road_2"), 1.0),
    "road_4": Arm(road("road_4"), 1.0),
    "lora": Arm(lora, 0.1),
    "ia3": Arm(ia3, 1.0),
    "bitfit": Arm(bitfit, 0.3, own_weights=True),
    "full": Arm(full, 0.01, own_weights=True),
}


def heads(model: nn.Module) -> list[str]:
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in HEADS if name in last]


def of_head(name: str) -> bool:
    return any(part in HEADS for part in name.split("."))


def count(model: nn.Module) -> Count:
    """Count what is trained and what is not; a head that PEFT copied counts once."""
    trained = head = whole = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if parameter.requires_grad and of_head(name):
            head += size
        elif parameter.requires_grad:
            trained += size
        added = ".ia3_" in name or ".lora_" in name or ".road_" in name
        if not added and ".original_module." not in name:
            whole += size
    return Count(trained, head, whole)
