"""Finetune on translations and watch what else the model could do; then mix in running text.

Arms: `full`, `road` or `apiq` (LoRA on low bits), and after a dash what is trained on: `par`, the
translations alone; `mix`, running text on top of them; `total`, running text in place of some; and
`control`, translations in another format where `mix` has text. Abilities are measured before
training and in between its steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from abilities import Abilities, Measured
from accelerate import Accelerator
from accelerate.utils import set_seed
from corpus import Corpus, read_corpus
from peft import get_peft_model
from probes import Maker
from progress import Progress, finished
from retained import present
from settings import PRECISION, Settings
from stream import Mixed, mix
from weighted import Weighted, join

from apiq_peft import ApiQConfig, preset, quantize
from recipes_peft import config, errors, loop, models, text
from recipes_peft.data import collate
from road_peft import RoadConfig


def load(tuner: str, given: Settings) -> tuple[Any, Any]:
    """Give the model and its tokenizer; all weights are trained in float32, adapters on others."""
    return models.load(given.model, "float32" if tuner == "full" else given.dtype)


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
    accelerator = Accelerator(mixed_precision=PRECISION[given.dtype])
    seeds = [int(seed) for seed in given.seeds]
    planned = [(arm, seed) for seed in seeds for arm in given.arms]
    planned = list(dict.fromkeys(planned + [(arm, seeds[0]) for arm in given.once]))
    with accelerator.main_process_first():
        corpus = read_corpus(given)
        model, tokenizer = load("base", given)
    if not corpus.more and any(arm.endswith("-control") for arm, _ in planned):
        raise errors.UserError(
            f"all {len(corpus.train)} pairs are trained on, and none are left for the control;"
            " lower --pairs, or leave it out of --arms and --once"
        )
    abilities = Abilities(Maker(tokenizer, given.micro_batch_size, given.max_length), corpus, given)
    pairs, passages = corpus.dropped
    accelerator.print(
        f"{len(corpus.train)} pairs to train on; left out, for it is tested on: {pairs} pairs and"
        f" {passages} passages"
    )

    def base(_: Progress) -> dict[str, Any]:
        found = measured(accelerator, abilities, model.to(accelerator.device))
        return _history([_noted(0, found)])

    runs = {"base": finished(out, "base", given, accelerator, base)}
    for arm, seed in planned:
        job = partial(run_arm, accelerator, arm, seed, corpus, abilities, given)
        runs[f"{arm} {seed}"] = finished(out, f"{arm}-{seed}", given, accelerator, job)
    if accelerator.is_main_process:
        present(out, asdict(given), runs)
    return 0


def run_arm(
    accelerator: Accelerator,
    arm: str,
    seed: int,
    corpus: Corpus,
    abilities: Abilities,
    given: Settings,
    progress: Progress,
) -> dict[str, Any]:
    """Train an arm, and measure the abilities before it, in between and after it."""
    set_seed(seed)
    tuner, _, kind = arm.partition("-")
    model, tokenizer = load(tuner, given)
    model.to(accelerator.device)
    sizes = (given.calibration_samples, given.calibration_length)
    running = map(abilities.maker.running, corpus.running)
    samples = text.samples(running, *sizes) if tuner == "apiq" else torch.empty(0)
    model = attach(tuner, model, samples, given)
    mixed = stream(kind, abilities.maker, corpus, given, seed)
    every = max(1, len(mixed.rows) // given.batch_size // given.checkpoints)
    how = loop.Training(
        given.checkpoints * every,
        given.batch_size,
        given.micro_batch_size,
        getattr(given, f"{tuner}_learning_rate"),
        every,
        seed,
        given.warmup,
        schedule=given.schedule,
    )
    # what quantisation costs is not forgetting: the reference of apiq is its untrained model
    first = measured(accelerator, abilities, model) if tuner == "apiq" else None
    before = [_noted(0, first)] if first else []

    def at_checkpoint() -> tuple[float, None]:
        found = measured(accelerator, abilities, model)
        done = len(progress.measured) + 1
        progress.add(_noted(sum(mixed.parallel) * done // given.checkpoints, found))
        return found.values["translation"], None

    trained, rows, pad = model, mixed.rows, tokenizer.pad_token_id
    joined: Callable[[Any], dict[str, Any]] = partial(collate, pad=pad)
    if (given.parallel_weight, given.text_weight) != (1, 1):
        weights = [given.parallel_weight if p else given.text_weight for p in mixed.parallel]
        trained, rows = Weighted(model), list(zip(rows, weights, strict=True))
        joined = partial(join, pad=pad)
    # with a single checkpoint there is nothing to go on from
    saved = progress.saved if given.checkpoints > 1 else None
    name = f"{arm} {seed}"
    points = loop.fit(accelerator, trained, rows, joined, how, at_checkpoint, name, saved)
    return {
        "token_share": mixed.token_share,
        "steps": how.steps,
        "seconds": points[-1].seconds,
        "before": before[0]["figures"] if before else None,
        **_history(before + progress.measured),
    }


def measured(accelerator: Accelerator, abilities: Abilities, model: Any) -> Measured:
    """Measure a model with products of the precision that it is trained with."""
    with accelerator.autocast():
        return abilities.measure(model)


def stream(kind: str, maker: Maker, corpus: Corpus, given: Settings, seed: int) -> Mixed:
    """Give the rows that an arm is trained on."""
    parallel = [maker.pair(pair) for pair in corpus.train]
    share = 0.0 if kind == "par" else given.share
    running = [maker.running(passage) for passage in corpus.running] if share else []
    budget = "equal_total" if kind == "total" else "equal_parallel"
    other = [maker.other_format(pair) for pair in corpus.more] if kind == "control" else []
    return mix(parallel, running, share, budget, seed, other)


def _noted(parallel: int, found: Measured) -> dict[str, Any]:
    """Give what was measured after a number of translations, as a file keeps it."""
    return {
        "point": {"parallel": parallel, **found.values},
        "scores": found.scores,
        "figures": {name: asdict(figure) for name, figure in found.figures.items()},
    }


def _history(noted: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the values and scores of all measurements, and the items of the last."""
    return {
        "checkpoints": [each["point"] for each in noted],
        "scores": [each["scores"] for each in noted],
        "figures": noted[-1]["figures"],
    }


if __name__ == "__main__":
    sys.exit(errors.run(main))
