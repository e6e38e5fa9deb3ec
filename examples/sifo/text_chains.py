"""Chains of lexical edits, made of any text: SIFo's text modification."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lexicons import HALVES, Lexicon, half_of
from samples import SifoSample, opened
from simulators import Edit, TextModState

from recipes_peft import assets, boolq
from recipes_peft.errors import UserError

__all__ = ["SENTENCE_END", "instruction", "make", "sentences", "toy_sentences"]

SENTENCE_END = re.compile(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])")
# The official mix of edits, in steps of 800 (specification, section 2.1).
_MIX = {"delete": 274, "replace": 262, "before": 134, "after": 130}
# How often an edit is aimed at a word that an earlier one brought in, where there is one.
_LINKED = 0.5
_WORDING = {
    "delete": 'Delete all occurrences of the word "{word}" in the current text.',
    "replace": 'Replace all occurrences of the word "{word}" with "{new}" in the current text.',
    "before": 'Insert the word "{new}" before all occurrences of "{word}" in the current text.',
    "after": 'Insert the word "{new}" after all occurrences of "{word}" in the current text.',
}
_END = " Give the whole resulting text."


@dataclass(frozen=True)
class _Draw:
    edit: Edit
    linked: bool


def make(
    generator: random.Random, lexicon: Lexicon, texts: Sequence[str], steps: int
) -> SifoSample:
    """Make a chain of edits that starts from one of the texts.

    The words to edit are drawn from the current text, those to put in are foreign to it. What an
    insertion brought in is not deleted again: both steps would then be for nothing.

    Raises:
        UserError: none of 100 texts that were drawn has words for all edits.
    """
    for _ in range(100):
        text = generator.choice(texts)
        state, draws, golds = TextModState(text), [], []
        foreign = [word for word in lexicon.foreign if word.lower() not in text.lower()]
        if len(foreign) < steps:
            continue
        news = generator.sample(foreign, steps)
        for new in news:
            draw = _draw(generator, state, new, [d.edit for d in draws])
            if draw is None:
                break
            state = state.after(draw.edit)
            draws.append(draw)
            golds.append(state.text)
        if len(draws) == steps:
            linked = sum(draw.linked for draw in draws)
            worded = tuple(instruction(draw.edit) for draw in draws)
            meta = {"linked": linked, "edits": tuple(draw.edit for draw in draws)}
            return SifoSample("text_modification", worded, tuple(golds), text, meta)
    raise UserError(
        f"no chain of {steps} edits can be made of the texts; give longer ones with --text"
    )


def instruction(edit: Edit) -> str:
    """Ask for an edit."""
    return _WORDING[edit.kind].format(word=edit.word, new=edit.new) + _END


def _draw(
    generator: random.Random, state: TextModState, new: str, before: Sequence[Edit]
) -> _Draw | None:
    """Draw an edit of the current text; None if it has no word for it."""
    kind = generator.choices(list(_MIX), weights=list(_MIX.values()))[0]
    brought = [
        edit.new
        for edit in before
        if edit.new
        and (kind != "delete" or edit.kind == "replace")
        and state.has(Edit(kind, edit.new))
    ]
    if brought and generator.random() < _LINKED:
        return _Draw(Edit(kind, generator.choice(brought), new if kind != "delete" else ""), True)
    all_new = {edit.new for edit in before}
    words = [w for w in _words(state.text, kind) if w not in all_new]
    if not words:
        return None
    return _Draw(Edit(kind, generator.choice(words), new if kind != "delete" else ""), False)


def _words(text: str, kind: str) -> list[str]:
    """Give the words that an edit of this kind may be aimed at, in the order of the text."""
    tokens = text.split()
    bare = [token.strip(string.punctuation) for token in tokens]
    if kind == "delete":
        # One at either end only can be left in without the comparison noticing.
        return [t for t, b in zip(tokens[1:-1], bare[1:-1], strict=True) if t == b and t.isalnum()]
    return [word for word in bare if len(word) > 2 and word.isalnum()]


# ---- texts --------------------------------------------------------------------------------------


def sentences(source: str, half: str, least: int, most: int) -> list[str]:
    """Give sentences of `least` to `most` words of one half of a source.

    `boolq`: paragraphs of Wikipedia, halved by article; `toy`: made up; else a text file, halved by
    paragraph. Two sentences of one paragraph are joined where one is too short.

    Raises:
        UserError: the source cannot be read or has no such sentence.
    """
    if source == "toy":
        return toy_sentences(half, least, most)
    if source == "boolq":
        parts = [(e.group, e.answer) for e in boolq.passages(assets.fetch("boolq"))]
        parts = [(group, text.partition(" -- ")[2] or text) for group, text in parts]
    else:
        # headings of WikiText stand between equals signs
        paragraphs = re.split(r"\n\s*\n|(?m:^ *=.*= *$)", opened(Path(source)))
        parts = [(p, " ".join(p.split())) for p in paragraphs]
    ours = [text for group, text in parts if half_of(group) == half]
    found = [s for text in ours for s in _pieces(text, least, most)]
    if not found:
        raise UserError(
            f"{source} has no sentence of {least} to {most} words for the half {half}; give more"
            " text with --text, or other lengths"
        )
    return found


def _pieces(text: str, least: int, most: int) -> Iterable[str]:
    whole = SENTENCE_END.split(text)
    held: list[str] = []
    for sentence in whole:
        held = [*held, sentence]
        count = sum(len(s.split()) for s in held)
        if least <= count <= most and '"' not in "".join(held) and "<unk>" not in "".join(held):
            yield " ".join(held)
        if count >= least:
            held = []


_SUBJECTS = (
    "the old ferry", "a keeper of the lighthouse", "the baker and his son", "every second train",
    "the northern road", "the choir of the village", "a map of the coast", "the river",
    "the last tenant", "a flock of geese", "the mill", "the harbour master",
)  # fmt: skip
_VERBS = (
    "carried letters to", "had never seen", "was painted in the colours of", "stood opposite",
    "owed its name to", "led from the market to", "was kept in", "returned every spring to",
    "was heard as far as", "took the place of",
)  # fmt: skip
_OBJECTS = (
    "the island in the bay", "a small garden behind the church", "the house of the doctor",
    "the bridge over the canal", "a school for sailors", "the town on the other shore",
    "the vineyards of the valley", "a cottage at the edge of the wood",
    "the square", "the old quay",
)  # fmt: skip


def toy_sentences(half: str, least: int, most: int, count: int = 400) -> list[str]:
    """Make up sentences; the halves have no subject in common.

    Raises:
        UserError: the lengths allow for none.
    """
    generator = random.Random(f"toy {half}")
    subjects = _SUBJECTS[HALVES.index(half) :: 2]
    found: list[str] = []
    for _ in range(20 * count):
        clauses: list[str] = []
        wanted = generator.randint(least, most)
        while sum(len(clause.split()) for clause in clauses) + len(clauses) < wanted:
            parts = (subjects, _VERBS, _OBJECTS)
            clauses.append(" ".join(generator.choice(part) for part in parts))
        text = " while ".join(clauses)
        if least <= len(text.split()) <= most:
            found.append(f"{text[0].upper()}{text[1:]}.")
        if len(found) == count:
            break
    if not found:
        raise UserError(f"no sentence of {least} to {most} words can be made up; allow for more")
    return found
