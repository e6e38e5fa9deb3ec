"""Train with a token loss, and look at the self-knowledge of the model on the way.

A long training that was stopped goes on from its last checkpoint, with what was seen until then.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from correction import CorrectedTrainer
from safetensors.torch import load_file, save_file
from self_knowledge import Check
from transformers import TrainerCallback, TrainingArguments

from recipes_peft import report
from recipes_peft.data import Encoded, collate

__all__ = ["Watch", "fit"]


SEEN, BEST = "seen.json", "best.safetensors"  # what a checkpoint holds beside the Trainer's files


class Watch(TrainerCallback):
    """Take a check after each of `count` equal parts of training; remember the best weights.

    `take(model, progress)` gives the check. Best is the lowest loss on development data. Both go
    into checkpoints.
    """

    def __init__(
        self,
        take: Callable[[Any, float], Check] | None = None,
        count: int = 0,
        remember: bool = False,
    ) -> None:
        self.take, self.count, self.remember = take, count, remember
        self.found: list[Check] = []
        self.best: dict[str, torch.Tensor] = {}
        self.spent = 0.0  # seconds before a checkpoint that training went on from
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = {round((i + 1) * state.max_steps / self.count) for i in range(self.count)}
        if state.global_step == state.max_steps:
            control.should_save = False  # a training that is over cannot go on
        if self.take is None or state.global_step not in due:
            return
        model = kwargs["model"]
        self.found.append(self.take(model, state.global_step / state.max_steps))
        model.train()
        losses = [check.development_loss for check in self.found]
        if self.remember and losses[-1] == min(losses):
            self.best = {n: p.detach().clone() for n, p in _trained(model)}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add what was seen to a checkpoint, which is whole then; those before are deleted."""
        processes = PartialState()
        processes.wait_for_everyone()  # each writes a part of it
        if not processes.is_main_process:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_file({n: p.cpu().contiguous() for n, p in self.best.items()}, folder / BEST)
        spent = self.spent + time.perf_counter() - self.began
        seen = {"spent": spent, "checks": [asdict(check) for check in self.found]}
        report.write_json(folder / SEEN, seen)
        for other in folder.parent.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other)

    def go_on(self, folder: Path) -> str | None:
        """Give the last whole checkpoint, after taking back what was seen until then, or None."""
        whole = [file.parent for file in folder.glob(f"checkpoint-*/{SEEN}")]
        if not whole:
            return None
        last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
        seen = json.loads((last / SEEN).read_text(encoding="utf-8"))
        self.spent, self.found = seen["spent"], [Check(**check) for check in seen["checks"]]
        self.best = load_file(last / BEST)
        return str(last)

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
    watch: Watch,
    teacher: bool = False,
) -> None:
    """Train what has a gradient. The order of the rows depends on the seed and their number.

    Checkpoints are in the folder, which is the caller's to delete; training goes on from the last.
    Weights of float32 are computed with in bfloat16 if that is the dtype of the settings.
    """
    micro, pieces = _batches(given)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=pieces,
        learning_rate=learning_rate,
        lr_scheduler_type=given.schedule,
        warmup_steps=round(given.warmup * steps),
        weight_decay=0.0,
        adam_beta2=given.adam_beta2,
        seed=seed,
        logging_strategy="no",
        use_cpu=not torch.accelerator.is_available(),  # unless told so it refuses bf16 there
        bf16=given.dtype == "bfloat16" and model.dtype == torch.float32,
        save_strategy="steps" if given.save_steps else "no",
        save_steps=given.save_steps or steps,
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
        callbacks=[watch],
        token_loss=token_loss,
        teacher=teacher,
        vocabulary=len(tokenizer),
    )
    trainer.train(resume_from_checkpoint=watch.go_on(folder))
    watch.restore(model)


def _batches(given: Any) -> tuple[int, int]:
    """Give the pairs in memory at a time, and how many such batches make a step of a process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = max(1, min(given.micro_batch_size, given.batch_size // processes))
    return micro, max(1, given.batch_size // (micro * processes))
