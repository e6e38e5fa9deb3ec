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
from benchmark_tasks import Task
from encoder_arms import BITS, TUNERS, Encoder, Tuned
from translated import Item

from recipes_peft import models

__all__ = ["ARMS", "Arm", "Start", "seeded", "usable"]

Predict = Callable[[Sequence[Item], str], "list[int] | None"]  # of a language; None: cannot


@dataclass
class Start:
    """What all arms begin with; `machine` holds the translated items by language."""

    given: Any
    task: Task
    machine: Mapping[str, Sequence[Item]]
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
    """A bag of words for each language, from the machine translation of the English text.

    Only on human translation: on the machine's it would be tested on what it learnt from. A
    language without a translator has none.
    """

    def predict(items: Sequence[Item], language: str) -> list[int] | None:
        own = list(start.machine.get(language, []))
        if not own or [i.fields for i in items] == [i.fields for i in own]:
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
    given, (adapt, multiple) = start.given, TUNERS[name]
    set_seed(given.seed + start.seed)
    model = Tuned(encoder_arms.load(given), start.task.train, lambda body: adapt(body, given))
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
        rows = [
            tokenizer(f"{language_model.prompt(item)} {item.fields[1 + item.label]}").input_ids
            for item in start.task.english[: given.calibration_rows]
        ]
        batches = [{"input_ids": torch.tensor([row])} for row in rows]
        folder = start.folder / f"{name}-blocks"
        model = encoder_arms.make_quantised(
            model, batches, int(bits[2]), given, folder, task_type="CAUSAL_LM"
        )
    model.to(start.accelerator.device)
    return lambda items, _: language_model.choose(model, tokenizer, items)


def _calibration(found: Encoder, start: Start) -> list[dict[str, torch.Tensor]]:
    """Give batches of English references, each of one length: no padding to calibrate on."""
    some = start.task.train[: start.given.calibration_rows]
    return [found.inputs([item.fields[0]]) for item in some]


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
    "lm": Arm(causal, ("choice",)),
    **{f"lm-apiq{bits}": Arm(causal, ("choice",)) for bits in (4, 3, 2)},
}


def usable(names: Sequence[str], kind: str) -> list[str]:
    """Give those of the arms that can do a kind of task."""
    return [name for name in names if kind in ARMS[name].kinds]


def seeded(name: str) -> bool:
    """Say whether an arm depends on a seed."""
    return name in TUNERS or name == "lstm"
