"""Text to train on: read files, hold some out, write prompts, and make batches.

The loss counts the answer only. Batches are padded on the left, so the answers stand at the end of
every row and logits are computed for these few columns alone; with a large vocabulary that is much
of the work.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError

from recipes_peft.errors import UserError

__all__ = [
    "Encoded",
    "Example",
    "batches",
    "collate",
    "encode",
    "paragraph_titles",
    "read",
    "split",
]


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; examples of one group never stand on both sides of a split."""

    prompt: str
    answer: str
    group: str
    instruction: str = ""
    raw: bool = False  # the prompt is plain text to continue, without a template
    label: str = ""  # the bare result, where the answer explains it


class Encoded(NamedTuple):
    prompt: list[int]
    answer: list[int]


def read(path: Path, instruction: str = "") -> list[Example]:
    """Read examples from a file; `instruction` is for those that have none of their own.

    `.jsonl`, a JSON object per line, or `.json`, a list of them: `prompt` and `answer`; or
    `instruction`, `output`, perhaps `input`, and perhaps the bare result as `answer`; or GSM8K's
    `question` and `answer`, whose `####` becomes words. Any other file is plain text: paragraphs
    between blank lines, each to be continued from its middle.

    Raises:
        UserError: the file cannot be read, is empty, or a row lacks a field; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason}); convert it") from error
    except OSError as error:
        raise UserError(f"cannot read the data {path} ({error.strerror}); give a file") from error
    if path.suffix == ".jsonl":
        lines = text.split("\n")
        rows = [
            (f"{path}, line {i}", _json(line, f"{path}, line {i}"))
            for i, line in enumerate(lines, 1)
            if line.strip()
        ]
    elif path.suffix == ".json":
        content = _json(text, str(path)) if text.strip() else []
        if not isinstance(content, list):
            raise UserError(
                f"{path} holds no list; give a list of objects, or one per line (.jsonl)"
            )
        rows = [(f"{path}, row {i}", row) for i, row in enumerate(content, 1)]
    else:
        found = [e for p in re.split(r"\n\s*\n", text) if (e := _paragraph(p))]
        if not found:
            raise UserError(
                f"{path} holds no paragraph of two words or more; give text, or examples as .jsonl"
            )
        return found
    if not rows:
        raise UserError(f"{path} is empty; give a line such as {{'prompt': '..', 'answer': '..'}}")
    made = [_row(row, where) for where, row in rows]
    return [replace(e, instruction=e.instruction or instruction) for e in made]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg}, column {error.colno}); correct it, or give plain"
            " text a name that ends in .txt"
        ) from error


def _row(row: Any, where: str) -> Example:
    def text(key: str) -> str | None:
        value = row.get(key) if isinstance(row, dict) else None
        return value if isinstance(value, str) and value.strip() else None

    prompt = text("prompt") or text("question") or text("instruction")
    answer, label = text("answer") or text("output"), ""
    if isinstance(row, dict) and text("instruction"):
        # Collections with these names use `answer` for the bare label.
        answer, label = text("output"), text("answer") or ""
    elif answer and text("question"):
        explained, mark, result = answer.rpartition("####")
        if mark:
            label = result.strip()
            answer = f"{explained}The final answer is: {label}"
    if not prompt or not answer:
        raise UserError(
            f"{where} lacks a prompt or an answer; it needs the fields 'prompt' and 'answer', or"
            " 'instruction' and 'output', with text in them"
        )
    if extra := text("input"):
        return Example(extra, answer, group=extra, instruction=prompt, label=label)
    return Example(prompt, answer, group=prompt, label=label)


def _paragraph(text: str) -> Example | None:
    words = text.split()
    if len(words) < 2:
        return None
    middle = len(words) // 2
    first = " ".join(words[:middle])
    return Example(first, " " + " ".join(words[middle:]), group=" ".join(words), raw=True)


def paragraph_titles(path: Path, instruction: str, characters: int = 240) -> list[Example]:
    """Make examples (start of an encyclopedia paragraph, its title) from a file of BoolQ.

    Kept are paragraphs whose first sentences, up to `characters`, contain the title.
    """
    found: dict[str, Example] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        title, _, body = json.loads(line)["passage"].partition(" -- ")
        title = title.split(" (")[0].strip()
        start = ""
        for sentence in re.split(r"(?<=[a-z0-9)'\"][.!?])\s+(?=[A-Z`\"(])", body):
            if len(start) + len(sentence) > characters:
                break
            start = f"{start} {sentence}".strip()
        if len(start) >= 60 and title and title.lower() in start.lower():
            found.setdefault(start, Example(start, title, group=title, instruction=instruction))
    return list(found.values())


def split(
    examples: Sequence[Example], held_out: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Give the examples to train on, shuffled by the seed, and those held out, the same always.

    Whole groups are held out, chosen by a checksum, at most a quarter of all examples.

    Raises:
        UserError: there are too few examples to hold any out.
    """

    def order(example: Example) -> str:
        return hashlib.sha256(example.group.encode()).hexdigest()

    wanted = min(held_out, len(examples) // 4)
    ranked = sorted(examples, key=order)
    kept_out = {example.group for example in ranked[:wanted]}
    train = [example for example in examples if example.group not in kept_out]
    if not wanted or not train:
        raise UserError(
            f"{len(examples)} examples are too few to hold some out for a test; give at least 4,"
            " with different prompts"
        )
    random.Random(seed).shuffle(train)
    return train, ranked[:wanted]


def encode(example: Example, tokenizer: Any, max_length: int) -> Encoded:
    """Give the tokens of the prompt, in the model's chat template if any, and of the answer.

    Too long a prompt loses its beginning, too long an answer its end.
    """
    if example.raw:
        prompt = tokenizer(example.prompt).input_ids
    elif tokenizer.chat_template:
        text = _chat(example, tokenizer)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
    else:
        blocks = [example.instruction, example.prompt, "### Response:\n"]
        prompt = tokenizer("\n\n".join(block for block in blocks if block)).input_ids
    answer = tokenizer(example.answer + tokenizer.eos_token, add_special_tokens=False).input_ids
    answer = answer[: max(1, max_length - 1)]
    return Encoded(prompt[-max(1, max_length - len(answer)) :], answer)


def _chat(example: Example, tokenizer: Any) -> str:
    user = {"role": "user", "content": example.prompt}
    system = {"role": "system", "content": example.instruction}
    options = {"tokenize": False, "add_generation_prompt": True}
    if not example.instruction:
        return tokenizer.apply_chat_template([user], **options)
    try:
        return tokenizer.apply_chat_template([system, user], **options)
    except TemplateError:
        # Some templates know no system role.
        user["content"] = f"{example.instruction}\n\n{example.prompt}"
        return tokenizer.apply_chat_template([user], **options)


def collate(rows: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Make a batch.

    Shapes:
        input_ids, attention_mask, position_ids: (rows, longest row). labels: (rows, k), for the
        last k = logits_to_keep columns: the longest answer and the column before it.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    keep = max(len(answer) for _, answer in rows) + 1
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(rows), keep), -100)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, length - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        mask[i, length - len(prompt) - len(answer) :] = 1
        labels[i, keep - len(answer) :] = torch.tensor(answer)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        # models with learned positions count from the first column unless they are told
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": labels,
        "logits_to_keep": keep,
    }


def batches(rows: Sequence[Encoded], size: int, pad: int) -> Iterator[dict[str, Any]]:
    """Give batches of rows of about the same length."""
    ranked = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))
    for start in range(0, len(ranked), size):
        yield collate(ranked[start : start + size], pad)
