"""The arms: what answers the items, by name; which kinds of task each can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines
import encoder_arms
import language_model
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from baselines import CharLstm, Majority, Ngrams, Regression, marked, nearest, split_marked
from benchmark_tasks import SPARE, Task
from encoder_arms import BITS, TUNERS, Encoder, Tuned
from translated import Item

from recipes_peft import models
from recipes_peft.errors import UserError

__all__ = ["ARMS", "Arm", "Start", "large_model", "seeded", "usable"]

Predict = Callable[[Sequence[Item], str], "list[int] | None"]  # of a language; None: cannot


@dataclass
class Start:
    """What all arms begin with; `machine` holds the translated items by language.

    `training` holds the translation of the English training items, where an arm learns from it.
    """

    given: Any
    task: Task
    machine: Mapping[str, Sequence[Item]]
    training: Mapping[str, Sequence[Item]]
    folder: Path
    accelerator: Accelerator
    seed: int = 0


@dataclass(frozen=True)
class Arm:
    """How to make a predictor, and the kinds of tasks it is for."""

    make: Callable[[Start, str], Predict]
    kinds: tuple[str, ...] = ("nearest", "pair", "choice")


def texts(items: Sequence[Item]) -> list[str]:
    return [marked(item.fields) for item in items]


def majority(start: Start, name: str) -> Predict:
    model = Majority(start.task.train or start.task.english)
    return lambda items, _: model.predict(items)


def bag(start: Start, name: str) -> Predict:
    """Nearest English text by trigrams; of options the one that shares most with the premise."""
    if start.task.kind == "choice":
        return lambda items, _: baselines.overlap(items)
    train = start.task.train
    grams = Ngrams(texts(train))
    known, labels = grams.vectors(texts(train)), [item.label for item in train]
    return lambda items, _: nearest(grams.vectors(texts(items)), known, labels)


def regression(start: Start, name: str) -> Predict:
    """Softmax regression on n-grams of two to four characters, from English."""
    train = start.task.train
    grams = Ngrams(texts(train), split_marked)
    model = Regression(grams.vectors(texts(train)), [item.label for item in train])
    return lambda items, _: model.predict(grams.vectors(texts(items)))


def translate_train(start: Start, name: str) -> Predict:
    """A bag of words for each language, from the machine translation of the training text.

    It does not answer what it learnt from: where the training text is the English side, the
    machine's rows. A language without a translator has none.
    """

    def predict(items: Sequence[Item], language: str) -> list[int] | None:
        own = list(start.training.get(language, []))
        if not own or {i.fields for i in items} <= {i.fields for i in own}:
            return None
        bag = Ngrams(texts(own), baselines.word_grams)
        model = Regression(bag.vectors(texts(own)), [item.label for item in own])
        return model.predict(bag.vectors(texts(items)))

    return predict


def static(start: Start, name: str) -> Predict:
    """The most similar mean of word vectors; of options the one most similar to the premise."""
    encoder = encoder_arms.load(start.given)

    def vectors(items: Sequence[Item], field: int) -> torch.Tensor:
        return encoder_arms.static(encoder, [item.fields[field] for item in items])

    if start.task.kind == "choice":

        def choose(items: Sequence[Item], _: str) -> list[int]:
            premise = vectors(items, 0)
            scores = [torch.cosine_similarity(premise, vectors(items, f)) for f in (1, 2)]
            return torch.stack(scores).argmax(0).tolist()

        return choose
    train = start.task.train
    known, labels = vectors(train, 0), [item.label for item in train]
    return lambda items, _: nearest(vectors(items, 0), known, labels)


def lstm(start: Start, name: str) -> Predict:
    train = start.task.train
    read = [" / ".join(item.fields) for item in train]
    steps = start.given.lstm_steps
    model = CharLstm(read, [item.label for item in train], steps, start.seed)
    return lambda items, _: model.predict([" / ".join(item.fields) for item in items])


def encoder(start: Start, name: str) -> Predict:
    """The most similar English reference by the encoder, as it is or quantised."""
    found = encoder_arms.load(start.given)
    if bits := BITS.fullmatch(name):
        found.model = encoder_arms.make_quantised(
            found.model,
            _calibration(found, start),
            int(bits[2]),
            start.given,
            start.folder / f"{name}-blocks",
        )
    found.model.to(start.accelerator.device)
    train = start.task.train
    known = found.vectors([item.fields[0] for item in train])
    labels = [item.label for item in train]
    return lambda items, _: nearest(
        found.vectors([item.fields[0] for item in items]), known, labels
    )


def tuned(start: Start, name: str) -> Predict:
    """An encoder and a head that learn in English; of one that is quantised, the LoRA of ApiQ."""
    given, (adapt, multiple) = start.given, TUNERS[name.partition("-apiq")[0]]
    set_seed(given.seed + start.seed)
    found = encoder_arms.load(given)

    def body(model: Any) -> Any:
        if bits := BITS.fullmatch(name):
            rows, folder = _calibration(found, start), start.folder / f"{name}-blocks"
            return encoder_arms.make_quantised(model, rows, int(bits[2]), given, folder)
        return adapt(model, given)

    model = Tuned(found, start.task.train, body)
    model.to(start.accelerator.device)
    file = start.folder / f"{name}-{start.seed}.safetensors"
    rate = multiple * given.learning_rate
    encoder_arms.train(model, start.task.train, given, rate, start.seed, start.accelerator, file)
    return lambda items, _: model.predict(items)


def causal(start: Start, name: str) -> Predict:
    """Options by the likelihood that a causal model gives them, as it is or quantised."""
    given = start.given
    model, tokenizer = models.load(given.model)
    if bits := BITS.fullmatch(name):
        spare = start.task.calibration[: given.calibration_rows]
        if not spare:
            raise UserError(
                f"{name} calibrates on rows that are not tested, and {given.data} has none; add"
                f" {SPARE[given.task]}, or leave {name} out of --arms"
            )
        rows = [
            tokenizer(f"{language_model.prompt(item)} {item.fields[1 + i % 2]}").input_ids
            for i, item in enumerate(spare)  # one option as often as the other, right or wrong
        ]
        batches = [{"input_ids": torch.tensor([row])} for row in rows]
        folder = start.folder / f"{name}-blocks"
        model = encoder_arms.make_quantised(
            model, batches, int(bits[2]), given, folder, task_type="CAUSAL_LM"
        )
    model.to(start.accelerator.device)
    return lambda items, _: language_model.choose(model, tokenizer, items)


def _calibration(found: Encoder, start: Start) -> list[dict[str, torch.Tensor]]:
    """Give batches of English training texts, each of one length: no padding to calibrate on."""
    some = [text for item in start.task.train for text in item.fields]
    return [found.inputs([text]) for text in some[: start.given.calibration_rows]]


_TEXT = ("nearest", "pair")
ARMS = {
    "majority": Arm(majority),
    "bow": Arm(bag, ("nearest", "choice")),
    "ngram-regression": Arm(regression, _TEXT),
    "translate-train": Arm(translate_train, ("nearest",)),
    "static": Arm(static, ("nearest", "choice")),
    "lstm": Arm(lstm, _TEXT),
    "encoder": Arm(encoder, ("nearest",)),
    **{f"encoder-apiq{bits}": Arm(encoder, ("nearest",)) for bits in (4, 3, 2)},
    **{name: Arm(tuned, _TEXT) for name in TUNERS},
    **{f"lora-apiq{bits}": Arm(tuned, _TEXT) for bits in (4, 3, 2)},
    "lm": Arm(causal, ("choice",)),
    **{f"lm-apiq{bits}": Arm(causal, ("choice",)) for bits in (4, 3, 2)},
}


def usable(names: Sequence[str], kind: str) -> list[str]:
    """Give those of the arms that can do a kind of task."""
    return [name for name in names if kind in ARMS[name].kinds]


def seeded(name: str) -> bool:
    """Say whether an arm depends on a seed."""
    return ARMS[name].make in (tuned, lstm)


def large_model(names: Sequence[str], given: Any) -> str:
    """Give the model whose pretraining makes the classes: the causal one, if one of these runs."""
    return given.model if any(ARMS[name].make is causal for name in names) else given.encoder
