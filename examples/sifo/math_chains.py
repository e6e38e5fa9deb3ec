"""Chains of arithmetic: made up, or cut out of worked answers to word problems."""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lexicons import Lexicon
from samples import SifoSample, json_lines

from recipes_peft.errors import UserError

__all__ = ["calculate", "from_answers", "from_problem", "make"]

_LARGEST = 5000

# what is asked, which number it needs (None: the step does not fit), and what comes of it
Step = tuple[str, Callable[[random.Random, int], int | None], Callable[[int, int], int]]
_STEPS: tuple[Step, ...] = (
    (
        "{other} adds {n} more to these. How many {things} does that make?",
        lambda g, now: g.randint(2, 60),
        operator.add,
    ),
    (
        "{n} of these {things} are sold. How many are left?",
        lambda g, now: g.randint(1, now - 1) if now > 2 else None,
        operator.sub,
    ),
    (
        "Another room holds {n} times as many {things} as that. How many does it hold?",
        lambda g, now: g.randint(2, 5) if 1 < now < _LARGEST // 5 else None,
        operator.mul,
    ),
    (
        "These are put into {n} crates, the same number in each. How many does one crate hold?",
        lambda g, now: g.choice([n for n in range(2, 10) if now % n == 0] or [None]),
        operator.floordiv,
    ),
)
_FIRST = "{name} fills {a} boxes with {b} {things} each. How many {things} are in the boxes?"


def make(generator: random.Random, lexicon: Lexicon, steps: int) -> SifoSample:
    """Make a chain: each step after the first goes on from the number before it."""
    name, other = generator.sample(lexicon.names, 2)
    told = {"name": name, "other": other, "things": generator.choice(lexicon.things)}
    a, b = generator.randint(2, 12), generator.randint(2, 12)
    now = a * b
    made, golds = [_FIRST.format(**told, a=a, b=b)], [str(now)]
    while len(made) < steps:
        text, number, then = generator.choice(_STEPS)
        n = number(generator, now)
        if n is None:
            continue
        now = then(now, n)
        made.append(text.format(**told, n=n))
        golds.append(str(now))
    return SifoSample("math", tuple(made), tuple(golds))


# ---- real problems ------------------------------------------------------------------------------

_NOTE = re.compile(r"<<(?P<sum>[^=<>]+)=(?P<result>-?[\d.]+)>>")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_OPERATORS |= {ast.Div: operator.truediv}


def from_answers(path: Path, least: int, most: int) -> list[SifoSample]:
    """Cut the problems of a file in GSM8K's format into chains of `least` to `most` steps.

    Raises:
        UserError: the file cannot be read, or gives no chain.
    """
    found = []
    for where, row in json_lines(path):
        if not isinstance(row.get("question"), str) or not isinstance(row.get("answer"), str):
            raise UserError(f"{where} lacks a question or an answer; give a file as GSM8K's")
        sample = from_problem(row["question"], row["answer"])
        if sample and least <= len(sample.steps) <= most:
            found.append(sample)
    if not found:
        raise UserError(f"{path} gives no chain of {least} to {most} steps; give more problems")
    return found


def from_problem(question: str, answer: str) -> SifoSample | None:
    """Cut a worked answer into a chain, one calculation a step; None if it is none.

    A line's result is asked for; a number that is the result of an earlier line is named after its
    instruction, so that the chain must be followed. At least one line must have such a number.
    """
    steps: list[str] = []
    golds: list[str] = []
    linked = 0
    for line in answer.partition("####")[0].strip().split("\n"):
        notes = list(_NOTE.finditer(line))
        if len(notes) != 1 or calculate(notes[0]["sum"]) != float(notes[0]["result"]):
            return None
        asked, places = _named(notes[0]["sum"], golds)
        linked += places
        gold = f"{float(notes[0]['result']):g}"
        steps.append(f"Work out {asked}.")
        golds.append(gold)
    if len(steps) < 2 or not linked or "e" in "".join(golds):
        return None
    steps[0] = f"{question.strip()} {steps[0]}"
    meta = {"linked": linked, "question": question}
    return SifoSample("math", tuple(steps), tuple(golds), meta=meta)


def _named(text: str, golds: Sequence[str]) -> tuple[str, int]:
    """Write a calculation with earlier results by their instructions; how many those are."""
    count = 0

    def name(match: re.Match[str]) -> str:
        nonlocal count
        value = f"{float(match[0]):g}"
        if value not in golds:
            return match[0]
        count += 1
        return f"(the result of Instruction_{len(golds) - golds[::-1].index(value)})"

    return re.sub(r"\d+(?:\.\d+)?|\.\d+", name, text), count


def calculate(text: str) -> float | None:
    """Give the value of a sum of numbers with + - * / and brackets; None if it is something else.

    >>> calculate("(2+3)*4")
    20.0
    """

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not a sum")

    try:
        return round(value(ast.parse(text.strip(), mode="eval").body), 6)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
