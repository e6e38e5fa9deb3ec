"""What `tests/conftest.py` promises to every test file."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tests.conftest import lane_of
from tests.helpers import assert_close


@pytest.mark.parametrize(
    ("marks", "interpreted", "lane"),
    [("", False, ""), ("gpu", False, ""), ("aot", False, "aot"), ("interp", True, "interp")],
)
def test_lanes(marks: str, interpreted: bool, lane: str) -> None:
    assert lane_of(marks, interpreted) == lane


@pytest.mark.parametrize(
    ("marks", "interpreted"), [("", True), ("aot", True), ("gpu", True), ("interp", False)]
)
def test_lanes_that_cannot_share_a_process_are_refused(marks: str, interpreted: bool) -> None:
    with pytest.raises(pytest.UsageError, match="TRITON_INTERPRET=1 and -m interp"):
        lane_of(marks, interpreted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_memory_is_poisoned(dtype: torch.dtype) -> None:
    x = torch.ones(1000, dtype=dtype)
    for empty in (torch.empty(1000, dtype=dtype), torch.empty_like(x), x.new_empty(1000)):
        assert empty.isnan().all()


@pytest.mark.parametrize("repetition", range(2))
def test_seeds_are_set(repetition: int) -> None:
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())


def test_tolerances_are_relative_and_fail_on_nan_and_shape() -> None:
    reference = torch.tensor([100.0, 1.0])
    assert_close(reference + 9e-5, reference)
    with pytest.raises(AssertionError, match="result is off by"):
        assert_close(reference + 2e-4, reference)
    assert_close(reference + 2e-4, reference, dtype=torch.float16)
    with pytest.raises(AssertionError, match="result is off by nan"):
        assert_close(torch.tensor([float("nan"), 1.0]), reference)
    with pytest.raises(AssertionError, match=r"shape \(1,\), not \(2,\)"):
        assert_close(reference[:1], reference)
