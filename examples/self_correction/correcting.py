"""Train with a token loss, and look at the self-knowledge of the model on the way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from correction import CorrectedTrainer
from self_knowledge import Check
from transformers import TrainerCallback, TrainingArguments

from recipes_peft.data import Encoded, collate

__all__ = ["Watch", "fit"]


class Watch(TrainerCallback):
    """Take a check after each of `count` equal parts of training; remember the best weights.

    `take(model, progress)` gives the check. Best is the lowest loss on development data.
    """

    def __init__(self, take: Callable[[Any, float], Check], count: int, remember: bool) -> None:
        self.take, self.count, self.remember = take, count, remember
        self.found: list[Check] = []
        self.best: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = {round((i + 1) * state.max_steps / self.count) for i in range(self.count)}
        if state.global_step not in due:
            return
        model = kwargs["model"]
        self.found.append(self.take(model, state.global_step / state.max_steps))
        model.train()
        losses = [check.development_loss for check in self.found]
        if self.remember and losses[-1] == min(losses):
            self.best = {n: p.detach().clone() for n, p in _trained(model)}

    def restore(self, model: Any) -> None:
        """Put the best weights back, if they were to be remembered."""
        with torch.no_grad():
            for name, parameter in _trained(model):
                if name in self.best:
                    parameter.copy_(self.best[name])


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def fit(
    model: Any,
    rows: Sequence[Encoded],
    tokenizer: Any,
    given: Any,
    folder: Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    token_loss: Any,
    teacher: bool = False,
    watch: Watch | None = None,
) -> None:
    """Train what has a gradient. The order of the rows depends on the seed and their number."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=given.micro_batch_size,
        gradient_accumulation_steps=_accumulated(given),
        learning_rate=learning_rate,
        lr_scheduler_type=given.schedule,
        warmup_steps=round(given.warmup * steps),
        weight_decay=0.0,
        adam_beta2=given.adam_beta2,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,  # rows are no dictionaries
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = CorrectedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=partial(collate, pad=tokenizer.pad_token_id),
        callbacks=[watch] if watch else [],
        token_loss=token_loss,
        teacher=teacher,
        vocabulary=len(tokenizer),
    )
    trainer.train()
    if watch:
        watch.restore(model)


def _accumulated(given: Any) -> int:
    """Give how many batches in memory make a step, on every process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, given.batch_size // (given.micro_batch_size * processes))
