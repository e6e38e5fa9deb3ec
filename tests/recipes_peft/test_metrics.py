"""Exact match forgives case, quotes and a full stop, and nothing more."""

from __future__ import annotations

import pytest

from recipes_peft.metrics import exact_match


@pytest.mark.parametrize(
    ("written", "same"),
    [("Tea plant", 1), ('"tea  plant."', 1), ("The tea plant", 0), ("Tea plant ...", 0), ("", 0)],
)
def test_exact_match(written: str, same: float) -> None:
    assert exact_match([written], ["Tea plant"]) == same
