"""Who asks for what: the adapter of every row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ZIPF = 1.5  # popularity of the k-th most popular adapter is k to the power of minus this

_Draw = Callable[[int, int, torch.Generator], Tensor]


def _distinct(rows: int, adapters: int, generator: torch.Generator) -> Tensor:
    if rows > adapters:
        raise ValueError(f"{rows} rows cannot have distinct adapters out of {adapters}")
    return torch.arange(rows)


def _uniform(rows: int, adapters: int, generator: torch.Generator) -> Tensor:
    return torch.randint(adapters, (rows,), generator=generator)


def _skewed(rows: int, adapters: int, generator: torch.Generator) -> Tensor:
    popularity = torch.arange(1, adapters + 1, dtype=torch.float64) ** -ZIPF
    return torch.multinomial(popularity, rows, replacement=True, generator=generator)


def _identical(rows: int, adapters: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


WORKLOADS: dict[str, _Draw] = {
    "distinct": _distinct,  # every row its own
    "uniform": _uniform,  # every row draws one, all equally likely
    "skewed": _skewed,  # every row draws one, by Zipf's law
    "identical": _identical,  # all rows the same
}


def names_of_rows(workload: str, rows: int, adapters: Sequence[str], seed: int = 0) -> list[str]:
    """Give the name of the adapter of every row; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    drawn = WORKLOADS[workload](rows, len(adapters), generator)
    return [adapters[place] for place in drawn.tolist()]
