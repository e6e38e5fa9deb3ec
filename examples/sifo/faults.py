"""Responders whose behaviour is known: right ones, ones with a fault, and ones that follow nothing.

They are the floor and the ceiling of the scores, and tell what a wrong step does to those after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from samples import SifoSample
from simulators import Edit, read_edit, run_edits
from verifier import normalise

__all__ = [
    "RESPONDERS",
    "Strength",
    "chain_strength",
    "predicted",
    "skip_at_random",
    "skipped",
    "swapped",
]

RESPONDERS: Mapping[str, Callable[[SifoSample], list[str]]] = {
    "gold answers": lambda sample: list(sample.golds),
    "copies the context": lambda sample: [sample.context] * len(sample.golds),
    "lags one step": lambda sample: [sample.context, *sample.golds[:-1]],
    "repeats the instruction": lambda sample: list(sample.steps),
    "all golds in every answer": lambda sample: [" ".join(sample.golds)] * len(sample.golds),
    "empty": lambda sample: [],
}


def skipped(text: str, edits: Sequence[Edit], at: int) -> list[str]:
    """Give the texts after each step if step `at` (from 0) is omitted and the rest is applied."""
    before = run_edits(text, edits[:at])
    here = before[-1] if before else text
    return [*before, here, *run_edits(here, edits[at + 1 :])]


def swapped(text: str, edits: Sequence[Edit], at: int) -> list[str]:
    """Give the texts after each step if steps `at` and `at + 1` (from 0) change places."""
    return run_edits(text, [*edits[:at], edits[at + 1], edits[at], *edits[at + 2 :]])


def skip_at_random(
    generator: random.Random, text: str, edits: Sequence[Edit], chance: float
) -> list[str]:
    """Give the texts of one who skips each step by chance and goes on from what there is."""
    found = []
    for edit in edits:
        if generator.random() >= chance:
            text = run_edits(text, [edit])[0]
        found.append(text)
    return found


@dataclass(frozen=True)
class Strength:
    """How much the steps of chains need each other; shares, 0 to 1.

    `omission`: of steps whose omission makes the final check fail. `necessary`: of samples in which
    that is so of every step. `linked`: of steps aimed at a word that an earlier one brought in.
    `order`: of pairs of adjacent steps whose exchange changes the final text. `idle`: of steps that
    change nothing. `absent`: of steps whose word is not there.
    """

    samples: int
    omission: float
    necessary: float
    linked: float
    order: float
    idle: float
    absent: float


def chain_strength(samples: Sequence[SifoSample]) -> Strength:
    """Measure chains of text modification.

    Source:
        SIFo's data as measured for the specification (section 2.1): .931, .765, .2975, .39, 1/800.
    """
    omitted: list[bool] = []
    necessary: list[bool] = []
    linked: list[bool] = []
    order: list[bool] = []
    idle: list[bool] = []
    absent: list[bool] = []
    for sample in samples:
        edits = [read_edit(step) for step in sample.steps]
        right = run_edits(sample.context, edits)
        fails = [
            not _holds(skipped(sample.context, edits, i)[-1], right[-1]) for i in range(len(edits))
        ]
        omitted += fails
        necessary.append(all(fails))
        for i, edit in enumerate(edits):
            here = right[i - 1] if i else sample.context
            idle.append(right[i] == here)
            absent.append(edit.word not in (here.split() if edit.kind == "delete" else here))
            linked.append(any(edit.word in earlier.new.split() for earlier in edits[:i]))
        order += [
            normalise("text", swapped(sample.context, edits, i)[-1]) != normalise("text", right[-1])
            for i in range(len(edits) - 1)
        ]
    parts = (omitted, necessary, linked, order, idle, absent)
    return Strength(len(samples), *(sum(part) / max(1, len(part)) for part in parts))


def predicted(strength: Strength, chance: float, steps: int) -> float:
    """Give the final accuracy to expect if each of n steps is skipped by chance p: (1 - s p)^n."""
    return (1 - strength.omission * chance) ** steps


def _holds(answer: str, gold: str) -> bool:
    return normalise("text", gold).lower() in normalise("text", answer).lower()
