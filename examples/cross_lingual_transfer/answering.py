"""Answers in a context: windows over it, the best span of a model, F1 and exact match of SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from parallel_pairs import Answer, Row
from segments import Joined, Segments, outputs, padded
from shortcuts import ABSENT, answer_distance

from recipes_peft import encoders
from recipes_peft.errors import UserError

__all__ = ["Answering", "Window", "exact", "f1", "normal", "spans_of"]

BEST = 20  # starts and ends that are combined
LONGEST = 30  # tokens of an answer


def normal(text: str) -> list[str]:
    """Give the words of an answer without case, punctuation and English articles, as SQuAD does."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact(found: str, wanted: Answer) -> float:
    """Give 1 if both are the same words."""
    return float(normal(found) == normal(wanted.text))


def f1(found: str, wanted: Answer) -> float:
    """Give the harmonic mean of the shares of common words on both sides."""
    a, b = normal(found), normal(wanted.text)
    if not a or not b:
        return float(a == b)
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b))


class Window(NamedTuple):
    """A question and a part of its context as one sequence.

    `begin` is the first token of the part in the context, `first` and `last` the answer's in the
    sequence: both are 0, the sequence's first token, if it is not in this part.
    """

    joined: Joined
    row: int
    begin: int
    count: int
    first: int
    last: int


def spans_of(
    start: torch.Tensor, end: torch.Tensor, best: int = BEST, longest: int = LONGEST
) -> tuple[float, int, int]:
    """Give the best sum of two logits, and the first and last token.

    Of the `best` starts and ends those pairs count that are in order and no longer than `longest`
    tokens. Without one the first token answers.
    """
    starts = start.topk(min(best, len(start))).indices.tolist()
    ends = end.topk(min(best, len(end))).indices.tolist()
    found = [(float(start[a] + end[b]), a, b) for a in starts for b in ends if a <= b < a + longest]
    return max(found, default=(float(start[0] + end[0]), 0, 0))


class Answering:
    """How a model that points at answers is loaded, trained and read."""

    metrics: Mapping[str, Any] = {"f1": f1, "exact": exact}
    heads = ("qa_outputs",)

    def __init__(self, given: Any, data: Any) -> None:
        self.given = given
        self.tokenizer = self.load(0)[1]
        self.segments = Segments(self.tokenizer, given.max_length)
        if given.stride >= self.segments.room // 2:
            raise UserError(
                f"stride is {given.stride}; windows of {given.max_length} tokens overlap by less"
                " than half: lower --stride or raise --max-length"
            )

    def load(self, seed: int) -> tuple[Any, Any]:
        return encoders.load_reader(self.given.model, self.given.dtype, seed)

    def rows(self, rows: Sequence[Row]) -> list[Window]:
        """Give the windows over all contexts: they overlap by the stride."""
        return [window for number, row in enumerate(rows) for window in self._windows(number, row)]

    def _windows(self, number: int, row: Row) -> list[Window]:
        question = self.segments.text(row.second).ids[: self.segments.room // 2]
        context = self.segments.text(row.first)
        size = self.segments.room - len(question)
        answer, found, begin = self.answer_tokens(row), [], 0
        while True:
            part = context.ids[begin : begin + size]
            joined = self.segments.joined(question, part)
            first = last = 0
            if answer and begin <= answer[0] and answer[1] < begin + len(part):
                first, last = (joined.second + i - begin for i in answer)
            found.append(Window(joined, number, begin, len(part), first, last))
            if begin + size >= len(context.ids):
                return found
            begin += max(1, size - self.given.stride)

    def answer_tokens(self, row: Row) -> tuple[int, int] | None:
        """Give the first and last token of the answer in the context, None if they are none."""
        begin, end = row.target.start, row.target.start + len(row.target.text)
        inside = [
            i
            for i, (a, b) in enumerate(self.segments.text(row.first).offsets)
            if a < end and b > begin
        ]
        return (inside[0], inside[-1]) if inside else None

    def inputs(self, rows: Sequence[Joined]) -> dict[str, torch.Tensor]:
        types = "token_type_ids" in self.tokenizer.model_input_names
        return padded(rows, self.tokenizer.pad_token_id, types)

    def join(self, windows: Sequence[Window]) -> dict[str, Any]:
        """Make a batch for training."""
        return {
            **self.inputs([window.joined for window in windows]),
            "start_positions": torch.tensor([window.first for window in windows]),
            "end_positions": torch.tensor([window.last for window in windows]),
        }

    def predict(
        self, model: Any, rows: Sequence[Row], names: Sequence[str]
    ) -> dict[str, list[str]]:
        """Give the answer to each row, by each of the adapters of these names."""
        windows = self.rows(rows)
        best: dict[str, list[tuple[float, int, int]]] = {
            name: [(float("-inf"), 0, 0)] * len(rows) for name in names
        }

        def take(i: int, name: str, output: Any, place: int) -> None:
            window = windows[i]
            inside = slice(window.joined.second, window.joined.second + window.count)
            if window.count == 0:
                return
            start, end = (
                logits[place, inside].float().cpu()
                for logits in (output.start_logits, output.end_logits)
            )
            score, a, b = spans_of(start, end)
            found = (score, window.begin + a, window.begin + b)
            best[name][window.row] = max(best[name][window.row], found)

        sequences = [window.joined for window in windows]
        outputs(model, sequences, names, self.given.test_batch_size, self.inputs, take)
        return {
            name: [self._text(row, a, b) for row, (_, a, b) in zip(rows, found, strict=True)]
            for name, found in best.items()
        }

    def _text(self, row: Row, first: int, last: int) -> str:
        offsets = self.segments.text(row.first).offsets
        # A token may begin with the space before it.
        return row.first[offsets[first][0] : offsets[last][1]].strip() if offsets else ""

    def measured(self, model: Any, rows: Sequence[Row]) -> tuple[float, float]:
        """Give the mean loss over windows and F1 of the model as it is."""
        windows, losses = self.rows(rows), []

        def take(i: int, name: str, output: Any, place: int) -> None:
            window = windows[i]
            pairs = ((output.start_logits, window.first), (output.end_logits, window.last))
            losses.append(
                sum(-logits[place].float().log_softmax(-1)[at].item() for logits, at in pairs) / 2
            )

        sequences = [window.joined for window in windows]
        outputs(model, sequences, [""], self.given.test_batch_size, self.inputs, take)
        found = self.predict(model, rows, [""])[""]
        scores = [f1(answer, row.target) for answer, row in zip(found, rows, strict=True)]
        return sum(losses) / len(losses), sum(scores) / len(scores)

    def distance(self, row: Row) -> float:
        """Give how far the question's tokens are from the answer, in what a first window holds."""
        question = self.segments.text(row.second).ids[: self.segments.room // 2]
        context = self.segments.text(row.first).ids[: self.segments.room - len(question)]
        span = self.answer_tokens(row)
        if span is None or span[1] >= len(context):
            return ABSENT
        return answer_distance(question, context, span)
