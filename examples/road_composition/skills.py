"""Skills that can be seen in an answer: what to train on, and whether a text shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from recipes_peft import assets, data, tiny
from recipes_peft.data import Example
from recipes_peft.errors import UserError, explained

CUT = " ..."  # ends a text that was cut off
LONGEST = 20  # signs of a title
ALIKE = 0.8  # how much of two titles must agree: a slip of spelling is none of the skill

# function words that the other language does not have
GERMAN = (
    "der die das und ist ein eine einen einem einer nicht mit zu auf für von den dem des sich auch"
    " im es er sie ich wir ihr werden wird sind kann haben bei aus nach oder wie um zum zur durch"
    " dann noch nur über"
)
ENGLISH = (
    "the and is of to a an that it for on with as are be this by from or at you your can have has"
    " not they he she his her their its which were but if then"
)


def in_capitals(text: str) -> bool:
    """Tell whether nine tenths of the letters are capitals, and there are three at least."""
    letters = [sign for sign in text if sign.isalpha()]
    return len(letters) >= 3 and sum(map(str.isupper, letters)) >= 0.9 * len(letters)


def is_title(text: str, title: str) -> bool:
    """Tell whether the text is the title, but for case and a slip or two, and has ended."""
    said, wanted = (t.casefold().strip(" \n\"'`.") for t in (text, title))
    return ended(text) and SequenceMatcher(None, said, wanted).ratio() >= ALIKE


def in_german(text: str) -> bool:
    """Tell whether a text has German function words, two at least, and more than English ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    german, english = (sum(w in known.split() for w in words) for known in (GERMAN, ENGLISH))
    return german >= 2 and german > english


def ended(text: str) -> bool:
    """Tell whether the model ended the text itself."""
    return not text.endswith(CUT)


@dataclass(frozen=True)
class Skill:
    """What an example's answer is for this skill, whether it ends, and how it is recognised."""

    answer: Callable[[Example], str]
    ends: bool
    shows: Callable[[str, Example], bool]


@dataclass(frozen=True)
class Task:
    """Two skills, in the order of the halves, and the answer that shows both, if there is one."""

    skills: Mapping[str, Skill]
    both: Callable[[Example], str] | None


TASKS = {
    "titles": Task(
        {
            "capitals": Skill(
                answer=lambda example: example.prompt.upper(),
                ends=False,
                shows=lambda text, example: in_capitals(text),
            ),
            "title": Skill(
                answer=lambda example: example.answer,
                ends=True,
                shows=lambda text, example: is_title(text, example.answer),
            ),
        },
        both=lambda example: example.answer.upper(),
    ),
    "german": Task(
        {
            "german": Skill(
                answer=lambda example: example.answer,
                ends=False,
                shows=lambda text, example: in_german(text),
            ),
            "instruction": Skill(
                answer=lambda example: example.answer,
                ends=True,
                shows=lambda text, example: ended(text),
            ),
        },
        both=None,
    ),
}


def read(name: str, instruction: str, template: str | None) -> list[Example]:
    """Give examples by name: `titles`, `tiny`, a file's, or a data set's by its hub id.

    With a `template` the prompt stands in it for {prompt}; else the model's chat template is used.

    Raises:
        UserError: there is no such file or data set, or its rows are of another form.
    """
    if name == "titles":
        found = data.paragraph_titles(assets.fetch("boolq"), instruction, characters=160)
        # a title in capitals shows both skills at once; a long one would be cut off in training
        found = [e for e in found if any(map(str.islower, e.answer)) and len(e.answer) <= LONGEST]
    elif name == "tiny":
        found = tiny.examples()
    elif Path(name).exists() or Path(name).suffix in (".json", ".jsonl", ".txt"):
        found = _file(Path(name))
    else:
        found = [german_row(row) for row in _hub(name)]
    found = [replace(e, instruction=e.instruction or instruction) for e in found]
    if template is None:
        return found
    return [replace(e, prompt=template.format(prompt=_asked(e)), raw=True) for e in found]


def german_row(row: Mapping[str, Any]) -> Example:
    """Make an example of a row of HellaSwag_de: an English beginning and its German end.

    A row of fewer than four ends gives its last one.

    Raises:
        UserError: the row has other fields.
    """
    try:
        ends, prompt = row["endings_de"], row["ctx"]
        answer = ends[int(row["label"])] if len(ends) >= 4 else ends[-1]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"a row has the fields {', '.join(row)}; rows of HellaSwag_de have ctx, endings_de and"
            " label, others need the fields prompt and answer"
        ) from error
    return Example(prompt, answer, group=prompt)


def _asked(example: Example) -> str:
    return "\n".join(part for part in (example.instruction, example.prompt) if part)


def _file(path: Path) -> list[Example]:
    if path.suffix == ".jsonl" and path.is_file():
        with path.open(encoding="utf-8") as lines:
            first = next(lines, "")
        if '"endings_de"' in first:
            text = path.read_text(encoding="utf-8")
            return [german_row(json.loads(line)) for line in text.split("\n") if line.strip()]
    return data.read(path)


def _hub(name: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"{name!r} is no file, and a data set of the hub needs: pip install datasets"
        ) from error
    hint = "; give a .jsonl or .json file, the id of a data set on the hub, titles or tiny"
    with explained(OSError, ValueError, before=f"cannot load the data {name!r}: ", after=hint):
        return load_dataset(name, split="train")
