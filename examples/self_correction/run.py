"""Tune a translation model on noisy pairs, and let it correct them by what it knows itself.

A share of the training pairs gets the translation of another, similar sentence. Models are tuned on
them with plain cross-entropy, with self-correction, and with what else is said to help; the test
pairs are clean. Every finished run stays on disk, and the command goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from correction_arms import ARMS, TUNERS, Run, plan
from correction_report import present
from misalignment import FILTERS, PRESETS
from noisy_corpus import prepare
from one_run import perform, steps_of
from run_files import settings_of, unfinished
from starting_model import start, warmed

from apiq_peft import CalibrationError
from recipes_peft import config, errors, models, report, translation


@dataclass(frozen=True)
class Settings:
    model: str = field(
        metadata={"help": f"scratch, folder, hub id, or one of {', '.join(models.NAMES)}"}
    )
    data: str = field(
        metadata={"help": "quran, udhr, tiny, ntrex:FOLDER, hub:NAME, or a .tsv or .jsonl file"}
    )
    test_data: str | None = field(metadata={"help": "the same; if not given, a part of the data"})
    source: str = field(metadata={"help": "language to translate from"})
    target: str = field(metadata={"help": "language to translate into"})
    words: int | None = field(metadata={"help": "cut word-by-word pairs into pieces of so many"})
    out: str = field(metadata={"help": "folder for the results"})
    tuners: list[str] = field(metadata={"help": f"{', '.join(TUNERS)}; the first gets every arm"})
    arms: list[str] = field(metadata={"help": ", ".join(ARMS)})
    rates: list[str] = field(metadata={"help": "shares of noisy pairs; the first gets every arm"})
    seeds: int
    side_seeds: int = field(metadata={"help": "of the arms and tuners without a promise"})
    noise: str = field(metadata={"help": ", ".join(PRESETS)})
    encoder: str = field(metadata={"help": "of targets, for their similarity: tfidf or a name"})
    filter: str = field(metadata={"help": f"for the arm `filtered`: {', '.join(FILTERS)}"})
    filter_encoder: str = field(metadata={"help": "of both languages: tfidf or a name"})
    filtered_share: float | None = field(
        metadata={"help": "share of the pairs that `filtered` drops; if not given, the rate"}
    )
    tau: float
    steepness: float
    beta: float
    label_smoothing: float
    truncated: float = field(metadata={"help": "share of tokens that loss truncation ignores"})
    norm_threshold: float
    truncation_start: float = field(metadata={"help": "share of training before truncation"})
    variant: str
    road_group_size: int
    bits: int
    apiq_group_size: int
    rank: int
    preset: str
    calibration_samples: int
    calibration_length: int
    road_learning_rate: float
    full_learning_rate: float
    apiq_learning_rate: float
    schedule: str = field(metadata={"help": "linear, cosine, inverse_sqrt, constant"})
    warmup: float
    adam_beta2: float
    steps: int | None = field(metadata={"help": "if not given, as many as `epochs` take"})
    epochs: int
    save_steps: int | None = field(metadata={"help": "between checkpoints of a run to go on from"})
    batch_size: int
    micro_batch_size: int
    measure_batch_size: int = field(metadata={"help": "pairs measured or translated at a time"})
    warm_steps: int = field(metadata={"help": "of all weights on clean pairs, before the runs"})
    warm_pairs: int
    warm_learning_rate: float
    layers: int = field(metadata={"help": "of a model from scratch"})
    hidden: int = field(metadata={"help": "of a model from scratch, a multiple of 64"})
    tokenizer: str | None = field(metadata={"help": "of a model from scratch; null: bytes"})
    train_pairs: int
    development_pairs: int
    test_pairs: int
    check_pairs: int
    checks: int = field(metadata={"help": "looks at self-knowledge while training"})
    keep: str = field(metadata={"help": "last or best weights, by development loss at checks"})
    development: str = field(metadata={"help": "noisy or clean: what best is judged by"})
    max_length: int = field(metadata={"help": "tokens of a prompt and its translation"})
    max_new_tokens: int
    dtype: str
    comet: str | None = field(metadata={"help": "a checkpoint of COMET on this machine"})

    def __post_init__(self) -> None:
        choices = {"tuners": TUNERS, "arms": ARMS, "noise": PRESETS, "filter": FILTERS}
        choices |= {"keep": ("last", "best"), "development": ("noisy", "clean")}
        zero = ("warm_steps", "label_smoothing", "warmup", "truncation_start", "side_seeds")
        config.check(self, zero, choices)
        with errors.explained(ValueError, before="--rates: "):
            rates = [float(rate) for rate in self.rates]
        if any(not 0 <= rate < 1 for rate in rates):
            raise errors.UserError(f"rates are {', '.join(self.rates)}; give shares below 1")
        if self.filtered_share is not None and self.filtered_share >= 1:
            raise errors.UserError(f"filtered_share is {self.filtered_share}; give a share below 1")
        if "distilled" in self.arms and self.tuners[0] == "full":
            raise errors.UserError("the arm distilled needs an adapter; name road or apiq first")
        plan(self)  # refuses arms that the rates leave without a meaning


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        (out / "runs").mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=not torch.accelerator.is_available())
    with state.main_process_first():  # it fetches what the others then find
        base = start(given, out)
        model, tokenizer = models.load(base, given.dtype)
        del model
        corpus = prepare(given, tokenizer)
    encode = partial(translation.encode, tokenizer=tokenizer, max_length=given.max_length)
    if given.warm_steps:
        base = warmed(given, out, base, [encode(pair) for pair in corpus.warm])
    same = settings_of(given)
    runs, results = [Run("none", 0.0, "base", 0), *plan(given)], []
    state.print(
        f"{given.model}, {given.source} to {given.target}: {len(runs)} runs of"
        f" {steps_of(given, corpus)} steps; {len(corpus.train)} pairs to train on,"
        f" {len(corpus.development)} for development, {len(corpus.test)} to test on"
    )
    if corpus.dropped:
        state.print(f"{corpus.dropped} pairs of the data were dropped: they are in the test data")
    for number, run in enumerate(runs, 1):
        file = out / "runs" / f"{run}.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if before.get("settings") != same:
            state.print(f"{number} of {len(runs)}: {run}")
            with errors.explained(ValueError, CalibrationError, before=f"{run}: "):
                before = {"settings": same, "result": perform(run, given, corpus, base, encode)}
            if state.is_main_process:
                report.write_json(file, before)
                shutil.rmtree(unfinished(given, run), ignore_errors=True)
        results.append(before["result"])
    if state.is_main_process:
        shutil.rmtree(out / "trainer", ignore_errors=True)
        return 0 if present(given, out, results) else 1
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
