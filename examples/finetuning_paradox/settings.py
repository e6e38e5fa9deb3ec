"""The settings of the recipe, and which of them are allowed."""

from __future__ import annotations

from dataclasses import dataclass, field

from apiq_peft import PRESETS
from recipes_peft import config, errors, models

TUNERS = ("full", "road", "apiq")
PRECISION = {"float32": "no", "bfloat16": "bf16"}  # of weights, and of products in training
STREAMS = ("par", "mix", "total", "control")


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata={"help": f"folder, hub id, or one of {', '.join(models.NAMES)}"})
    source: str = field(metadata={"help": "language of the sources, such as en"})
    target: str
    data: str = field(metadata={"help": "pairs: quran, udhr, ntrex:FOLDER, tiny, or a file"})
    test_data: str | None = field(metadata={"help": "pairs to hold out, in place of some of data"})
    domain: str = field(metadata={"help": "pairs of another domain, for examples in a prompt"})
    text: str = field(metadata={"help": "running text: boolq, tiny, or a file"})
    target_text: str | None = field(metadata={"help": "the same of the target language"})
    formality: str | None = field(metadata={"help": "folder of CoCoA-MT"})
    pronouns: str | None = field(metadata={"help": ".jsonl: source, context, expected, document"})
    comet: str | None = field(metadata={"help": "a checkpoint of COMET on this machine"})
    dictionary: str | None = field(metadata={"help": "words and translations, parted by tabs"})
    out: str = field(metadata={"help": "folder for the results; finished runs in it are kept"})
    seeds: list[str]
    arms: list[str] = field(metadata={"help": f"{'|'.join(TUNERS)}-{'|'.join(STREAMS)}"})
    once: list[str] = field(metadata={"help": "arms with the first seed only"})
    pairs: int = field(metadata={"help": "to train on, at most"})
    longest: int = field(metadata={"help": "characters of a side of a pair"})
    share: float = field(metadata={"help": "of rows, of running text in mixed streams"})
    parallel_weight: float = field(metadata={"help": "of the loss of a translation's tokens"})
    text_weight: float = field(metadata={"help": "of the loss of tokens of what is mixed in"})
    text_characters: int
    batch_size: int
    micro_batch_size: int
    full_learning_rate: float
    road_learning_rate: float
    apiq_learning_rate: float
    warmup: float
    schedule: str
    checkpoints: int
    max_length: int
    dtype: str
    items: int = field(metadata={"help": "of a probe"})
    shots: int
    sentences: int = field(metadata={"help": "of context"})
    generated: int = field(metadata={"help": "translations of a probe that generates"})
    max_new_tokens: int
    variant: str
    bits: int
    group_size: int
    rank: int
    preset: str
    calibration_samples: int
    calibration_length: int

    def __post_init__(self) -> None:
        arms = [f"{tuner}-{stream}" for tuner in TUNERS for stream in STREAMS]
        choices = {"arms": arms, "once": arms, "preset": PRESETS, "dtype": PRECISION}
        config.check(self, ("warmup", "parallel_weight", "text_weight"), choices)
        if not all(seed.isdigit() for seed in self.seeds):
            raise errors.UserError(f"seeds are {self.seeds}; they must be whole numbers")
