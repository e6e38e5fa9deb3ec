"""Questions about a passage that is revised after each: made up, or from SQuAD's files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexicons import Lexicon
from samples import SifoSample, opened

from recipes_peft.errors import UserError

__all__ = ["Passage", "from_passage", "make", "passages"]

_KINDS = ("town hall", "library", "museum", "railway station")
_ASKED_AGAIN = 0.5  # how often a question is about what a revision changed
_REVISE = (
    "Suppose the answer to the previous instruction were {value} instead. Give the whole passage"
    " with that change and no other."
)


class Passage(NamedTuple):
    """A passage and questions whose answers stand in it once; what each may be changed into."""

    text: str
    questions: tuple[tuple[str, str, tuple[str, ...]], ...]  # question, answer, other answers


def make(generator: random.Random, lexicon: Lexicon, steps: int) -> SifoSample:
    """Make a chain about a building that there is not; of `steps`, rounded up to pairs."""
    facts = [f for f in lexicon.facts if len(f.values) > 2]
    told = {"kind": generator.choice(_KINDS), "place": generator.choice(lexicon.places)}
    chosen = [facts[0], *sorted(generator.sample(facts[1:], 3), key=facts.index)]
    sentences, questions = [], []
    for fact in chosen:
        value = generator.choice(fact.values)
        sentences.append(fact.sentence.format(**told, value=value))
        questions.append((fact.question.format(**told), value, fact.values))
    return from_passage(generator, Passage(" ".join(sentences), tuple(questions)), steps)


def from_passage(generator: random.Random, passage: Passage, steps: int) -> SifoSample:
    """Ask about a passage and revise it in turn.

    Odd steps ask, even ones revise; a later question may be about what was revised, so that its
    answer is the revised one. Every revision starts from those before. Where the other answers are
    used up, the chain ends early.
    """
    text = passage.text
    current = {question: answer for question, answer, _ in passage.questions}
    others = {question: values for question, _, values in passage.questions}
    fresh = generator.sample(list(current), len(current))
    asked: list[str] = []
    made: list[str] = []
    golds: list[str] = []
    linked = 0

    def unused(question: str) -> list[str]:
        # nothing comes back, and no later revision finds its answer within this one
        seen = "\n".join([passage.text, *golds]).lower()
        inside = [answer.lower() for answer in current.values()]
        return [
            value
            for value in others[question]
            if value.lower() not in seen and not any(part in value.lower() for part in inside)
        ]

    for _ in range((steps + 1) // 2):
        again = [question for question in asked if unused(question)]
        if again and (not fresh or generator.random() < _ASKED_AGAIN):
            question = generator.choice(again)
            linked += 1
        elif fresh and unused(fresh[-1]):
            question = fresh.pop()
        else:
            break
        asked.append(question)
        answer, new = current[question], generator.choice(unused(question))
        made.append(f"According to the current passage: {question}")
        golds.append(answer)
        text = text.replace(answer, new)
        made.append(_REVISE.format(value=f'"{new}"'))
        golds.append(text)
        current[question] = new
    meta = {"linked": linked}
    return SifoSample("qa", tuple(made), tuple(golds), passage.text, meta)


# ---- real passages ------------------------------------------------------------------------------


def passages(path: Path, most_words: int) -> list[Passage]:
    """Read passages from a file in SQuAD's format (SQuAD, XQuAD), at most `most_words` long.

    Of a longer paragraph sentences side by side are taken, as many as fit and have two answers that
    occur once in them. What an answer may be changed into are answers of its kind (numbers, names,
    other words) from other paragraphs.

    Raises:
        UserError: the file is of another format or gives no passage.
    """
    try:
        content: Any = json.loads(opened(path))
        paragraphs = [p for article in content["data"] for p in article["paragraphs"]]
        asked = [
            [(qa["question"], qa["answers"][0]["text"].strip(" .,;")) for qa in p["qas"]]
            for p in paragraphs
        ]
        texts = [p["context"] for p in paragraphs]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is not in SQuAD's format ({error!r}); give such a file") from error
    answers = sorted({answer for pairs in asked for _, answer in pairs if answer})
    kinds: dict[str, list[str]] = {}
    for answer in answers:
        kinds.setdefault(_kind(answer), []).append(answer)
    found = [
        passage
        for text, pairs in zip(texts, asked, strict=True)
        if (passage := _window(text, pairs, kinds, most_words))
    ]
    if not found:
        raise UserError(
            f"{path} has no passage of at most {most_words} words with two answers; allow for more"
        )
    return found


def _window(
    text: str, pairs: Sequence[tuple[str, str]], kinds: dict[str, list[str]], most: int
) -> Passage | None:
    """Give the first run of sentences with two answers or more that do not overlap."""
    whole = re.split(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])", text)
    for start in range(len(whole)):
        for end in range(len(whole), start, -1):
            piece = " ".join(whole[start:end])
            if len(piece.split()) > most:
                continue
            inside = [(q, a) for q, a in pairs if a and piece.lower().count(a.lower()) == 1]
            apart = {
                answer: question
                for question, answer in inside
                if not any(answer in other and answer != other for _, other in inside)
            }
            if len(apart) >= 2:
                shown = tuple(
                    (question, answer, tuple(v for v in kinds[_kind(answer)] if v != answer)[:200])
                    for answer, question in apart.items()
                )
                return Passage(piece, shown)
            break
    return None


def _kind(answer: str) -> str:
    if re.search(r"\d", answer):
        return "number"
    return "name" if answer[:1].isupper() else "words"
