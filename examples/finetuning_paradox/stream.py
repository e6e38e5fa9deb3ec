"""What is trained on: translations alone, or mixed with running text, by one of two budgets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from recipes_peft.data import Encoded
from recipes_peft.errors import UserError

BUDGETS = ("equal_parallel", "equal_total")


@dataclass(frozen=True)
class Mixed:
    """Rows to train on in order, and of each whether it is a translation."""

    rows: list[Encoded]
    parallel: list[bool]

    @property
    def token_share(self) -> float:
        """The share of tokens under the loss that are not of these translations."""
        text = sum(len(r.answer) for r, p in zip(self.rows, self.parallel, strict=True) if not p)
        return text / sum(len(r.answer) for r in self.rows)


def mix(
    parallel: Sequence[Encoded],
    text: Sequence[Encoded],
    share: float,
    budget: str,
    seed: int,
    instead: Sequence[Encoded] = (),
) -> Mixed:
    """Shuffle translations and running text into one stream, `share` of whose rows is text.

    With n translations given, `equal_parallel` keeps all and adds n share / (1 - share) rows of
    text; `equal_total` keeps n rows in all, n share of them text in place of translations. Rows of
    text are taken in their order, and from the start again where there are too few.

    `instead` is the control: its rows are mixed in where the text would be, as many as have the
    text's number of tokens.

    Raises:
        UserError: a share outside of [0, 1), another budget, or no text where some is needed.
    """
    if not 0 <= share < 1 or budget not in BUDGETS:
        raise UserError(
            f"share is {share} and budget {budget!r}; choose a share from 0 up to 1, and a budget"
            f" from {', '.join(BUDGETS)}"
        )
    n = len(parallel)
    added = round(n * share / (1 - share)) if budget == "equal_parallel" else round(n * share)
    kept = n if budget == "equal_parallel" else n - added
    if added and not text:
        raise UserError("there is no running text to mix in; give some, or a share of 0")
    mixed_in = [text[i % len(text)] for i in range(added)]
    if instead:
        mixed_in = _as_many_tokens(instead, sum(len(row.answer) for row in mixed_in))
    rows = [(row, True) for row in parallel[:kept]] + [(row, False) for row in mixed_in]
    random.Random(seed).shuffle(rows)
    return Mixed([row for row, _ in rows], [p for _, p in rows])


def _as_many_tokens(rows: Sequence[Encoded], wanted: int) -> list[Encoded]:
    found: list[Encoded] = []
    while wanted > 0:
        found.append(rows[len(found) % len(rows)])
        wanted -= len(found[-1].answer)
    return found
