"""Lanes, seeds and poisoned memory for every test.

The interpreter and the compiler of Triton cannot share a process, so there are three lanes:

    pytest                                every test without a lane of its own
    TRITON_INTERPRET=1 pytest -m interp   tests in files named *_interp.py
    pytest -m aot                         tests in files named *_aot.py

Tests marked `gpu` belong to the first lane where there is a GPU (`-m gpu` runs nothing else). What
belongs to another lane is deselected, and pytest fails a run that has no test left.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Read when the libraries concerned are first imported, which is later than this file.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

LANES = ("interp", "aot")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The same examples on every run, and no time limit: cores are shared.
settings.register_profile("house", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("house")


def lane_of(marks: str, interpreted: bool) -> str:
    """Give the lane that `-m marks` asks for, "" for the one of ordinary tests."""
    lane = marks if marks in LANES else ""
    if interpreted != (lane == "interp"):
        raise pytest.UsageError(
            "the interpreter's tests need TRITON_INTERPRET=1 and -m interp, and no others run so"
        )
    return lane


def pytest_configure(config: pytest.Config) -> None:
    lane_of(config.option.markexpr, INTERPRETED)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        # A worker gets its share of the cores, and so do the processes that its tests start.
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import, in a lane of its own, the files of other lanes."""
    lane = lane_of(config.option.markexpr, INTERPRETED)
    wanted = not lane or collection_path.is_dir() or collection_path.stem.endswith(f"_{lane}")
    return None if wanted else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lane = lane_of(config.option.markexpr, INTERPRETED)
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        own = next((name for name in LANES if item.get_closest_marker(name)), "")
        if own and not item.path.stem.endswith(f"_{own}"):
            raise pytest.UsageError(
                f"{item.nodeid} is marked {own}, but only files named *_{own}.py are read in that"
                " lane; move it to one"
            )
        runs = own == lane and (torch.cuda.is_available() or not item.get_closest_marker("gpu"))
        (kept if runs else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill memory that torch leaves uninitialised with NaN, so that a test notices its use."""
    fill = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fill.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    # Only the fill is wanted: an operator without a deterministic form must not fail for that.
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fill.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
