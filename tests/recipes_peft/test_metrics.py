"""Exact match forgives case, quotes and a full stop; numbers are compared by their value."""

from __future__ import annotations

import pytest

from recipes_peft.metrics import exact_match, same_number


@pytest.mark.parametrize(
    ("written", "same"),
    [("Tea plant", 1), ('"tea  plant."', 1), ("The tea plant", 0), ("Tea plant ...", 0), ("", 0)],
)
def test_exact_match(written: str, same: float) -> None:
    assert exact_match([written], ["Tea plant"]) == same


@pytest.mark.parametrize(
    ("written", "same"),
    [
        ("so 1,200 it is", 1),
        ("3 * 400 = 1200.0.", 1),
        ("first 5, then 1200 ...", 1),
        ("1200 and then 5", 0),
        ("-1200", 0),
        ("2400-1200", 1),
        ("none", 0),
    ],
)
def test_the_last_number_counts(written: str, same: float) -> None:
    assert same_number([written], ["The final answer is: 1200"]) == same
