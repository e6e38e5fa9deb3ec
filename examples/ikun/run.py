"""Make one multilingual translator of an English model in two stages, and ask what each is worth.

The vocabulary is extended for languages that the base cuts to crumbs; the first stage goes on
pre-training on text of all languages in balance; the second learns to translate from few good
pairs. Runs leave out a part (S: no first stage; S+: none, but as many steps; C: no new vocabulary),
or do it by other means: every weight, one adapter for both stages, ApiQ's low bits.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import experiment
import measure
import present
import promises
from accelerate import Accelerator
from experiment import RUNS

from apiq_peft import PRESETS
from recipes_peft import config, errors, models, report

LATER = ("out", "seeds", "runs", "once")  # settings that change no finished run


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata={"help": f"folder, hub id, or one of {', '.join(models.NAMES)}"})
    data: list[str] = field(
        metadata={"help": "quran, udhr, tiny, NTREX-128's folder, files of pairs; or several"}
    )
    test_data: str | None = field(
        metadata={"help": "one of these; if not given, a part of the data"}
    )
    monolingual: str | None = field(
        metadata={"help": "folder of LANGUAGE.txt, or a data set; else the rest of the data"}
    )
    monolingual_subset: str = field(metadata={"help": "folder of a language in the data set"})
    directions: list[str]
    out: str = field(metadata={"help": "folder for the results"})
    runs: list[str] = field(metadata={"help": ", ".join(RUNS)})
    once: list[str] = field(metadata={"help": "runs with the first seed only"})
    seeds: int = field(metadata={"help": "how many"})
    max_characters: int = field(metadata={"help": "of a line"})
    tuning_share: float = field(metadata={"help": "of the data; 1: all of it"})
    test_share: float
    test_pairs: int = field(metadata={"help": "of a direction, to measure bits on"})
    translated: int = field(metadata={"help": "of these, how many to translate"})
    translated_batch: int
    beams: int
    cap_margin: float = field(metadata={"help": "times the expected length of a translation"})
    new_pieces: int = field(metadata={"help": "of the vocabulary, at most"})
    multiple: int = field(metadata={"help": "of which the size of the vocabulary is one"})
    target_ratio: float | None = field(metadata={"help": "length ratio at which pieces suffice"})
    vocabulary_characters: int = field(metadata={"help": "to learn new pieces from"})
    first_characters: int = field(metadata={"help": "of the first stage, whatever the tokens"})
    first_steps: int | None = field(metadata={"help": "if not given, what the characters fill"})
    temperature: float = field(metadata={"help": "of languages: 1 as they are, .inf all equal"})
    max_epochs: float = field(metadata={"help": "over the text of a language"})
    block_length: int
    attention: str = field(metadata={"help": "across the documents of a block, or within"})
    batch_size: int = field(metadata={"help": "blocks of a step"})
    micro_batch_size: int
    tuning_pairs: int = field(metadata={"help": "of a direction, at most"})
    lines: int = field(metadata={"help": "lines of a document that make one pair, at most"})
    second_batch_size: int = field(metadata={"help": "pairs of a step"})
    second_steps: int | None
    epochs: int = field(metadata={"help": "over the pairs"})
    max_length: int = field(metadata={"help": "tokens of a prompt and its answer"})
    schedule: str
    warmup: float
    variant: str
    group_size: int
    target_modules: list[str] | None
    road_rate: float
    row_rate: float = field(metadata={"help": "learning rate of new pieces' rows"})
    full_rate: float
    lora_rate: float = field(metadata={"help": "learning rate of ApiQ's LoRA"})
    bits: int
    bits_group_size: int
    rank: int
    alpha: int
    preset: str = field(metadata={"help": "how ApiQ is calibrated"})
    calibration_samples: int
    calibration_length: int
    dtype: str
    comet: str | None = field(metadata={"help": "a checkpoint of COMET on this machine"})

    def __post_init__(self) -> None:
        choices = {"runs": RUNS, "once": RUNS, "attention": ("across", "within")}
        config.check(self, ("warmup",), {**choices, "preset": PRESETS})
        for name in self.directions:
            if len(name.split("-")) != 2:
                raise errors.UserError(f"directions has {name!r}; write two codes, such as en-ru")


def main() -> int:
    given = config.load(
        Settings, Path(__file__).with_name("config.yaml"), sys.argv[1:], str(__doc__)
    )
    settings = {k: v for k, v in asdict(given).items() if k not in LATER}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    out = Path(given.out)
    with errors.explained(ValueError, before=f"dtype {given.dtype}: "):
        mixed = "bf16" if given.dtype == "bfloat16" else None  # where weights are float32
        accelerator = Accelerator(mixed_precision=mixed)
    folder = out / f"runs-{digest}"  # other settings are other runs
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        folder.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():  # it fetches what the others then find
        parts, texts, met = experiment.read(given)
        model, tokenizer = models.load(given.model, given.dtype)
        named = [*given.runs, *given.once]
        extension = None
        if any(RUNS[name].vocabulary for name in named):
            extension = experiment.extended(given, folder, texts, parts, tokenizer)
    work = experiment.Work(given, accelerator, folder, parts, texts, met, tokenizer, extension)
    checks = measure.vocabulary_checks(work, extension, model) if extension else {}
    base = measure.text_bits(work, model.to(accelerator.device), tokenizer)
    del model
    found: dict[str, dict[int, Any]] = {}
    for seed in range(given.seeds):
        for name in named if seed == 0 else given.runs:
            found.setdefault(name, {})[seed] = experiment.second_stage(work, name, seed)
    if accelerator.is_main_process:
        conclude(work, out, base, checks, found)
    return 0


def conclude(work: experiment.Work, out: Path, base: Any, checks: Any, found: Any) -> None:
    """Show the tables and what was promised, and write all of it to the folder."""
    given = work.given
    rows = [
        present.row(name, seed, run) for name, runs in found.items() for seed, run in runs.items()
    ]
    report.show(
        f"{given.model}, on {', '.join(given.data)}",
        list(rows[0]),
        [list(r.values()) for r in rows],
    )
    kept = promises.vocabulary(checks) if checks else {}
    kept |= promises.texts(base, found) | promises.two_stages(found)
    kept |= promises.healthy(found, given.model not in models.NAMES) | promises.merges(
        found, given.dtype
    )
    for promise, met in kept.items():
        print(f"{'---' if met is None else 'yes' if met else 'NO '}  {promise}")
    left_out = present.left_out(work.measured.left_out, found)
    lengths = {n: [asdict(b) for b in promises.buckets(r.values())] for n, r in found.items()}
    report.write_json(
        out / "results.json",
        {
            "settings": asdict(given),
            "promises": kept,
            "vocabulary": checks,
            "base": {"texts": base},
            "left_out": left_out,
            "lengths": lengths,
            "runs": found,
        },
    )
    present.table(out / "runs.csv", rows)
    present.draw(out / "bits.png", found)
    print(f"results.json, runs.csv and bits.png are in {out}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
