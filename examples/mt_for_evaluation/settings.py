"""The settings of the recipe: a field for every key of config.yaml."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import language_table
import translators
from arms import ARMS, large_model, usable
from benchmark_tasks import KINDS, TASKS

from apiq_peft import PRESETS
from recipes_peft import config
from recipes_peft.errors import UserError

__all__ = ["Settings"]

# what predictions do not depend on
_FREE = (
    "out",
    "arms",
    "seeds",
    "draws",
    "missing",
    "classes_on",
    "translations",
    "machine_languages",
)


@dataclass(frozen=True)
class Settings:
    task: str = field(metadata={"help": ", ".join(TASKS)})
    data: str = field(
        metadata={"help": "udhr, tiny, pairs of your own, or the folder of a task's files"}
    )
    out: str = field(metadata={"help": "folder for the results"})
    seed: int
    train_data: str | None = field(metadata={"help": "English pairs to learn from, with classes"})
    languages: list[str] = field(metadata={"help": "codes of the data set, or all"})
    per_class: int = field(metadata={"help": "languages of each class, beside official ones"})
    translations: list[str] = field(
        metadata={"help": f"LANGUAGE=KIND:REST; kinds are {', '.join(translators.KINDS)}"}
    )
    machine_languages: list[str] = field(
        metadata={"help": "FLORES-200 codes without a human translation, all, or none"}
    )
    missing: str = field(metadata={"help": "a translator that is not here: skip it, or fail"})
    classes_on: str = field(metadata={"help": "human or machine: what classes are compared on"})
    pretraining: str | None = field(
        metadata={"help": f"{', '.join(language_table.PRETRAINING)}, or a JSON file of GiB by tag"}
    )
    high_from: float = field(metadata={"help": "GiB of text that make a language high-resource"})
    arms: list[str] = field(metadata={"help": ", ".join(ARMS)})
    seeds: int = field(metadata={"help": "of the arms that are trained"})
    encoder: str = field(metadata={"help": "e5-small, tiny, a folder or hub id"})
    prefix: str
    model: str = field(metadata={"help": "causal model, for tasks with options"})
    max_chars: int = field(metadata={"help": "characters of a text that are read"})
    max_length: int = field(metadata={"help": "tokens of a text"})
    n_items: int = field(metadata={"help": "items of a language, 0 for all"})
    batch_size: int
    group_size: int
    rank: int
    preset: str = field(metadata={"help": "how ApiQ is calibrated"})
    calibration_rows: int
    steps: int
    learning_rate: float = field(metadata={"help": "RoAd's; LoRA has 0.3 of it, full 0.01"})
    train_batch_size: int
    micro_batch_size: int
    evaluate_every: int
    lstm_steps: int
    draws: int = field(metadata={"help": "of the bootstrap, subsets and permutations"})

    def __post_init__(self) -> None:
        choices: dict[str, Any] = {
            "task": TASKS,
            "arms": ARMS,
            "missing": ("skip", "fail"),
            "classes_on": ("human", "machine"),
            "preset": PRESETS,
        }
        config.check(self, ("seed", "n_items", "per_class"), choices)
        for word in self.translations:
            translators.make(word)
        language_table.sizes(self.pretrained_on())
        if self.train_data and KINDS[self.task] != "pair":
            able = ", ".join(name for name, kind in KINDS.items() if kind == "pair")
            raise UserError(
                f"{self.task} does not learn from train_data, only {able}; leave it out"
            )

    def pretrained_on(self) -> str:
        """Give the table of sizes that classes are made by: that of the large model that runs."""
        names = usable(self.arms, KINDS[self.task])
        return self.pretraining or language_table.read_by(large_model(names, self))

    def key(self) -> str:
        """Give a short name for all that predictions depend on."""
        own = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
