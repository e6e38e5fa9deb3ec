"""The two stages: what is trained in each, the loop for it, and what is kept between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, get_scheduler

from apiq_peft import ApiQConfig, preset, quantize
from apiq_peft.export import save_whole
from recipes_peft import adapters, loop, models
from recipes_peft.checkpoint import EVERY, Checkpoint
from recipes_peft.errors import UserError, explained
from road_peft import RoadConfig

ROWS = "trainable_tokens"  # in the name of a parameter that holds rows of new pieces


def with_road(model: Any, rows: dict[str, list[int]], given: Any) -> Any:
    """Add RoAd, and train the rows of new pieces, which no rotation of outputs can learn."""
    return get_peft_model(
        model,
        RoadConfig(
            variant=given.variant,
            group_size=given.group_size,
            target_modules=models.target_modules(given.target_modules),
            trainable_token_indices=rows or None,
            task_type="CAUSAL_LM",
        ),
    )


def with_all(model: Any, rows: dict[str, list[int]], given: Any) -> Any:
    """Train every weight; the rows of new pieces apart, so that they can have another rate."""
    if rows:
        ids = next(iter(rows.values()))
        config = TrainableTokensConfig(target_modules=list(rows), token_indices=ids)
        model = get_peft_model(model, config)
    return model.requires_grad_(True)


def with_apiq(model: Any, samples: torch.Tensor, given: Any) -> Any:
    """Quantise the weights of the blocks, and make the LoRA that is trained from then on.

    Embeddings and the output layer stay as they are.
    """
    config = ApiQConfig(
        bits=given.bits,
        group_size=given.bits_group_size,
        r=given.rank,
        lora_alpha=given.alpha,
        task_type="CAUSAL_LM",
    )
    return quantize(model, samples, config, preset(given.preset), show_progress=False)[0]


def train(
    accelerator: Accelerator,
    model: Any,
    rows: Iterable[Any],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    how: loop.Training,
    row_rate: float,
    name: str,
    saved: Path | None = None,
    save_every: float = EVERY,
) -> list[float]:
    """Train what has a gradient on rows in the order given; give the loss of every step.

    Rows of new pieces learn at `row_rate`. Of several processes each takes every so many-th row. A
    `rows` that can be read again is, until all steps are done.

    A file `saved` is written after a step if `save_every` seconds have gone by, and is the
    caller's to delete. If it is there already, training goes on from it, with the same numbers.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if ROWS not in n], "lr": how.learning_rate},
        {"params": [p for n, p in named if ROWS in n], "lr": row_rate},
    ]
    optimizer: Any = torch.optim.AdamW(
        [group for group in groups if group["params"]], weight_decay=how.weight_decay
    )
    plan = get_scheduler(
        loop.SCHEDULES[how.schedule], optimizer, round(how.warmup * how.steps), how.steps
    )
    processes = accelerator.num_processes
    micro = max(1, min(how.micro_batch_size, how.batch_size // processes))
    pieces = max(1, how.batch_size // (micro * processes))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    source = islice(_endless(rows), accelerator.process_index, None, processes)
    what = {"name": name, "row_rate": row_rate, "processes": processes, **asdict(how)}
    state = Checkpoint(accelerator, dict(named), optimizer, plan, what, saved, save_every)
    if state.resume():
        for _ in islice(source, len(state.points) * pieces * micro):
            pass  # so that the next row is the one that was next
    losses: list[float] = state.points
    bar = tqdm(
        range(len(losses), how.steps),
        desc=name,
        disable=not accelerator.is_main_process,
        initial=len(losses),
        total=how.steps,
    )
    wrapped.train()
    for _ in bar:
        total = 0.0
        for _ in range(pieces):
            batch = loop.to(collate(list(islice(source, micro))), accelerator.device)
            loss = wrapped(**batch).loss
            accelerator.backward(loss / pieces)
            total += loss.item() / pieces
        accelerator.clip_grad_norm_([p for _, p in named], how.clip)
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        losses.append(total)
        state.save_if_due()
        bar.set_postfix_str(f"loss {sum(losses[-8:]) / len(losses[-8:]):.3f}")
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # mixed precision ends here
    accelerator.free_memory()  # else it holds every model it has ever trained
    return losses


def merged(model: Any, probe: dict[str, Any]) -> tuple[Any, float]:
    """Merge whatever adapter there is; give the plain model and how far a probe's logits moved."""
    if not isinstance(model, PeftModel):
        return model, 0.0
    return adapters.merge(model.eval(), [probe])


def keep(model: Any, folder: Path, found: dict[str, Any]) -> None:
    """Write what the first stage made: an adapter, or a whole model; and numbers about it."""

    def write(part: Path) -> None:
        if isinstance(model, PeftModel) and not _all_trained(model):
            model.save_pretrained(part / "adapter", save_embedding_layers=False)
        else:
            plain = model.merge_and_unload() if isinstance(model, PeftModel) else model
            plain.save_pretrained(part / "model")
        (part / "stage.json").write_text(json.dumps(found), encoding="utf-8")

    save_whole(folder, write)


def restore(base: Any, folder: Path, dtype: str) -> Any:
    """Give the model after the first stage, its adapter not merged and able to go on learning.

    `base` has the vocabulary that the stage had.
    """
    if (folder / "model").exists():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))
    with explained(OSError, ValueError, before=f"cannot load {folder}: "):
        return PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)


def _all_trained(model: Any) -> bool:
    return all(p.requires_grad for p in model.parameters())


def _endless(rows: Iterable[Any]) -> Iterator[Any]:
    while True:
        some = False
        for row in rows:
            some = True
            yield row
        if not some:
            raise UserError(
                "the texts fill no row to train on; give more of them, or a smaller --block-length"
            )
