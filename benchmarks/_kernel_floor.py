"""The least time of a product with packed weights on this machine: its bytes, or its operations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks._measure import copy_bandwidth, interleave

_READ_BYTES = 2**28
_SQUARE = {"cpu": 2048, "cuda": 8192}  # of the product that stands for the fastest
_ROUNDS = 9
_CACHE_BYTES = 2**25  # of the last level, where the system does not say
MOST_COPIES = 64


@dataclass(frozen=True)
class Machine:
    """The most that was seen of a device: bytes a second, and operations a second in one dtype."""

    bandwidth: float
    operations: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Machine:
        """Read a large tensor (on CUDA copy one), and multiply two large squares."""
        size = _SQUARE[device.type]
        square = torch.randn(size, size, device=device).to(dtype)
        product = partial(torch.mm, square, square)
        time = interleave({"mm": {"mm": product}}, _ROUNDS, device)["mm"]["mm"]
        return cls(_bandwidth(device), 2 * size**3 / (min(time) / 1e3))

    def floor_ms(self, moved: int, operations: int) -> float:
        """Give the milliseconds below which nothing can do this."""
        return max(moved / self.bandwidth, operations / self.operations) * 1e3


def _bandwidth(device: torch.device) -> float:
    if device.type == "cuda":
        return copy_bandwidth(device)
    source = torch.ones(_READ_BYTES // 4)
    time = interleave({"read": {"read": source.sum}}, _ROUNDS, device)["read"]["read"]
    return source.nbytes / (min(time) / 1e3)


def cold_copies(stored: int) -> int:
    """Give how many weights of so many bytes leave none of them in a CPU's cache until its turn.

    A weight that is far smaller than the cache, as no layer of a real model is, gets `MOST_COPIES`
    and stays warm.
    """
    return min(MOST_COPIES, -(-2 * _last_level_bytes() // stored))


def _last_level_bytes() -> int:
    try:
        found = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        found = 0  # not every system knows the name
    return found if found > 0 else _CACHE_BYTES
