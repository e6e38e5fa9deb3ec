"""The settings of the recipe: a field for every key of config.yaml."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

import arms
from prepare import TASKS

from apiq_peft import PRESETS
from recipes_peft import config, encoders, errors

__all__ = ["Settings"]

# what the results of an arm do not depend on
_FREE = ("out", "arms", "once", "seeds", "bootstrap")


@dataclass(frozen=True)
class Settings:
    task: str = field(metadata={"help": ", ".join(TASKS)})
    data: str = field(
        metadata={"help": "of the grid: pycountry, a folder, file, hub:NAME; tiny for own"}
    )
    train_data: str | None = field(
        metadata={"help": "if not given, a part of the data; {language} stands for the language"}
    )
    languages: list[str] | None = field(metadata={"help": "of the grid; all of own data if null"})
    train_language: str | None = field(metadata={"help": "the first of the languages if null"})
    model: str = field(metadata={"help": f"folder, hub id, or {', '.join(encoders.NAMES)}"})
    out: str = field(metadata={"help": "folder for the results"})
    arms: list[str] = field(
        metadata={"help": f"{', '.join(arms.TUNERS)}, perhaps + shuffled or mixed; with all seeds"}
    )
    once: list[str] = field(metadata={"help": "arms with the first seed only"})
    seeds: int = field(metadata={"help": "how many: of head, order and conditions"})
    train_groups: int = field(metadata={"help": "countries etc. kept from the test, to train on"})
    held_out: int = field(metadata={"help": "groups of the training part to choose weights by"})
    max_train: int | None = field(metadata={"help": "rows"})
    max_test: int | None = field(metadata={"help": "rows of the grid, before it is crossed"})
    max_length: int = field(metadata={"help": "tokens"})
    stride: int = field(metadata={"help": "tokens that windows over a context have in common"})
    steps: int | None = field(metadata={"help": "if not given, those of the epochs"})
    epochs: int
    evaluations: int = field(metadata={"help": "of the held-out set in a training"})
    batch_size: int
    micro_batch_size: int
    test_batch_size: int = field(metadata={"help": "rows times adapters"})
    road_rate: float
    lora_rate: float = field(metadata={"help": "of LoRA, and of ApiQ's"})
    full_rate: float
    warmup: float = field(metadata={"help": "share of the steps"})
    schedule: str
    weight_decay: float = field(metadata={"help": "of full only"})
    target_modules: list[str] | None = field(
        metadata={"help": "ends of names; all linear layers of the blocks if null"}
    )
    variant: str = field(metadata={"help": "of RoAd"})
    group_size: int = field(metadata={"help": "of RoAd"})
    rank: int
    alpha: int
    bits_group_size: int
    preset: str = field(metadata={"help": "of ApiQ's calibration"})
    calibration_rows: int
    bootstrap: int = field(metadata={"help": "samples of groups"})
    dtype: str

    def __post_init__(self) -> None:
        config.check(
            self,
            ("weight_decay", "warmup", "stride"),
            {"task": TASKS, "preset": PRESETS},
        )
        for name in [*self.arms, *self.once]:
            arms.parse(name)
        for name in ("languages", "arms"):
            words = getattr(self, name) or []
            if len(set(words)) < len(words):
                raise errors.UserError(f"{name} has a word twice: {', '.join(words)}; name it once")

    def key(self) -> str:
        """Give a short name for all that results of an arm depend on."""
        own = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
