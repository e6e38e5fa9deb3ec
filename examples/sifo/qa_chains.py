"""Questions about a passage that is revised after each: made up, or from SQuAD's files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexicons import Lexicon, half_of
from samples import SifoSample, opened
from text_chains import SENTENCE_END

from recipes_peft.errors import UserError

__all__ = ["Passage", "from_passage", "make", "passages"]

_KINDS = ("town hall", "library", "museum", "railway station")
_MOST_VALUES = 200  # that an answer may be changed into
_ASKED_AGAIN = 0.5  # how often a question is about what a revision changed
_REVISE = (
    "Suppose the answer to the previous instruction were {value} instead. Give the whole passage"
    " with that change and no other."
)


class Passage(NamedTuple):
    """A passage and questions whose answers stand in it once; what each may be changed into.

    `paragraph` is what it was taken from, "" if it is made up.
    """

    text: str
    questions: tuple[tuple[str, str, tuple[str, ...]], ...]  # question, answer, other answers
    paragraph: str = ""


def make(generator: random.Random, lexicon: Lexicon, steps: int) -> SifoSample | None:
    """Make a chain about a building that there is not; of `steps`, rounded up to pairs."""
    facts = lexicon.facts
    told = {"kind": generator.choice(_KINDS), "place": generator.choice(lexicon.places)}
    chosen = [facts[0], *sorted(generator.sample(facts[1:], 3), key=facts.index)]
    sentences, questions = [], []
    for fact in chosen:
        value = generator.choice(fact.values)
        sentences.append(fact.sentence.format(**told, value=value))
        questions.append((fact.question.format(**told), value, fact.values))
    return from_passage(generator, Passage(" ".join(sentences), tuple(questions)), steps)


def from_passage(generator: random.Random, passage: Passage, steps: int) -> SifoSample | None:
    """Ask about a passage and revise it in turn.

    Odd steps ask, even ones revise; a later question may be about what was revised, so that its
    answer is the revised one. Every revision starts from those before. Where the other answers are
    used up, the chain ends early; None if it does so at once.
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
        kept = [answer for asks, answer in current.items() if asks != question]
        return [
            value
            for value in others[question]
            if value.lower() not in seen
            and not any(part in value.lower() for part in inside)
            and all(text.replace(current[question], value).count(answer) == 1 for answer in kept)
        ]

    for _ in range((steps + 1) // 2):
        again = [question for question in asked if unused(question)]
        while fresh and not unused(fresh[-1]):
            fresh.pop()
        if again and (not fresh or generator.random() < _ASKED_AGAIN):
            question = generator.choice(again)
            linked += 1
        elif fresh:
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
    if not made:
        return None
    return SifoSample("qa", tuple(made), tuple(golds), passage.text, {"linked": linked})


# ---- real passages ------------------------------------------------------------------------------


class _Asked(NamedTuple):
    question: str
    answer: str
    start: int  # of the answer in the paragraph


def passages(path: Path, most_words: int, half: str) -> list[Passage]:
    """Read passages from a file in SQuAD's format (SQuAD, XQuAD), at most `most_words` long.

    Of a longer paragraph sentences side by side are taken, as many as fit and have two answers that
    occur once in them, where the file says. What an answer may be changed into are answers of its
    kind (numbers, names, other words) in the file, of one half: the halves share none.

    Raises:
        UserError: the file is of another format or gives no passage.
    """
    try:
        content: Any = json.loads(opened(path))
        paragraphs = [
            (p["context"], [_asked(qa["question"], qa["answers"][0]) for qa in p["qas"]])
            for article in content["data"]
            for p in article["paragraphs"]
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is not in SQuAD's format ({error!r}); give such a file") from error
    answers = sorted({one.answer for _, asked in paragraphs for one in asked})
    random.Random(0).shuffle(answers)
    kinds: dict[str, list[str]] = {}
    for answer in answers:
        if answer and half_of(answer) == half:
            kinds.setdefault(_kind(answer), []).append(answer)
    found = [
        passage
        for text, asked in paragraphs
        if (passage := _window(text, asked, kinds, most_words))
    ]
    if not found:
        raise UserError(
            f"{path} has no passage of at most {most_words} words with two answers; allow for more"
        )
    return found


def _asked(question: str, answer: dict[str, Any]) -> _Asked:
    bare = answer["text"].strip(" .,;")
    return _Asked(question, bare, answer["answer_start"] + answer["text"].index(bare))


def _window(
    text: str, asked: Sequence[_Asked], kinds: dict[str, list[str]], most: int
) -> Passage | None:
    """Give the first run of sentences with two answers or more that do not overlap."""
    breaks = list(SENTENCE_END.finditer(text))
    ends = [*(match.start() for match in breaks), len(text)]
    for number, start in enumerate([0, *(match.end() for match in breaks)]):
        for end in reversed(ends[number:]):
            piece = text[start:end]
            if len(piece.split()) > most:
                continue
            shown = []
            for one in _apart([one for one in asked if _once(piece, one, start)]):
                others = [v for v in kinds.get(_kind(one.answer), []) if v != one.answer]
                if others:
                    shown.append((one.question, one.answer, tuple(others[:_MOST_VALUES])))
            if len(shown) >= 2:
                return Passage(piece, tuple(shown), text)
            break
    return None


def _once(piece: str, one: _Asked, start: int) -> bool:
    """Say whether an answer is in a piece that begins at `start`: there and nowhere else."""
    at = one.start - start
    return bool(one.answer) and at >= 0 and piece.find(one.answer) == piece.rfind(one.answer) == at


def _apart(asked: Sequence[_Asked]) -> list[_Asked]:
    """Give questions whose answers do not overlap, the longest answers first."""
    kept: list[_Asked] = []
    for one in sorted(asked, key=lambda one: -len(one.answer)):
        if all(
            one.start + len(one.answer) <= other.start
            or other.start + len(other.answer) <= one.start
            for other in kept
        ):
            kept.append(one)
    return kept


def _kind(answer: str) -> str:
    if re.search(r"\d", answer):
        return "number"
    return "name" if answer[:1].isupper() else "words"
