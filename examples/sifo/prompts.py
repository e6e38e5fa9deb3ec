"""What a model is asked, all instructions of a chain at once, and what it is to write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from samples import SifoSample

from recipes_peft import data
from recipes_peft.data import Encoded, Example

__all__ = ["answer", "encode", "prompt", "prompt_length"]

SYSTEM = "You are a careful assistant. Be useful, truthful and brief."
_TASK = (
    "{Below} numbered instructions. Carry them out in order; each may need the result of the one"
    " before. Do not explain anything. Reply with one JSON object that has a key Instruction_1,"
    " Instruction_2 and so on for every instruction, and as its value the result."
)


def prompt(sample: SifoSample) -> str:
    """Write the user's message: the task, the context if there is one, the instructions."""
    below = "Below are a context and" if sample.context else "Below are"
    context = [f"Context: {sample.context}"] if sample.context else []
    steps = [f"Instruction_{number}. {step}" for number, step in enumerate(sample.steps, 1)]
    return "\n".join([_TASK.format(Below=below), *context, *steps, ""])


def answer(golds: Sequence[str]) -> str:
    """Write the response that is all right."""
    numbered = {f"Instruction_{number}": gold for number, gold in enumerate(golds, 1)}
    return json.dumps(numbered, ensure_ascii=False)


def encode(sample: SifoSample, tokenizer: Any, max_length: int) -> Encoded:
    """Give the tokens of a prompt in the model's chat template, and of the right response.

    The template opens the assistant's turn. Source: section 3 of the specification; the official
    code does not do so for Llama-3.
    """
    example = Example(prompt(sample), answer(sample.golds), "", SYSTEM)
    return data.encode(example, tokenizer, max_length)


def prompt_length(sample: SifoSample, tokenizer: Any) -> int:
    """Give the number of tokens of a prompt."""
    return len(encode(sample, tokenizer, 10**9).prompt)
