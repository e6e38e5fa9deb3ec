"""Train an adapter with AdamW, and measure a model on what was held out.

Runs on one device or under `accelerate launch`. The adapter is whatever has a gradient. What ends
with a training is its last weights, or the best if points of the curve have a score. A long one can
be interrupted: it goes on from a file, with the numbers that it would have had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from recipes_peft.checkpoint import EVERY, Checkpoint
from recipes_peft.data import Encoded, batches, collate
from recipes_peft.errors import UserError
from recipes_peft.metrics import exact_match

__all__ = [
    "Point",
    "Result",
    "Training",
    "fit",
    "generate",
    "held_out_loss",
    "measure",
    "steps_left",
    "to",
    "train",
]

# of the learning rate after the warmup: what transformers calls it
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Training:
    """How to train: the same for every method but for the learning rate.

    Raises:
        UserError: there is no such schedule.
    """

    steps: int
    batch_size: int  # examples per step, over all processes
    micro_batch_size: int  # examples in memory at a time, per process
    learning_rate: float
    evaluate_every: int  # steps
    seed: int = 0  # of the order of the examples
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0
    schedule: str = "linear"  # of the learning rate, down to zero; or cosine, or constant
    weight_decay: float = 0.0  # adapters that multiply must not be pulled towards zero

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule is {self.schedule!r}; choose from {', '.join(SCHEDULES)}")

    @classmethod
    def of(cls, settings: Any, steps: int) -> Training:
        """Give the training of a recipe whose settings have fields of these names."""
        names = {f.name for f in fields(cls)} - {"steps"}
        return cls(steps, **{n: v for n, v in vars(settings).items() if n in names})


@dataclass(frozen=True)
class Point:
    """A point of the curves: the loss in training since the last point, and on the held-out set."""

    step: int
    seconds: float  # in training; evaluation not counted
    train_loss: float
    held_out_loss: float
    score: float | None = None  # what the best weights are chosen by, the higher the better


@dataclass(frozen=True)
class Result:
    """What a model does on the held-out set, and what it cost to get there."""

    held_out_loss: float
    exact_match: float | None  # None if nothing was generated
    answers: list[str]
    trained_parameters: int = 0
    seconds: float = 0.0


def train(
    accelerator: Accelerator,
    model: Any,
    rows: Sequence[Encoded],
    held_out: Sequence[Encoded],
    how: Training,
    tokenizer: Any,
    name: str,
    score: Callable[[], float] | None = None,
    saved: Path | None = None,
) -> list[Point]:
    """Train the parameters of `model` that have a gradient; show and return the losses.

    With `score`, called at every point of the curve, the model ends with the best weights. `saved`
    is as in `fit`.
    """
    pad = tokenizer.pad_token_id

    def measured() -> tuple[float, float | None]:
        loss = held_out_loss(model, held_out, how.micro_batch_size, pad)
        return loss, score() if score else None

    join = partial(collate, pad=pad)
    return fit(accelerator, model, rows, join, how, measured, name, saved)


def fit(
    accelerator: Accelerator,
    model: Any,
    rows: Sequence[Any],
    join: Callable[[Any], dict[str, Any]],
    how: Training,
    measured: Callable[[], tuple[float, float | None]],
    name: str,
    saved: Path | None = None,
    save_every: float = EVERY,
) -> list[Point]:
    """Train on batches that `join` makes of rows, whatever they are; show and return the losses.

    `measured` gives the held-out loss and a score, the higher the better, or None. With scores the
    model ends with the weights of the best point, the first of equals, else with the last.

    A file `saved` is written at a point of the curve if `save_every` seconds have gone by, and is
    the caller's to delete. If it is there already, and of this training, training goes on from it;
    numbers are those of a run in one piece, but for dropout on several processes.

    Raises:
        UserError: there are no rows, or `saved` cannot be read.
    """
    if not rows:
        raise UserError("there is nothing to train on; give more data")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer: Any = torch.optim.AdamW(
        named.values(), lr=how.learning_rate, weight_decay=how.weight_decay
    )
    warmup = round(how.warmup * how.steps)
    schedule = get_scheduler(SCHEDULES[how.schedule], optimizer, warmup, how.steps)
    order = torch.Generator().manual_seed(how.seed)
    processes = accelerator.num_processes
    micro = max(1, min(how.micro_batch_size, how.batch_size // processes))
    loader: Any = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=micro,
        shuffle=True,
        generator=order,
        collate_fn=join,
    )
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pieces = max(1, how.batch_size // (micro * processes))

    what = {"name": name, "rows": len(rows), **asdict(how)}
    state = Checkpoint(accelerator, named, optimizer, schedule, what, saved, save_every)
    source = _again(loader)
    points: list[Point] = []
    losses: list[float] = []
    done, seconds, shown = 0, 0.0, ""
    if state.resume():
        points = [Point(**point) for point in state.points]
        done, seconds = points[-1].step, points[-1].seconds
        random = torch.get_rng_state()
        for _ in range(done * pieces):  # so that the next batch is the one that was next
            next(source)
        torch.set_rng_state(random)
    bar = steps_left(accelerator, name, done, how.steps)
    for step in bar:
        started = time.perf_counter()
        wrapped.train()
        for _ in range(pieces):
            loss = wrapped(**next(source)).loss
            accelerator.backward(loss / pieces)
            losses.append(loss.item())
        accelerator.clip_grad_norm_(list(named.values()), how.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        running = losses[-8 * pieces :]
        if step % how.evaluate_every == 0 or step == how.steps:
            found, score = measured()
            before = [p.score for p in points if p.score is not None and not math.isnan(p.score)]
            points.append(Point(step, seconds, sum(losses) / len(losses), found, score))
            state.points.append(asdict(points[-1]))
            if score is not None and score > max(before, default=-math.inf):
                state.keep_best()
            shown = f", held-out {found:.3f}" + (
                f", score {score:.3f}" if score is not None else ""
            )
            losses.clear()
            state.save_if_due()
        bar.set_postfix_str(f"loss {sum(running) / len(running):.3f}{shown}")
    state.take_best()
    accelerator.free_memory()  # it would keep every model that it has prepared
    return points


def steps_left(accelerator: Accelerator, name: str, done: int, steps: int) -> Any:
    """Give a progress bar over the numbers of the steps of a training that are not done yet."""
    return tqdm(
        range(done + 1, steps + 1),
        desc=name,
        disable=not accelerator.is_main_process,
        initial=done,
        total=steps,
    )


def _again(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def measure(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    wanted: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    score: Callable[[Sequence[str], Sequence[str]], float] | None = exact_match,
    loss: float | None = None,
) -> Result:
    """Measure a model on held-out rows, whose answers as text are `wanted`.

    `score` compares answers with what was wanted; without it nothing is generated. `loss` is the
    held-out loss where it is known already.
    """
    if loss is None:
        loss = held_out_loss(model, rows, batch_size, tokenizer.pad_token_id)
    if score is None:
        return Result(loss, None, [])
    answers = generate(model, tokenizer, rows, max_new_tokens, batch_size)
    return Result(loss, score(answers, wanted), answers)


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Encoded], batch_size: int, pad: int) -> float:
    """Give the mean loss per token of the answers, in nats."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches(rows, batch_size, pad):
        counted = int((batch["labels"] != -100).sum())
        total += model(**to(batch, model.device)).loss.item() * counted
        tokens += counted
    return total / tokens


def to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Give the greedy answers to the prompts; an answer that was cut off ends in " ..."."""
    model.eval()
    answers: dict[int, str] = {}
    ranked = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    for start in range(0, len(ranked), batch_size):
        chosen = ranked[start : start + batch_size]
        batch = collate([Encoded(rows[i].prompt, []) for i in chosen], tokenizer.pad_token_id)
        prompt = {k: batch[k].to(model.device) for k in ("input_ids", "attention_mask")}
        output = model.generate(
            **prompt,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, prompt["input_ids"].shape[1] :]
        for i, tokens in zip(chosen, output, strict=True):
            ended = tokenizer.eos_token_id in tokens.tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            answers[i] = text if ended else f"{text} ..."
    return [answers[i] for i in range(len(rows))]
