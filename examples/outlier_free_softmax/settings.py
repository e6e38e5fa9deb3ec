"""The settings of the recipe: a field for every key of config.yaml."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

from attention import GATES
from pretrain import ARMS, FAMILIES
from transfer import TUNERS

from apiq_peft import PRESETS
from recipes_peft import config, errors

__all__ = ["Settings"]

STAGES = ("toys", "pretrain", "measure", "transfer", "apiq")
_FREE = (
    *("out", "families", "opt_arms", "bert_arms", "once", "seeds", "stages"),
    *("transferred", "tuners", "quantized", "bits"),
)
# what the pretrained models depend on, beside names that begin with a family's
_PRETRAINING = (
    *("data", "test_data", "held_out_share", "most_tokens", "tokenizer", "seed"),
    *("layers", "hidden", "heads", "ffn", "dropout", "init_std", "zeta", "gate", "gate_pi"),
    *("length", "task_length", "task_held_out", "batch_size", "micro_batch_size", "masked"),
    *("schedule", "warmup", "clip", "weight_decay", "precision"),
    *("evaluate_every", "held_out_windows"),
)


@dataclass(frozen=True)
class Settings:
    data: list[str] = field(
        metadata={"help": "boolq, tiny, wikitext2:FOLDER, hub:NAME[:SUBSET], files; or several"}
    )
    test_data: str | None = field(metadata={"help": "one of these; else a part of the data"})
    held_out_share: float
    most_tokens: int | None = field(metadata={"help": "of the text to train on"})
    tokenizer: str = field(metadata={"help": "bytes, bpe:SIZE, a folder or a hub id"})
    out: str = field(metadata={"help": "folder for the results"})
    stages: list[str] = field(metadata={"help": ", ".join(STAGES)})
    families: list[str] = field(metadata={"help": ", ".join(FAMILIES)})
    opt_arms: list[str] = field(metadata={"help": f"with every seed: {', '.join(ARMS)}"})
    bert_arms: list[str] = field(metadata={"help": "the same"})
    once: list[str] = field(metadata={"help": "arms with the first seed only"})
    seeds: int = field(metadata={"help": "how many"})
    seed: int = field(metadata={"help": "the first"})

    layers: int
    hidden: int
    heads: int
    ffn: int
    dropout: float
    init_std: float
    length: int = field(metadata={"help": "tokens of a window in pretraining"})
    batch_size: int
    micro_batch_size: int
    bert_steps: int
    opt_steps: int
    bert_rate: float
    opt_rate: float
    bert_gamma: float = field(metadata={"help": "shift of the clipped softmax"})
    opt_gamma: float
    zeta: float = field(metadata={"help": "stretch of the clipped softmax"})
    gate: str = field(metadata={"help": ", ".join(GATES)})
    gate_pi: float = field(metadata={"help": "what a gate lets through at first"})
    masked: float = field(metadata={"help": "share of tokens that BERT predicts"})
    schedule: str
    warmup: float
    clip: float
    weight_decay: float
    precision: str = field(metadata={"help": "no, fp16 or bf16"})
    evaluate_every: int
    held_out_windows: int
    outlier_windows: int
    lengths: list[str] = field(metadata={"help": "of windows to measure on"})
    injected: list[str] = field(metadata={"help": "factors of a made outlier"})

    blimp: str | None = field(metadata={"help": "folder `data` of BLiMP, to judge sentences of"})
    blimp_pairs: int = field(metadata={"help": "of a phenomenon, at most"})

    task: str = field(
        metadata={"help": "scrambled, banking77:FOLDER, disk:FOLDER, or a .jsonl or .json file"}
    )
    task_length: int = field(metadata={"help": "tokens of a text, at most"})
    task_rows: int
    task_held_out: int
    task_steps: int
    task_batch_size: int
    transferred: list[str] = field(
        metadata={"help": "of the arms that are run; cs>ncs goes on with another softmax"}
    )
    tuners: list[str] = field(metadata={"help": ", ".join(TUNERS)})
    variant: str
    group_size: int
    road_rate: float
    full_rate: float

    quantized: list[str] = field(metadata={"help": "of the arms that are run"})
    bits: list[str] = field(metadata={"help": "widths"})
    bits_group_size: int
    rank: int
    alpha: int
    preset: str = field(metadata={"help": "how ApiQ is calibrated"})
    calibration_samples: int

    def __post_init__(self) -> None:
        negative = ("bert_gamma", "opt_gamma")
        shown = {k: v for k, v in vars(self).items() if k not in negative}
        config.check(
            SimpleNamespace(**shown),
            ("seed", "dropout", "warmup", "weight_decay"),
            {
                "stages": STAGES,
                "families": FAMILIES,
                "opt_arms": ARMS,
                "bert_arms": ARMS,
                "once": ARMS,
                "transferred": [*ARMS, "cs>ncs"],
                "quantized": ARMS,
                "tuners": TUNERS,
                "gate": GATES,
                "preset": PRESETS,
                "precision": ("no", "fp16", "bf16"),
            },
        )
        for name in negative:
            if getattr(self, name) > 0:
                raise errors.UserError(f"{name} is {getattr(self, name)}; it must be 0 or below")
        for name in ("lengths", "bits", "injected"):
            for word in getattr(self, name):
                if not word.isdigit() or not int(word):
                    raise errors.UserError(f"{name} has {word!r}; give whole numbers above zero")
        for word in self.lengths:
            if not 2 <= int(word) <= self.length:
                raise errors.UserError(
                    f"lengths has {word}; windows have 2 to {self.length} tokens (--length)"
                )
        if str(self.length) not in self.lengths:
            raise errors.UserError(
                f"lengths has no {self.length}; name the pretraining length (--length) as well"
            )

    def key(self, pretraining: bool = False) -> str:
        """Give a short name for what the pretrained models, or all results, depend on."""
        own = {
            name: value
            for name, value in asdict(self).items()
            if name not in _FREE
            and (not pretraining or name in _PRETRAINING or name.startswith(tuple(FAMILIES)))
        }
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:8]
