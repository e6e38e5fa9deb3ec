"""The tests of the server: skipped where its extra is not installed, on one thread of torch's."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

_EXTRA = ("fastapi", "httpx", "openai", "prometheus_client", "uvicorn")
collect_ignore_glob = [] if all(find_spec(name) for name in _EXTRA) else ["test_*.py"]


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing by more threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
