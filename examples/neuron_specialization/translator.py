"""A multilingual translator: made, trained on batches of one task, counted, and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from directions import Row, Task, collate, cut, stream
from masking import ActivationCounter, Table
from torch.nn import functional as F
from transformers import M2M100Config, M2M100ForConditionalGeneration, get_inverse_sqrt_schedule

from recipes_peft.checkpoint import EVERY, Checkpoint
from recipes_peft.loop import Point, steps_left, to

__all__ = ["Training", "batch", "count", "make_model", "nll", "train", "translate"]

# what a task needs around a forward pass (its masks), and gives to it (names of adapters)
Active = Callable[[str], AbstractContextManager[Any]]
Extra = Callable[[str, int], dict[str, Any]]


def make_model(
    vocabulary: int, layers: int, width: int, ffn: int, heads: int, dropout: float, length: int
) -> Any:
    """Make a Transformer with random weights: pre-norm, ReLU, as many layers on both sides."""
    return M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=vocabulary,
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_ffn_dim=ffn,
            decoder_ffn_dim=ffn,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            dropout=dropout,
            attention_dropout=dropout,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            max_position_embeddings=length,
        )
    )


@dataclass(frozen=True)
class Training:
    """How to train; the same for base and arms but for steps, learning rate and seed."""

    steps: int
    learning_rate: float
    warmup: int  # steps
    batch_tokens: int
    accumulation: int  # batches of a step, per process
    temperature: float
    label_smoothing: float
    evaluate_every: int
    patience: int  # evaluations without a better one
    seed: int

    @classmethod
    def of(cls, settings: Any, **own: Any) -> Training:
        """Give the training of a recipe whose settings have fields of these names."""
        names = {f.name for f in fields(cls)} - set(own)
        return cls(**own, **{name: getattr(settings, name) for name in names})


def train(
    accelerator: Accelerator,
    model: Any,
    rows: Mapping[Task, Sequence[Row]],
    valid: Mapping[Task, Sequence[Row]],
    how: Training,
    name: str,
    active: Active,
    extra: Extra,
    saved: Path | None = None,
    save_every: float = EVERY,
) -> list[Point]:
    """Train what has a gradient, from a new optimizer; leave the best weights in `model`.

    The best are those of the lowest mean loss on the validation rows. Gives the evaluations.
    A step adds up batches of several tasks, each under its own masks; Adam's moments move rows of
    a layer that had no gradient in a step, as in the released code.

    A file `saved` is written at an evaluation if `save_every` seconds have gone by, and is the
    caller's to delete. If it is there already, training goes on from it; numbers are those of a run
    in one piece, but for dropout on several processes.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer: Any = torch.optim.Adam(
        named.values(), lr=how.learning_rate, betas=(0.9, 0.98), eps=1e-6
    )
    schedule = get_inverse_sqrt_schedule(optimizer, how.warmup)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    source = stream(rows, how.batch_tokens, how.temperature, how.seed)
    pad, start = model.config.pad_token_id, model.config.decoder_start_token_id
    processes, own = accelerator.num_processes, accelerator.process_index

    sizes = {task.name: len(part) for task, part in rows.items()}
    what = {"name": name, "rows": sizes, "processes": processes, **asdict(how)}
    state = Checkpoint(accelerator, named, optimizer, schedule, what, saved, save_every)
    points: list[Point] = []
    losses: list[float] = []
    done, seconds = 0, 0.0
    if state.resume():
        points = [Point(**point) for point in state.points]
        done, seconds = points[-1].step, points[-1].seconds
        for _ in range(done * how.accumulation * processes):
            next(source)  # so that the next batch is the one that was next
    waited = _since_best(points)
    bar = steps_left(accelerator, name, done, how.steps)
    for step in bar:
        if waited >= how.patience:
            break
        began = time.perf_counter()
        wrapped.train()
        # all processes draw the same batches and take every one in turn
        drawn = [next(source) for _ in range(how.accumulation * processes)]
        tokens = sum(len(row.target) - 1 for _, batch in drawn for row in batch)
        for i, (task, batch) in enumerate(mine := drawn[own::processes]):
            inputs = to(collate(batch, pad, start), accelerator.device)
            labels = inputs.pop("labels")
            with (
                active(task.name),
                wrapped.no_sync() if i + 1 < len(mine) and processes > 1 else nullcontext(),
            ):
                logits = wrapped(**inputs, **extra(task.name, len(batch))).logits
                loss = _loss(logits, labels, how.label_smoothing) / tokens
                # gradients are averaged over processes, and this is a share of a sum
                accelerator.backward(loss * processes)
            losses.append(loss.item() * processes)
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began
        if step % how.evaluate_every == 0 or step == how.steps:
            found = mean_loss(model, valid, how.batch_tokens, active, extra)
            trained = sum(losses) / len(losses) * how.accumulation
            points.append(Point(step, seconds, trained, found))
            bar.set_postfix_str(f"training {trained:.3f}, validation {found:.3f}")
            losses.clear()
            state.points.append(asdict(points[-1]))
            waited = _since_best(points)
            if not waited:
                state.keep_best()
            state.save_if_due()
    state.take_best()
    accelerator.free_memory()
    return points


