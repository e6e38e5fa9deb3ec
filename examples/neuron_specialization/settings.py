"""The settings of the recipe: a field for every key of config.yaml."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import arms
from directions import Task

from apiq_peft import PRESETS
from recipes_peft import config, errors

__all__ = ["Settings"]

# what a run's results do not depend on
_FREE = ("out", "arms", "seeds")
_KS = ("k_from_encoder", "k_from_decoder", "k_to_encoder", "k_to_decoder", "k_analysis")


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata={"help": "scratch, or a folder or hub id (M2M-100, NLLB)"})
    hub: str = field(metadata={"help": "language on one side of all directions"})
    languages: list[str]
    families: list[str] = field(metadata={"help": "related languages, such as es-fr"})
    data: str = field(metadata={"help": "quran, udhr, tiny, a folder of NTREX-128, or a file"})
    valid_data: str | None
    test_data: str | None
    out: str = field(metadata={"help": "folder for the results"})
    seed: int
    arms: list[str] = field(
        metadata={"help": f"{', '.join(arms.TUNERS)}, then + and {', '.join(arms.MASKS)}"}
    )
    seeds: int = field(metadata={"help": "of full arms; the others run once"})
    vocabulary: int
    layers: int
    width: int
    ffn: int
    heads: int
    dropout: float
    max_length: int = field(metadata={"help": "tokens of a side; longer pairs are left out"})
    steps: int
    arm_steps: int
    learning_rate: float
    road_learning_rate: float
    lora_learning_rate: float
    warmup: int
    arm_warmup: int
    batch_tokens: int
    accumulation: int
    temperature: float
    label_smoothing: float
    evaluate_every: int
    patience: int
    precision: str
    k_from_encoder: float
    k_from_decoder: float
    k_to_encoder: float
    k_to_decoder: float
    k_analysis: float
    bias: str
    count: str
    group_size: int
    rank: int
    bits: int
    preset: str
    calibration_rows: int
    pruned: float
    lass_steps: int
    valid_rows: int
    validated: int
    test_rows: int
    translated: int
    beams: int
    comet: str | None = field(metadata={"help": "a checkpoint of COMET on this machine"})

    def __post_init__(self) -> None:
        choices = {
            "precision": ("no", "fp16", "bf16"),
            "bias": ("kept", "masked"),
            "count": ("tokens", "positions"),
            "preset": PRESETS,
        }
        config.check(self, ("seed", "dropout", "label_smoothing", "warmup", "arm_warmup"), choices)
        for name in _KS:
            if getattr(self, name) > 100:
                raise errors.UserError(f"{name} is {getattr(self, name)}; it is a percentage")
        sides = [self.hub, *self.languages]
        if len(set(sides)) < len(sides):
            raise errors.UserError(f"a language stands twice in {', '.join(sides)}; name it once")
        for arm in self.arms:
            arms.parse(arm)

    def key(self) -> str:
        """Give a short name for all that results depend on."""
        own = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]

    def percent(self, tasks: Sequence[Task]) -> Callable[[str, str], float]:
        """Give k by the name of a task and of a block."""
        kinds = {task.name: task.kind for task in tasks}

        def k(task: str, layer: str) -> float:
            side = "encoder" if "encoder" in layer.split(".") else "decoder"
            return getattr(self, f"k_{kinds[task]}_{side}")

        return k
