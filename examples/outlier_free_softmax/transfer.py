"""Finetune what was pretrained on short texts, another length than it has seen, and compare."""

from __future__ import annotations

import csv
import hashlib
import lzma
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import attention
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from attention import swapped
from peft import get_peft_model
from pretrain import Text, matching
from softmax_variants import Variant
from torch import nn
from transformers import AutoModelForSequenceClassification

from recipes_peft import adapters, data, loop
from recipes_peft.errors import UserError, explained
from recipes_peft.loop import Training
from road_peft import RoadConfig

__all__ = ["LINEARS", "TUNERS", "Task", "finetune", "read"]

# of the blocks; what PEFT matches names of modules with
LINEARS = {
    "bert": r".*encoder\.layer\..*\.(query|key|value|dense)",
    "opt": r".*layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2)",
}
HEADS = {"bert": ["pooler", "classifier"], "opt": ["score"]}  # new, so trained by every tuner


@dataclass(frozen=True)
class Task:
    """Short texts as token ids with the number of their class, and the names of the classes."""

    train: list[tuple[list[int], int]]
    held_out: list[tuple[list[int], int]]
    classes: list[str]


# ---- task ---------------------------------------------------------------------------------------


def read(given: Any, text: Text) -> Task:
    """Give the task that the settings name.

    Raises:
        UserError: it cannot be read, or has too few texts.
    """
    kind, _, rest = given.task.partition(":")
    counts = {"train": given.task_rows, "held_out": given.task_held_out}
    if given.task == "scrambled":
        sides = {part: _scrambled(text, part, given.task_length, n) for part, n in counts.items()}
        return Task(sides["train"], sides["held_out"], ["intact", "scrambled"])
    if kind == "banking77":
        named = {part: _banking(Path(rest), part) for part in counts}
    else:
        rows = _on_disk(Path(rest)) if kind == "disk" else data.read(Path(given.task))
        found = data.split(rows, given.task_held_out, given.seed)
        named = {
            part: [(e.prompt, e.label or e.answer) for e in side]
            for part, side in zip(counts, found, strict=True)
        }
    classes = sorted({label for _, label in named["train"]})
    number = {name: i for i, name in enumerate(classes)}
    coded = {
        part: [
            (_ids(text, prompt, given.task_length), number[label])
            for prompt, label in rows
            if label in number
        ][: counts[part]]
        for part, rows in named.items()
    }
    if not coded["held_out"] or len(classes) < 2:
        raise UserError(
            f"the task {given.task} has {len(classes)} classes, and {len(coded['held_out'])} texts"
            " of them are held out; give two classes or more, each with several texts"
        )
    return Task(coded["train"], coded["held_out"], classes)


def _ids(text: Text, prompt: str, length: int) -> list[int]:
    return [
        text.tokenizer.cls_token_id,
        *text.tokenizer(prompt, add_special_tokens=False).input_ids[: length - 1],
    ]