def _since_best(points: Sequence[Point]) -> int:
    """Count the evaluations since the first of those of the lowest loss."""
    best, since = math.inf, 0
    for point in points:
        since = 0 if point.held_out_loss < best else since + 1
        best = min(best, point.held_out_loss)
    return since


def _loss(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
    """Give the sum of the losses of a batch's tokens, in nats."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing
    )


@torch.no_grad()
def nll(
    model: Any, rows: Sequence[Row], task: str, batch_tokens: int, active: Active, extra: Extra
) -> tuple[float, int]:
    """Give the sum of the losses of a task's target tokens, in nats, and how many there are."""
    model.eval()
    total, tokens = 0.0, 0
    for part in cut(rows, batch_tokens):
        inputs = to(batch(model, part), model.device)
        labels = inputs.pop("labels")
        with active(task):
            logits = model(**inputs, **extra(task, len(part))).logits
        total += _loss(logits, labels).item()
        tokens += int((labels != -100).sum())
    return total, tokens


def mean_loss(
    model: Any, rows: Mapping[Task, Sequence[Row]], tokens: int, active: Active, extra: Extra
) -> float:
    """Give the loss per token, as the mean over tasks."""
    found = [nll(model, part, task.name, tokens, active, extra) for task, part in rows.items()]
    return sum(total / count for total, count in found) / len(found)


@torch.no_grad()
def translate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    task: str,
    beams: int,
    max_new_tokens: int,
    batch_size: int,
    active: Active,
    extra: Extra,
) -> list[str]:
    """Translate the sources of rows, with the masks of the direction that is asked for."""
    model.eval()
    answers: dict[int, str] = {}
    ranked = sorted(range(len(rows)), key=lambda i: len(rows[i].source))
    for first in range(0, len(ranked), batch_size):
        chosen = ranked[first : first + batch_size]
        inputs = to(batch(model, [rows[i] for i in chosen]), model.device)
        with active(task):
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=inputs["decoder_input_ids"][:, :2],  # start, and the tag
                num_beams=beams,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                **extra(task, len(chosen)),
            )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        answers |= dict(zip(chosen, (text.strip() for text in texts), strict=True))
    return [answers[i] for i in range(len(rows))]


@torch.no_grad()
def count(
    accelerator: Accelerator,
    model: Any,
    rows: Mapping[Task, Sequence[Row]],
    batch_tokens: int,
    padding: bool,
    extra: Extra,
) -> Table:
    """Count the activations of every task, on its rows, with the right target given.

    Processes count every one in turn of the batches, and end with the same sums.
    """
    model.eval()
    own, processes = accelerator.process_index, accelerator.num_processes
    found = {}
    for task, part in rows.items():
        with ActivationCounter(model, padding) as counter:
            for piece in cut(part, batch_tokens)[own::processes]:
                inputs = to(batch(model, piece), model.device)
                del inputs["labels"]
                with counter.over(inputs["attention_mask"], inputs["decoder_attention_mask"]):
                    model(**inputs, **extra(task.name, len(piece)))
        found[task.name] = accelerator.reduce(counter.counts, "sum")
    names = next(iter(found.values()))
    return Table(
        tuple(found),
        {n: torch.stack([counts[n] for counts in found.values()]).cpu() for n in names},
    )


def batch(model: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Make a batch of rows with the model's own tokens for padding and start."""
    return collate(rows, model.config.pad_token_id, model.config.decoder_start_token_id)
