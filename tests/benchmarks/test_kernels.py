"""The products with packed weights: what each layer stands for, and the command on tiny layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import _kernel_floor, _kernel_layers, _report, kernels
from benchmarks._cases import BF16, FP32, TOLERANCE
from benchmarks._kernel_floor import MOST_COPIES, Machine, cold_copies
from benchmarks._kernel_layers import LAYERS, LINEAR, LORA, Layer, Provider, Weight, chosen, label

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(bandwidth=1e9, operations=1e9)
    monkeypatch.setattr(Machine, "measure", lambda device, dtype: machine)
    monkeypatch.setattr(_kernel_floor, "MOST_COPIES", 2)


def command(out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    options = ["--size", "tiny", "--rounds", "1", "--device", "cpu", "--out", str(out), *more]
    code = kernels.run(options)
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    return code, summary, _report.read(Path(summary["csv"])), printed.err


def only(monkeypatch: pytest.MonkeyPatch, **others: Provider) -> None:
    """Leave the layers that need no other package, and `others`."""
    own = {name: p for name, p in LAYERS.items() if not p.needs}
    monkeypatch.setattr(_kernel_layers, "LAYERS", {**own, **others})


def test_the_command_measures_layers_and_grids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    code, summary, rows, _ = command(tmp_path, capsys, "--bits", "2", "--only", "float32")
    assert code == 0
    assert summary["rows"] == len(rows)
    assert Path(summary["png"]).read_bytes().startswith(b"\x89PNG")
    timed = {(r.mode, r.x, r.provider) for r in rows if r.metric == "time" and "linear" in r.case}
    layers = {LINEAR, "packed 2-bit", "packed + lora 2-bit"}
    assert {p for mode, _, p in timed if mode == "cold"} == {*layers, "floor 2-bit"}
    assert {p for mode, x, p in timed if mode == "step"} == layers
    assert {x for mode, x, _ in timed if mode == "cold"} == {1, 8}
    assert {x for mode, x, _ in timed if mode == "step"} == {8}
    grids = {(r.provider, r.mode) for r in rows if "grid" in r.case and r.metric == "time"}
    assert grids >= {("op", "forward"), ("op", "backward"), ("floor", "forward")}
    for panel in kernels.COMMAND.panels:
        assert panel.rows(rows) or panel.modes == ("graph",), panel
    assert {aim["of"] for aim in summary["aims"]} == {0}  # all are for a GPU


def test_shares_of_the_floor_and_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch)
    options = ("--bits", "4", "--only", "linear.*bfloat16")
    _, _, rows, _ = command(tmp_path, capsys, *options)
    found = {(r.provider, r.x, r.metric): r.p50 for r in rows if r.mode == "cold"}
    own = label(LORA, 4)
    assert found[own, 1, "floor"] == pytest.approx(
        found["floor 4-bit", 1, "time"] / found[own, 1, "time"]
    )
    weights = 128 * 256
    codes, factors = weights * (4 + (4 + 16) / 64) / 8, 16 * (128 + 256) * 2
    assert found["packed 4-bit", 1, "stored"] == pytest.approx(codes / 2**20)
    assert found[own, 1, "stored"] == pytest.approx((codes + factors) / 2**20)
    assert found[LINEAR, 1, "stored"] == pytest.approx(weights * 2 / 2**20)
    # at a byte and an operation a nanosecond, eight rows are bound by the operations
    operations = 2 * 8 * (weights + 16 * (128 + 256))
    assert found["floor 4-bit", 8, "time"] == pytest.approx(operations / 1e9 * 1e3)


def test_a_package_that_is_missing_or_fails_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(weight: Weight, bits: int) -> Layer:
        raise RuntimeError("no kernel for this")

    absent = Provider(broken, (2,), needs="no_such_package")
    only(monkeypatch, absent=absent, broken=replace(absent, needs="torch"))
    options = ("--bits", "2", "--only", "linear.*bfloat16")
    code, _, rows, told = command(tmp_path, capsys, *options)
    assert code == 0
    assert "absent 2-bit, which needs no_such_package" in told
    assert "broken 2-bit, whose package failed: no kernel for this" in told
    assert not {"absent 2-bit", "broken 2-bit"} & {r.provider for r in rows}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_layer_of_ours_is_right(dtype: torch.dtype, rows: int) -> None:
    weight = Weight(128, 64, dtype, CPU)
    x, cotangent = torch.randn(rows, 128).to(dtype), torch.randn(rows, 64).to(dtype)
    names = set()
    for name, provider, bits in chosen((2, 3, 4), dtype, CPU):
        if not provider.needs:
            layer = provider.build(weight, bits)
            error = kernels._error(layer, x, cotangent, layer.differentiable)
            assert error <= TOLERANCE[dtype] / 5, name
            names.add(name)
    assert names == {LINEAR, *(label(name, b) for name in ("packed", LORA) for b in (2, 3, 4))}


class _Off(nn.Module):
    def __init__(self, inner: nn.Module, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.spoil = inner, spoil

    def forward(self, x: Tensor) -> Tensor:
        return self.spoil(self.inner(x))


def _twice_backward(y: Tensor) -> Tensor:
    return 2 * y - y.detach()


@pytest.mark.parametrize("spoil", [_twice_backward, partial(torch.add, other=1e-2)])
def test_a_wrong_layer_is_noticed(spoil: Callable[[Tensor], Tensor]) -> None:
    weight = Weight(128, 64, FP32, CPU)
    x, cotangent = torch.randn(3, 128), torch.randn(3, 64)
    right = LAYERS[LORA].build(weight, 2)
    wrong = replace(
        right,
        module=_Off(right.module, spoil),
        trained=lambda module: right.trained(right.module),
    )
    assert kernels._error(right, x, cotangent, True) <= TOLERANCE[FP32]
    assert kernels._error(wrong, x, cotangent, True) > TOLERANCE[FP32]


def test_copies_fill_the_cache_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernel_floor, "MOST_COPIES", MOST_COPIES)
    monkeypatch.setattr(_kernel_floor, "_last_level_bytes", lambda: 1000)
    assert cold_copies(300) == 7
    assert cold_copies(5000) == 1
    assert cold_copies(1) == MOST_COPIES
