"""Finetune on translations and watch what else the model could do; then mix in running text.

Arms: `full`, `road` or `apiq` (LoRA on low bits), and after a dash what is trained on: `par`, the
translations alone; `mix`, running text on top of them; `total`, running text in place of some; and
`control`, translations in another format where `mix` has text. Abilities are measured before
training and in between its steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from corpus import Corpus, read_corpus
from peft import get_peft_model
from probes import Maker, Probe
from retained import present
from retention import Figure
from settings import Settings
from stream import Mixed, mix

from apiq_peft import ApiQConfig, preset, quantize
from recipes_peft import config, errors, loop, models, report, text
from recipes_peft.data import collate
from road_peft import RoadConfig

LATER = ("out", "seeds", "arms", "once")  # settings that change no finished run


def attach(tuner: str, model: Any, samples: torch.Tensor, given: Settings) -> Any:
    """Give the model with what is trained: all weights, rotations, or a LoRA on low bits."""
    with errors.explained(ValueError, before=f"{tuner} does not fit the model: "):
        if tuner == "full":
            return model.requires_grad_(True)
        if tuner == "road":
            road = RoadConfig(variant=given.variant, task_type="CAUSAL_LM")
            return get_peft_model(model, road)
        apiq = ApiQConfig(
            bits=given.bits,
            group_size=given.group_size,
            r=given.rank,
            lora_alpha=given.rank,
            task_type="CAUSAL_LM",
        )
        return quantize(model, samples, apiq, preset(given.preset))[0]


def main() -> int:
    argv = sys.argv[1:]
    given = config.load(Settings, Path(__file__).with_name("config.yaml"), argv, str(__doc__))
    out = Path(given.out)
    with errors.explained(OSError, before="cannot write the results: ", after="; choose --out"):
        (out / "runs").mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    with accelerator.main_process_first():
        corpus = read_corpus(given)
        model, tokenizer = models.load(given.model, given.dtype)
    maker = Maker(tokenizer, given.micro_batch_size, given.max_length)
    probes = make_probes(maker, corpus, given)
    accelerator.print(f"{len(corpus.train)} pairs to train on; probes: {', '.join(probes)}")

    def measured(model: Any) -> dict[str, Figure]:
        return {name: probe(model) for name, probe in probes.items()}

    def base() -> dict[str, Any]:
        return {
            "checkpoints": [_values(0, found := measured(model.to(accelerator.device)))],
            "figures": {name: asdict(figure) for name, figure in found.items()},
        }

    runs = {"base": finished(out, "base", given, accelerator, base)}
    seeds = [int(seed) for seed in given.seeds]
    planned = [(arm, seed) for seed in seeds for arm in given.arms]
    for arm, seed in dict.fromkeys(planned + [(arm, seeds[0]) for arm in given.once]):
        job = partial(run_arm, accelerator, arm, seed, corpus, tokenizer, measured, given)
        runs[f"{arm} {seed}"] = finished(out, f"{arm}-{seed}", given, accelerator, job)
    if accelerator.is_main_process:
        present(out, asdict(given), runs)
    return 0


def finished(
    out: Path, name: str, given: Settings, accelerator: Accelerator, job: Callable[[], Any]
) -> dict[str, Any]:
    """Give what a run found: from its file if that is of the same settings, else by running it."""
    file = out / "runs" / f"{name}.json"
    settings = {k: v for k, v in asdict(given).items() if k not in LATER}
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            accelerator.print(f"{name}: found in {file}")
            return kept
    found = {"settings": settings, **job()}
    if accelerator.is_main_process:
        report.write_json(file, found)
    return found


def run_arm(
    accelerator: Accelerator,
    arm: str,
    seed: int,
    corpus: Corpus,
    tokenizer: Any,
    measured: Callable[[Any], dict[str, Figure]],
    given: Settings,
) -> dict[str, Any]:
    """Train an arm, and measure the abilities before it, in between and after it."""
    set_seed(seed)
    tuner, _, kind = arm.partition("-")
    model = models.load(given.model, given.dtype)[0].to(accelerator.device)
    sizes = (given.calibration_samples, given.calibration_length)
    maker = Maker(tokenizer, given.micro_batch_size, given.max_length)
    running = [maker.running(passage) for passage in corpus.running]
    samples = text.samples(running, *sizes) if tuner == "apiq" else torch.empty(0)
    model = attach(tuner, model, samples, given)
    mixed = stream(kind, maker, corpus, given, seed)
    every = max(1, len(mixed.rows) // given.batch_size // given.checkpoints)
    steps = given.checkpoints * every
    how = loop.Training(
        steps,
        given.batch_size,
        given.micro_batch_size,
        getattr(given, f"{tuner}_learning_rate"),
        every,
        seed,
        given.warmup,
        schedule=given.schedule,
    )
    # what quantisation costs is not forgetting: the reference of apiq is its untrained model
    before = measured(model) if tuner == "apiq" else None
    checkpoints = [_values(0, before)] if before else []
    figures: dict[str, Figure] = {}

    def at_checkpoint() -> tuple[float, None]:
        figures.update(measured(model))
        done = len(checkpoints) + (not before)
        checkpoints.append(_values(sum(mixed.parallel) * done // given.checkpoints, figures))
        return figures["translation"].value, None

    join = partial(collate, pad=tokenizer.pad_token_id)
    points = loop.fit(accelerator, model, mixed.rows, join, how, at_checkpoint, f"{arm} {seed}")
    return {
        "token_share": mixed.token_share,
        "steps": steps,
        "seconds": points[-1].seconds,
        "before": before and {name: asdict(figure) for name, figure in before.items()},
        "checkpoints": checkpoints,
        "figures": {name: asdict(figure) for name, figure in figures.items()},
    }


def stream(kind: str, maker: Maker, corpus: Corpus, given: Settings, seed: int) -> Mixed:
    """Give the rows that an arm is trained on."""
    parallel = [maker.pair(pair) for pair in corpus.train]
    running = [maker.running(passage) for passage in corpus.running]
    share = 0.0 if kind == "par" else given.share
    budget = "equal_total" if kind == "total" else "equal_parallel"
    other = [maker.other_format(pair) for pair in corpus.more] if kind == "control" else []
    return mix(parallel, running, share, budget, seed, other)


def make_probes(maker: Maker, corpus: Corpus, given: Settings) -> dict[str, Probe]:
    """Give the probes that there is data for."""
    languages, new = (given.source, given.target), given.max_new_tokens
    some = corpus.held_out[: given.generated]
    probes = {
        "translation": maker.translation(corpus.held_out),
        "few-shot": maker.few_shot(corpus.domain, corpus.examples),
        "context": maker.context(corpus.in_order, given.sentences, given.items),
        "lm": maker.language(corpus.held_out_text),
        "chrf": maker.chrf(some, new),
    }
    if corpus.registers:
        shown = corpus.register_examples
        probes["steer"] = maker.steerability(corpus.registers, shown, languages)
        several = corpus.registers[: given.generated]
        probes["register"] = maker.register(several, shown, languages, new)
    if corpus.pronouns:
        probes["pronouns"] = maker.pronouns(corpus.pronouns, corpus.expected, new)
    if corpus.dictionary:
        probes |= maker.freedom(some, corpus.dictionary, new)
    return probes


def _values(seen: int, figures: dict[str, Figure]) -> dict[str, Any]:
    return {"parallel": seen, **{name: figure.value for name, figure in figures.items()}}


if __name__ == "__main__":
    sys.exit(errors.run(main))
