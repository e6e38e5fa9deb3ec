"""A multilingual encoder as a predictor: as it is, quantised with ApiQ, or tuned on English.

A text is the mean of the encoder's last states. As it is, the label is that of the most similar
English reference. Tuned, a linear head on the normalised mean starts as the means of the English
classes (so that it begins where the untuned encoder is) and learns with the encoder; of two texts
the head sees both means, their product and their difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from translated import Item
from translators import sentences

from apiq_peft import ApiQConfig, CalibrationError, preset, quantize
from recipes_peft import encoders, report
from recipes_peft.errors import explained
from recipes_peft.loop import Point, Training, fit
from road_peft import RoadConfig

__all__ = [
    "BITS",
    "TUNERS",
    "Encoder",
    "Tuned",
    "curves",
    "load",
    "make_quantised",
    "static",
    "train",
]

BITS = re.compile(r"(encoder|lora|lm)-apiq([234])")
_SCALE = 20.0  # of cosines before the softmax


class Encoder:
    """Gives texts as vectors: the mean of an encoder's last states over real tokens."""

    def __init__(self, model: Any, tokenizer: Any, prefix: str, length: int, batch: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prefix, self.length, self.batch = prefix, length, batch

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Give the tokens of a batch."""
        found = self.tokenizer(
            [self.prefix + text for text in texts],
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    def pool(self, inputs: dict[str, Tensor]) -> Tensor:
        """Give the mean states (texts, hidden)."""
        states = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    @torch.no_grad()
    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Give the vectors (texts, hidden), in batches of texts of similar length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch):
            some = order[start : start + self.batch]
            inputs = self.inputs([texts[i] for i in some])
            pooled = self.pool({key: value.to(device) for key, value in inputs.items()}).cpu()
            for i, vector in zip(some, pooled.float(), strict=True):
                found[i] = vector
        return torch.stack(found)


def load(given: Any) -> Encoder:
    """Load the encoder of the settings."""
    model, tokenizer = encoders.load_encoder(given.encoder)
    return Encoder(model, tokenizer, given.prefix, given.max_length, given.batch_size)


def static(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Give the mean of the encoder's word vectors, which know no context (texts, hidden)."""
    table = encoder.model.get_input_embeddings().weight.detach()
    ids = encoder.tokenizer(list(texts), add_special_tokens=False).input_ids
    empty = [encoder.tokenizer.unk_token_id or 0]
    return torch.stack([table[torch.tensor(row or empty)].mean(0) for row in ids])


def layers(model: nn.Module) -> list[str]:
    """Give the linear layers of the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    ]


def make_quantised(
    model: Any, batches: Any, bits: int, given: Any, folder: Path, **task: Any
) -> Any:
    """Quantise a model with ApiQ on English batches; gives it with its LoRA."""
    config = ApiQConfig(
        bits=bits,
        group_size=given.group_size,
        r=given.rank,
        lora_alpha=given.rank,
        target_modules=layers(model),
        **task,
    )
    with explained(ValueError, CalibrationError, before=f"ApiQ with {bits} bits: "):
        return quantize(model, batches, config, preset(given.preset), folder=folder)[0].eval()


def road(model: Any, given: Any) -> Any:
    return get_peft_model(
        model, RoadConfig(target_modules=layers(model), group_size=given.group_size)
    )


def lora(model: Any, given: Any) -> Any:
    return get_peft_model(
        model, LoraConfig(target_modules=layers(model), r=given.rank, lora_alpha=2 * given.rank)
    )


def full(model: Any, given: Any) -> Any:
    return model.requires_grad_(True)


# How each is added, and its learning rate as a multiple of RoAd's.
TUNERS: dict[str, tuple[Callable[[Any, Any], Any], float]] = {
    "road": (road, 1.0),
    "lora": (lora, 0.3),
    "full": (full, 0.01),
}


class Tuned(nn.Module):
    """An encoder with a head, trained on English items."""

    def __init__(
        self, encoder: Encoder, train: Sequence[Item], adapt: Callable[[Any], Any]
    ) -> None:
        super().__init__()
        self.labels = sorted({item.label for item in train})
        self.pairs = len(train[0].fields) == 2
        sides = list(zip(*(item.fields for item in train), strict=True))
        start = self._features([encoder.vectors(side) for side in sides])
        self.head = nn.Linear(start.shape[1], len(self.labels))
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            if self.pairs:
                self.head.weight.zero_()
            else:
                for row, label in enumerate(self.labels):
                    own = [item.label == label for item in train]
                    self.head.weight[row] = F.normalize(start[own].mean(0), dim=0) * _SCALE
        self.encoder = encoder
        self.body = encoder.model = adapt(encoder.model)

    def _features(self, sides: Sequence[Tensor]) -> Tensor:
        a, *rest = (F.normalize(side, dim=1) for side in sides)
        if not rest:
            return a
        # entries of unit vectors are small: brought to the size of one
        width = a.shape[1] ** 0.5
        return torch.cat([a, rest[0], width * a * rest[0], (a - rest[0]).abs()], 1) * width

    def forward(self, sides: list[dict[str, Tensor]], labels: Tensor | None = None) -> Any:
        logits = self.head(self._features([self.encoder.pool(side) for side in sides]))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)

    def batch(self, items: Sequence[Item]) -> dict[str, Any]:
        """Give what `forward` takes."""
        sides = zip(*(item.fields for item in items), strict=True)
        labels = torch.tensor([self.labels.index(item.label) for item in items])
        return {"sides": [self.encoder.inputs(side) for side in sides], "labels": labels}

    @torch.no_grad()
    def predict(self, items: Sequence[Item]) -> list[int]:
        """Give a label for each item."""
        self.eval()
        sides = list(zip(*(item.fields for item in items), strict=True))
        found = self._features([self.encoder.vectors(side) for side in sides])
        logits = self.head(found.to(self.head.weight.device))
        return [self.labels[i] for i in logits.argmax(1).tolist()]

    def trained(self) -> dict[str, Tensor]:
        """Give what has a gradient, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def train(
    tuned: Tuned,
    items: Sequence[Item],
    given: Any,
    rate: float,
    seed: int,
    accelerator: Accelerator,
    file: Path,
) -> None:
    """Train on English items, or take the weights from `file` if an earlier run wrote them.

    Besides whole texts their sentences are learnt from, with the label of the text. The curve is of
    every eighth item: held out of a pair task, but not where a class has no text to spare.
    """
    if file.exists():
        with explained(OSError, RuntimeError, before=f"cannot go on from {file}: "):
            tuned.load_state_dict(load_file(file), strict=False)
        return
    rows = list(items)
    held = rows[::8]
    if tuned.pairs:
        rows = [row for i, row in enumerate(rows) if i % 8]
    else:
        for item in items:
            parts = sentences(item.fields[0])
            rows += [Item(item.key, (part,), item.label) for part in parts if len(parts) > 1]

    @torch.no_grad()
    def measured() -> tuple[float, None]:
        tuned.eval()
        size, total = given.micro_batch_size, 0.0
        for start in range(0, len(held), size):
            some = held[start : start + size]
            batch = tuned.batch(some)
            device = tuned.head.weight.device
            sides = [{k: v.to(device) for k, v in side.items()} for side in batch["sides"]]
            total += tuned(sides, batch["labels"].to(device)).loss.item() * len(some)
        return total / len(held), None

    how = Training(
        steps=given.steps,
        batch_size=given.train_batch_size,
        micro_batch_size=given.micro_batch_size,
        learning_rate=rate,
        evaluate_every=given.evaluate_every,
        seed=seed,
    )
    saved = file.with_name(f"{file.stem}-unfinished.safetensors")
    before = measured()[0]
    points = fit(accelerator, tuned, rows, tuned.batch, how, measured, file.stem, saved)
    curve = {"before": before, "points": [asdict(point) for point in points]}
    report.write_json(file.with_suffix(".json"), curve)
    part = file.with_name(f"{file.name}.part")
    save_file({n: p.detach().cpu().contiguous() for n, p in tuned.trained().items()}, part)
    part.replace(file)
    saved.unlink(missing_ok=True)


def curves(folder: Path) -> tuple[dict[str, float], dict[str, list[Point]]]:
    """Give the losses before training and the points of what was trained in a folder, by arm."""
    before, points = {}, {}
    names = [*TUNERS, *(f"lora-apiq{bits}" for bits in (4, 3, 2))]
    for name in names:
        file = folder / f"{name}-0.json"
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            before[name] = content["before"]
            points[name] = [Point(**point) for point in content["points"]]
    return before, points
