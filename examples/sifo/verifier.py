"""What a response says, and what of it is right: SIFo's two parsing modes and its metrics.

This file imports the standard library alone: it is copied beside the tasks written for lm-eval,
which loads it under no name, so that dataclasses would not work.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = [
    "MODES",
    "Report",
    "Score",
    "aggregate",
    "normalise",
    "parse_response",
    "parse_robust",
    "parse_strict",
    "process_results",
    "score",
    "well_formed",
]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MARKERS = (r'"Instruction_(\d+)"\s*:', r"Instruction_(\d+)\s*:")


# ---- parsing ------------------------------------------------------------------------------------


def parse_response(text: str, mode: str = "strict") -> list[str]:
    """Give the answers that a response holds, first to last; none if it holds none.

    `strict` is the official reading: values of a JSON object in the order in which they stand,
    whatever their keys; failing that, what stands between the markers. `robust` finds the first
    balanced JSON object in the text and aligns by the number in the key; an answer that is missing
    is "". The two are reported apart.

    Raises:
        ValueError: there is no such mode.
    Source:
        SIFo's evaluation, as described in section 4 of the specification; robust is ours.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; choose from {', '.join(MODES)}")
    return MODES[mode](text)


def parse_strict(text: str) -> list[str]:
    """Give the answers as the official evaluation reads them; see `parse_response`."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return [_plain(value) for value in found.values()]
    return [value for _, value in _between_markers(text)]


def parse_robust(text: str) -> list[str]:
    """Give the answers by the numbers of their keys; see `parse_response`."""
    for candidate in _objects(text):
        numbered = [(_number(key), value) for key, value in candidate.items()]
        if not numbered:
            continue
        if all(number is None for number, _ in numbered):
            return [_plain(value) for value in candidate.values()]
        return _aligned([(n, _plain(value)) for n, value in numbered if n is not None])
    return _aligned(list(_between_markers(text)))


MODES: dict[str, Callable[[str], list[str]]] = {"strict": parse_strict, "robust": parse_robust}


def well_formed(text: str, steps: int) -> bool:
    """Say whether a response is one JSON object with as many keys as there were instructions."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and len(found) == steps


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _between_markers(text: str) -> Iterator[tuple[int, str]]:
    for marker in _MARKERS:
        found = list(re.finditer(marker, text))
        ends = [*(match.start() for match in found[1:]), len(text)]
        for match, end in zip(found, ends, strict=False):
            yield int(match[1]), text[match.end() : end].strip().strip("{},").strip().strip('"')
        if found:
            return


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Give the JSON objects of a text, those inside of another left out."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except ValueError:
            at = text.find("{", at + 1)
            continue
        if isinstance(found, dict):
            yield found
        at = text.find("{", end)


def _number(key: str) -> int | None:
    found = re.search(r"(\d+)\s*$", key)
    return int(found[1]) if found else None


def _aligned(numbered: Sequence[tuple[int, str]], most: int = 99) -> list[str]:
    by_number = {number: value for number, value in numbered if 0 < number <= most}
    return [by_number.get(number, "") for number in range(1, max(by_number, default=0) + 1)]


# ---- answers ------------------------------------------------------------------------------------


def normalise(task: str, text: str) -> str:
    """Give what is compared of an answer; the task is told by its name, as the official code does.

    Text: no ASCII punctuation, single spaces. Math: no commas. All others as in SQuAD: lower case,
    no punctuation, no articles, single spaces.
    """
    if "text" in task:
        return " ".join(text.translate(_PUNCTUATION).split())
    if "math" in task:
        return text.replace(",", "")
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


class Score(NamedTuple):
    """Which steps of a sample were right, and how long its answers are, in characters."""

    hits: tuple[bool, ...]
    final: bool
    length: float

    @property
    def depth(self) -> int:
        """Give how many steps are right from the first one on."""
        return next((i for i, hit in enumerate(self.hits) if not hit), len(self.hits))


def score(task: str, golds: Sequence[str], answers: Sequence[str]) -> Score:
    """Compare answers with what is right: a step is right if its answer holds the right one.

    The final answer is the last that was given, even beyond the last step; one too few is wrong.
    """

    def hit(answer: str, gold: str) -> bool:
        return normalise(task, gold).lower() in normalise(task, answer).lower()

    padded = [*answers, *[""] * (len(golds) - len(answers))]
    hits = tuple(hit(answer, gold) for answer, gold in zip(padded, golds, strict=False))
    length = sum(map(len, padded)) / len(padded)
    return Score(hits, hit(padded[-1], golds[-1]), length)


# ---- samples together ---------------------------------------------------------------------------


class Report(NamedTuple):
    """What a responder does on a task; in percent, but for depth (steps) and length (characters).

    `positions` is the accuracy of the first step, the second and so on, over samples that have it.
    Of `qa`, odd steps are answers and even ones revisions: two curves. `consistency` (all others
    right, given that the final is) and `lucky` (the final right, given that another is wrong) are
    not SIFo's but ours; None where no sample meets the condition. The intervals are of 95 %.
    """

    samples: int
    sample_accuracy: float
    instruction_accuracy: float
    depth: float
    positions: tuple[float, ...]
    consistency: float | None
    lucky: float | None
    length: float
    sample_interval: tuple[float, float]
    instruction_interval: tuple[float, float]

    def curves(self, task: str) -> dict[str, dict[int, float]]:
        """Give the accuracy by position, as the curves that are drawn."""
        numbered = dict(enumerate(self.positions, 1))
        if task != "qa":
            return {task: numbered}
        return {
            "qa, answers": {k: value for k, value in numbered.items() if k % 2},
            "qa, revisions": {k: value for k, value in numbered.items() if not k % 2},
        }


def aggregate(scores: Sequence[Score], draws: int = 1000, seed: int = 0) -> Report:
    """Put the scores of a task's samples together; `draws` bootstrap samples give the intervals.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("there are no scores to put together; give one for each sample")
    finals = [float(s.final) for s in scores]
    shares = [sum(s.hits) / len(s.hits) for s in scores]
    longest = max(len(s.hits) for s in scores)
    others = [all(s.hits[:-1]) for s in scores]
    generator = random.Random(seed)
    picks = [generator.choices(range(len(scores)), k=len(scores)) for _ in range(draws)]
    return Report(
        len(scores),
        _percent(finals),
        _percent(shares),
        sum(s.depth for s in scores) / len(scores),
        tuple(
            _percent([float(s.hits[k]) for s in scores if len(s.hits) > k]) for k in range(longest)
        ),
        _share([all_right for all_right, s in zip(others, scores, strict=True) if s.final]),
        _share([s.final for all_right, s in zip(others, scores, strict=True) if not all_right]),
        sum(s.length for s in scores) / len(scores),
        _interval(finals, picks),
        _interval(shares, picks),
    )


def _percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 2)


def _share(values: Sequence[bool]) -> float | None:
    return _percent([float(value) for value in values]) if values else None


def _interval(values: Sequence[float], picks: Sequence[Sequence[int]]) -> tuple[float, float]:
    if not picks:
        return (_percent(values), _percent(values))
    means = sorted(_percent([values[i] for i in pick]) for pick in picks)
    cut = len(means) // 40  # 2.5 % at either end
    return means[cut], means[-1 - cut]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one response for lm-eval; `doc` has the task and the golds."""
    found = score(doc["task"], doc["golds"], parse_strict(results[0]))
    share = sum(found.hits) / len(found.hits)
    return {"sample_acc": float(found.final), "instr_acc": share, "depth": float(found.depth)}
