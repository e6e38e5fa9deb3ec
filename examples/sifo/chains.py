"""The chains of all four tasks: to train on, and held out, from halves that share nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import math_chains
import qa_chains
import security_chains
import text_chains
from contamination import Tested
from lexicons import HALVES, lexicon
from samples import SifoSample

from recipes_peft import data
from recipes_peft.data import Example
from recipes_peft.errors import UserError

__all__ = ["Chains"]

LEAST = 2  # steps of a chain
T = TypeVar("T")


class Chains:
    """Makes chains of one half, the same ones for the same numbers.

    Lengths are drawn evenly from `least` to `most` steps; for `qa` they are rounded up to pairs. A
    file of real problems or passages takes the place of what is made up; a quarter is tested.

    Of `tested`, samples that are tested beside them, words, sentences, problems and passages are
    left out; `left_out` counts all but the words, by option.

    Raises:
        UserError: a file cannot be used, or nothing is left of it.
    """

    def __init__(self, half: str, given: Any, tested: Sequence[SifoSample] = ()) -> None:
        self.half, self.given = half, given
        avoid = (text for s in tested for text in (s.context, *s.steps, *s.golds))
        self.lexicon = lexicon(half, given.seed, avoid)
        texts = text_chains.sentences(given.text, half, given.least_words, given.most_words)
        problems = _part(
            math_chains.from_answers(
                Path(given.math), LEAST, max(given.train_steps, given.test_steps)
            )
            if given.math != "made"
            else [],
            half,
            lambda sample: sample.steps[0],
        )
        passages = _part(
            qa_chains.passages(Path(given.qa), given.most_passage_words, half)
            if given.qa != "made"
            else [],
            half,
            lambda passage: passage.text,
        )
        self.left_out: dict[str, int] = {}
        known = Tested(tested)
        self.texts = self._new("text", texts, known.has)
        self.problems = self._new("math", problems, lambda s: known.has(s.meta["question"]))
        self.passages = self._new("qa", passages, lambda passage: known.has(passage.paragraph))

    def _new(self, option: str, things: list[T], tested: Callable[[T], bool]) -> list[T]:
        kept = [thing for thing in things if not tested(thing)]
        self.left_out[option] = len(things) - len(kept)
        if things and not kept:
            raise UserError(
                f"all that --{option} has for the half {self.half} occurs in --data; give another"
                f" --{option}"
            )
        return kept

    def make(self, task: str, count: int, most: int, least: int = LEAST) -> list[SifoSample]:
        """Make chains of a task, none twice; fewer if there are not as many.

        Raises:
            UserError: there is none.
        """
        generator = random.Random(f"{self.given.seed} {self.half} {task}")
        found: dict[tuple[str, ...], SifoSample] = {}
        for number in range(3 * count):
            if len(found) == count:
                break
            sample = self._one(task, generator, number, most, least)
            if sample is not None:
                found.setdefault((sample.context, *sample.steps), sample)
        if not found:
            raise UserError(
                f"there is no chain of {task} with {least} to {most} steps for the half"
                f" {self.half}; give more text, problems or passages, or allow for longer chains"
            )
        return list(found.values())

    def _one(
        self, task: str, generator: random.Random, number: int, most: int, least: int
    ) -> SifoSample | None:
        steps = generator.randint(least, most)
        if task == "text_modification":
            return text_chains.make(generator, self.lexicon, self.texts, steps)
        if task == "security":
            return security_chains.make(generator, self.lexicon, steps)
        if task == "qa" and self.passages:
            return qa_chains.from_passage(generator, generator.choice(self.passages), steps)
        if task == "qa":
            return qa_chains.make(generator, self.lexicon, steps)
        if self.problems:
            sample = self.problems[number % len(self.problems)]
            return sample if least <= len(sample.steps) <= most else None
        return math_chains.make(generator, self.lexicon, steps)


def _part(things: list[Any], half: str, text: Callable[[Any], str]) -> list[Any]:
    """Give what of these things is to be trained on, three quarters by checksum, or tested."""
    if not things:
        return []
    numbered = [Example(str(i), "", text(thing)) for i, thing in enumerate(things)]
    parts = data.split(numbered, max(1, len(things) // 4), 0)
    return [things[int(e.prompt)] for e in parts[HALVES.index(half)]]
