"""One run: the pairs made noisy, a model tuned on them, and what it does on clean ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from correcting import Watch, fit
from correction_arms import ARMS, TUNERS, Run
from misalignment import FILTERS, auroc, filter_scores
from noisy_corpus import Corpus, misaligned, part, vectors
from run_files import unfinished
from self_knowledge import Check, check, matched, row_losses, tokens

from recipes_peft import models, text, translation
from recipes_peft.data import Encoded
from recipes_peft.parallel import Pair

__all__ = ["perform", "steps_of"]


def perform(run: Run, given: Any, corpus: Corpus, base: str, encode: Any) -> dict[str, Any]:
    """Train as a run says and measure on clean pairs; gives what is kept of it."""
    set_seed(run.seed)
    began = time.perf_counter()
    # AdamW's steps would be lost in the rounding of weights of fewer bits
    model, tokenizer = models.load(base, "float32" if run.tuner == "full" else given.dtype)
    model.to(PartialState().device)
    look = partial(
        tokens,
        batch_size=given.measure_batch_size,
        pad=tokenizer.pad_token_id,
        vocabulary=len(tokenizer),
    )
    kept: dict[str, Any] = {"trained": 0, "filters": {}, "checks": [], "spent": 0.0}
    if run.tuner != "none":
        model, kept = tuned(run, given, corpus, model, tokenizer, encode, look)
    test, development = ([encode(p) for p in side] for side in (corpus.test, corpus.development))
    found = look(model, test)
    at_best, temperature = matched(look(model, development), found)
    sizes = {"batch_size": given.measure_batch_size, "max_new_tokens": given.max_new_tokens}
    said = translation.translate(model, tokenizer, corpus.test, **sizes)
    sources, wanted = [p.source for p in corpus.test], [p.target for p in corpus.test]
    scores = translation.score(said, wanted, "zh" if given.target == "zh" else "13a")
    comet = translation.comet(Path(given.comet), sources, said, wanted) if given.comet else None
    return {
        **asdict(run),
        "loss": found.plain.mean().item(),
        "matched_loss": at_best,
        "temperature": temperature,
        **asdict(scores),
        "comet": comet,
        "seconds": kept.pop("spent") + time.perf_counter() - began,
        **kept,
        "examples": [list(row) for row in zip(sources, said, wanted, strict=True)][:10],
    }


def tuned(
    run: Run, given: Any, corpus: Corpus, model: Any, tokenizer: Any, encode: Any, look: Any
) -> tuple[Any, dict[str, Any]]:
    """Tune the model on noisy pairs; give it and what was seen on the way."""
    arm, noisy = ARMS[run.arm], misaligned(corpus.train, given, run.rate, run.seed)
    folder = unfinished(given, run)
    pairs, flags = [n.pair for n in noisy], [n.noisy for n in noisy]
    rows, loss, few = [encode(p) for p in pairs], arm.loss(given), slice(given.check_pairs)
    filters: dict[str, float | None] = {}
    if run.arm == "ce" and run.rate:
        scores = _doubts(FILTERS, given, model, pairs[few], rows[few], look)
        is_noisy = torch.tensor(flags[few])
        filters = {name: auroc(torch.tensor(s), is_noisy) for name, s in scores.items()}
    doubts: Sequence[float] = ()
    if arm.part == "filtered":
        doubts = _doubts((given.filter,), given, model, pairs, rows, look)[given.filter]
    share = run.rate if given.filtered_share is None else given.filtered_share
    chosen = part(arm.part, rows, flags, doubts, share)
    samples = text.samples(rows, given.calibration_samples, given.calibration_length)
    model = TUNERS[run.tuner](model, samples, given, folder if given.save_steps else None)

    rate = run.rate if given.development == "noisy" else 0.0
    judged = [encode(n.pair) for n in misaligned(corpus.development, given, rate, run.seed)]

    def take(model: Any, progress: float) -> Check:
        plain = {"temperatures": (1.0,), "progress": progress, "token_loss": loss}
        found, development = look(model, rows[few], **plain), look(model, judged, **plain)
        return check(found, flags[few], progress, development)

    watch = Watch(take, given.checks, given.keep == "best")
    fit(
        model,
        chosen,
        tokenizer,
        given,
        folder,
        steps=steps_of(given, corpus),
        learning_rate=getattr(given, f"{run.tuner}_learning_rate"),
        seed=run.seed,
        token_loss=loss,
        watch=watch,
        teacher=arm.teacher,
    )
    if run.tuner == "road" and PartialState().is_main_process:
        model.save_pretrained(Path(given.out) / "adapters" / str(run))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checks = [asdict(check) for check in watch.found]
    seen = {"trained": trained, "filters": filters, "checks": checks}
    return model, {**seen, "spent": watch.spent}


def _doubts(
    names: Sequence[str],
    given: Any,
    model: Any,
    pairs: Sequence[Pair],
    rows: Sequence[Encoded],
    look: Any,
) -> dict[str, list[float]]:
    """Score pairs by filters; the model's loss costs most, so it is measured only if asked for."""
    loss = None
    if "loss" in names:
        loss = row_losses(look(model, rows, temperatures=(1.0,)), len(rows))
    texts = [p.source for p in pairs] + [p.target for p in pairs]
    both = vectors(tuple(texts), given.filter_encoder)
    return filter_scores(pairs, loss, (both[: len(pairs)], both[len(pairs) :]))


def steps_of(given: Any, corpus: Corpus) -> int:
    """Give the steps of every run: planned before its pairs are chosen, for trust counts them."""
    return given.steps or max(1, given.epochs * len(corpus.train) // given.batch_size)
