"""The settings of the recipe: a field for every key of config.yaml."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from arms import ARMS
from samples import MAX_STEPS

from apiq_peft import PRESETS
from recipes_peft import config, errors, models

__all__ = ["Settings"]

# what the results of an arm do not depend on
_FREE = ("out", "arms", "seeds", "mechanic_chains")


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata={"help": f"folder, hub id, or one of {', '.join(models.NAMES)}"})
    data: str | None = field(
        metadata={"help": "folder with the official files, or a file of JSON lines; tested beside"}
    )
    text: str = field(metadata={"help": "to edit: boolq, toy, or a text file"})
    math: str = field(metadata={"help": "made, or a file in GSM8K's format"})
    qa: str = field(metadata={"help": "made, or a file in SQuAD's format"})
    out: str = field(metadata={"help": "folder for the results"})
    seed: int = field(metadata={"help": "of the chains and of the halves of the lexicon"})
    arms: list[str] = field(metadata={"help": ", ".join(ARMS)})
    seeds: int = field(metadata={"help": "orders of the data for the adapter of security"})
    train_steps: int = field(metadata={"help": "of the longest chain that is trained on"})
    test_steps: int = field(metadata={"help": "of the longest chain that is tested"})
    test_chains: int = field(metadata={"help": "of each task; of --data as well, the first ones"})
    held_chains: int = field(metadata={"help": "of security, for the loss and the form"})
    mechanic_chains: int = field(metadata={"help": "for criteria 1 to 4, which need no model"})
    least_words: int = field(metadata={"help": "of a text to edit"})
    most_words: int
    most_passage_words: int = field(metadata={"help": "of a passage out of --qa"})
    max_prompt: int = field(metadata={"help": "tokens; longer ones are left out and counted"})
    max_length: int = field(metadata={"help": "tokens of a prompt and its answer in training"})
    max_new_tokens: int
    answer_batch: int = field(metadata={"help": "prompts that are answered at a time"})
    variant: str
    group_size: int
    target_modules: list[str] | None
    road_rate: float = field(metadata={"help": "learning rate of RoAd"})
    lora_rate: float = field(metadata={"help": "learning rate of LoRA, ApiQ's as well"})
    rank: int
    alpha: int
    bits_group_size: int
    preset: str = field(metadata={"help": "how ApiQ is calibrated"})
    calibration_samples: int
    calibration_length: int
    calibration_epochs: int
    steps: int = field(metadata={"help": "of each training"})
    batch_size: int
    micro_batch_size: int
    schedule: str
    warmup: float
    evaluate_every: int
    dtype: str

    def __post_init__(self) -> None:
        zero = ("seed", "warmup", "calibration_epochs")
        config.check(self, zero, {"arms": ARMS, "preset": PRESETS})
        for name in ("train_steps", "test_steps"):
            if not 2 <= getattr(self, name) <= MAX_STEPS:
                raise errors.UserError(
                    f"{name} is {getattr(self, name)}; a chain has 2 to {MAX_STEPS} steps"
                )
        if self.least_words > self.most_words:
            raise errors.UserError(
                f"least_words is {self.least_words}, most_words {self.most_words}; swap them"
            )

    def key(self) -> str:
        """Give a short name for all that the results of an arm depend on."""
        own = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