def _scrambled(text: Text, part: str, length: int, count: int) -> list[tuple[list[int], int]]:
    """Cut short texts from the corpus; in every other one the tokens but the first are shuffled."""
    windows = text.windows(part, length)
    draw = random.Random(length)
    rows = []
    for number, index in enumerate(draw.sample(range(len(windows)), min(count, len(windows)))):
        first, *ids = windows[index]
        # texts of different lengths, so that a batch is padded and T is counted
        ids = ids[: draw.randint(length // 2, length - 1)]
        if number % 2:
            draw.shuffle(ids)
        rows.append(([first, *ids], number % 2))
    return rows


def _on_disk(folder: Path) -> list[data.Example]:
    """Read a data set that `datasets` saved: its columns of text joined, and the column `label`."""
    from datasets import load_from_disk  # type: ignore[import-untyped]

    with explained(OSError, ValueError, before=f"cannot read the data set {folder}: "):
        rows = load_from_disk(str(folder))
    if "label" not in rows.column_names:
        raise UserError(f"{folder} has the columns {rows.column_names}; it needs one named label")
    texts = [" ".join(v for v in row.values() if isinstance(v, str)) for row in rows]
    labels = [str(label) for label in rows["label"]]
    return [data.Example(t, label, group=t) for t, label in zip(texts, labels, strict=True)]


def _banking(folder: Path, part: str) -> list[tuple[str, str]]:
    name = {"train": "train.csv", "held_out": "test.csv"}[part]
    path = next((p for p in (folder / name, folder / f"{name}.xz") if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no {name}; give the folder of BANKING77 (see the README)")
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    # the files are sorted by class
    return sorted(rows, key=lambda row: hashlib.sha256(row[0].encode()).hexdigest())


def collate(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    """Make a batch, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# ---- tuners -------------------------------------------------------------------------------------


def full(model: Any, given: Any) -> tuple[Any, float]:
    """Train every weight, as the paper does."""
    return model, given.full_rate


def road(model: Any, given: Any) -> tuple[Any, float]:
    """Train a RoAd of all linear layers of the blocks, and the new head."""
    kind = model.config.model_type
    config = RoadConfig(
        variant=given.variant,
        group_size=given.group_size,
        target_modules=LINEARS[kind],
        modules_to_save=HEADS[kind],
        task_type="SEQ_CLS",
    )
    with explained(ValueError, before="RoAd does not fit: "):
        return get_peft_model(model, config), given.road_rate


def head(model: Any, given: Any) -> tuple[Any, float]:
    """Train the new head alone: what pretraining has left is read, not changed."""
    new = HEADS[model.config.model_type]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(set(new) & set(name.split("."))))
    return model, given.road_rate


TUNERS: dict[str, Callable[[Any, Any], tuple[Any, float]]] = {
    "full": full,
    "road": road,
    "head": head,
}


def finetune(
    accelerator: Accelerator,
    given: Any,
    family: str,
    arm: str,
    tuner: str,
    seed: int,
    base: Path,
    task: Task,
    adapter: Path,
) -> dict[str, Any]:
    """Finetune and measure; a RoAd is saved, loaded again on a restored model and compared.

    The arm cs>ncs goes on from the weights of cs with the normalised softmax that equals it at the
    pretraining length.
    """

    def start() -> Any:
        set_seed(given.seed + seed)
        options = {"num_labels": len(task.classes)}
        return attention.restore(base, AutoModelForSequenceClassification, **options).to(
            accelerator.device
        )

    def attending(model: Any) -> Any:
        other: Variant = (
            matching(given, family) if arm == "cs>ncs" else attention.variant_of(model.config)
        )
        return swapped(model, other)

    model = start()
    pad = model.config.pad_token_id
    with attending(model):
        tuned, rate = TUNERS[tuner](model, given)
        how = Training(
            given.task_steps,
            given.task_batch_size,
            given.task_batch_size,
            rate,
            evaluate_every=max(1, given.task_steps // 4),
            seed=given.seed + seed,
            warmup=given.warmup,
            clip=given.clip,
            schedule=given.schedule,
        )

        def measured() -> tuple[float, None]:
            return score(tuned, task.held_out, pad)[1], None

        curve = loop.fit(
            accelerator,
            tuned,
            task.train,
            partial(collate, pad=pad),
            how,
            measured,
            f"{family} {arm} {tuner}, seed {seed}",
        )
        right, held_out = score(tuned, task.held_out, pad)
        found = {
            "right": right,
            "loss": held_out,
            "trained": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
            "curve": [asdict(point) for point in curve],
        }
        if tuner == "road" and accelerator.is_main_process:
            tuned.save_pretrained(adapter)
            probe = loop.to(collate(task.held_out[:8], pad), accelerator.device)
            with torch.no_grad():
                before = tuned.eval()(**probe).logits
    if tuner == "road" and accelerator.is_main_process:
        again = start()
        with attending(again), torch.no_grad():
            after = adapters.load_adapter(again, adapter).eval()(**probe).logits
        found["reloaded"] = ((after - before).abs().max() / before.abs().max()).item()
    return found


@torch.no_grad()
def score(model: nn.Module, rows: Sequence[Any], pad: int, size: int = 64) -> tuple[float, float]:
    """Give the share of texts that are put in their class, and the mean loss in nats."""
    model.eval()
    right = total = 0.0
    device = next(model.parameters()).device
    for i in range(0, len(rows), size):
        batch = loop.to(collate(rows[i : i + size], pad), device)
        out = model(**batch)
        right += (out.logits.argmax(-1) == batch["labels"]).sum().item()
        total += out.loss.item() * len(batch["labels"])
    return right / len(rows), total / len(rows)
