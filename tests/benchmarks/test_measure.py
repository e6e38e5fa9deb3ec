"""What is measured, on modules whose figures are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks._measure import interleave, memory_of, quantiles, relative_error, saved_bytes

CPU = torch.device("cpu")


def test_saved_bytes_of_a_known_module() -> None:
    layer = nn.Linear(8, 16)
    x = torch.randn(4, 8, requires_grad=True)
    hidden = 4 * 16 * 4

    def forward() -> Tensor:
        return layer(x).sigmoid()  # keeps its output; the linear keeps its input and weight

    assert saved_bytes(forward, [*layer.parameters(), x]) == hidden
    assert saved_bytes(forward, layer.parameters()) == hidden + 4 * 8 * 4
    assert saved_bytes(forward, []) == hidden + 4 * 8 * 4 + 8 * 16 * 4


def test_saved_bytes_counts_a_storage_once_and_whole() -> None:
    x = torch.randn(6, 4, requires_grad=True)

    def forward() -> Tensor:
        low, high = (x + 1).chunk(2)  # two views of one storage, each kept by the product
        return low * high

    assert saved_bytes(forward, [x]) == 6 * 4 * 4


def test_memory_of_stages() -> None:
    kept: list[Tensor] = []
    memory = memory_of(
        lambda: torch.ones(1024),
        {
            "grow": lambda x: kept.append(x.sin().cos()),
            "nothing": lambda x: None,
            "free": lambda x: kept.clear(),
        },
        CPU,
    )
    size = 1024 * 4
    assert (memory["grow"].peak, memory["grow"].held) == (2 * size, size)
    assert (memory["nothing"].peak, memory["nothing"].held) == (0, 0)
    assert (memory["free"].peak, memory["free"].held) == (0, -size)


def test_interleave_runs_stages_in_order_and_gives_a_sample_a_round() -> None:
    calls: list[str] = []
    stages = {"first": lambda: calls.append("first"), "second": lambda: calls.append("second")}
    samples = interleave({"one": stages, "other": stages}, 3, CPU)
    assert {name: list(found) for name, found in samples.items()} == {
        "one": ["first", "second"],
        "other": ["first", "second"],
    }
    assert all(len(ms) == 3 for found in samples.values() for ms in found.values())
    assert calls[::2] == ["first"] * (len(calls) // 2)
    assert calls[1::2] == ["second"] * (len(calls) // 2)


def test_quantiles() -> None:
    assert quantiles([4.0, 0.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx((1.0, 2.5, 4.0))


def test_relative_error_is_the_largest_and_keeps_nan() -> None:
    one = torch.ones(4)
    assert relative_error([one, one * 1.5], [one, one]) == pytest.approx(0.5)
    assert relative_error([one, one * float("nan")], [one, one]) != pytest.approx(0.0)
    assert not relative_error([one * float("nan")], [one]) <= 1e9
