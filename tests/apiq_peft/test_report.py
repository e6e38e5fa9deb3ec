"""Reports of a real calibration, and of numbers made up to be told apart."""

from __future__ import annotations

import csv
import struct
import sys
from pathlib import Path

import pytest
from rich.console import Console

from apiq_peft import ApiQConfig, preset, quantize
from apiq_peft.calibration import BlockReport, LayerReport
from apiq_peft.report import kinds_of, tables, write_csv, write_plot
from tests.apiq_peft._models import tiny, tokens

REPORTS = [
    BlockReport(
        "layers.0",
        0.5,
        0.25,
        1.5,
        {"block": [4.0, 3.0, 2.0]},
        [
            LayerReport("layers.0.attn.q", 2, 64, 0.4, 0.1, 0.9, 0.8),
            LayerReport("layers.0.mlp.up", 3, 32, 0.6, 0.3, 0.7, 0.6, 0.75),
        ],
        peak_bytes=3 * 2**20,
    ),
    BlockReport(
        "layers.1",
        0.75,
        0.375,
        2.5,
        {"attn.q": [8.0, 6.0]},
        [LayerReport("layers.1.attn.q", 2, 64, 0.2, 0.2, 0.5, 0.4)],
        resumed=True,
    ),
]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_kinds_are_means_over_blocks() -> None:
    q, up = kinds_of(REPORTS)
    assert (q.kind, q.layers, up.kind, up.layers) == ("q", 2, "up", 1)
    assert (q.error_before, q.error_after) == pytest.approx((0.3, 0.15))
    assert (q.high_clip, q.low_clip) == pytest.approx((0.7, 0.6))


def test_the_csv_has_a_row_for_each_block_and_each_layer(tmp_path: Path) -> None:
    write_csv(REPORTS, tmp_path / "r.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["r.csv"]
    found = rows(tmp_path / "r.csv")
    names = ["", "layers.0.attn.q", "layers.0.mlp.up", "", "layers.1.attn.q"]
    assert [row["layer"] for row in found] == names
    assert [row["block"] for row in found] == ["layers.0"] * 3 + ["layers.1"] * 2
    assert [row["error_after"] for row in found] == ["0.25", "0.1", "0.3", "0.375", "0.2"]
    assert [row["last_loss"] for row in found] == ["2.0", "", "", "", "6.0"]
    assert [row["first_loss"] for row in found] == ["4.0", "", "", "", "8.0"]
    assert [row["seconds"] for row in found] == ["1.5", "", "0.75", "2.5", ""]
    assert [row["peak_bytes"] for row in found] == ["3145728", "", "", "", ""]
    assert [row["bits"] for row in found] == ["", "2", "3", "", "2"]


def test_the_tables_tell_blocks_and_kinds() -> None:
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as printed:
        for table in tables(REPORTS):
            console.print(table)
    lines = printed.get().splitlines()

    def cells(first: str) -> list[str]:
        (line,) = (line for line in lines if f" {first} " in line)
        return [cell.strip() for cell in line.strip("│").split("│")]

    assert cells("layers.0") == ["layers.0", "0.5000", "0.2500", "1.5", "3"]
    assert cells("layers.1") == ["layers.1", "0.7500", "0.3750", "resumed", "-"]
    assert cells("q") == ["q", "2", "0.3000", "0.1500", "0.7000", "0.6000", "the block's"]
    assert cells("up") == ["up", "1", "0.6000", "0.3000", "0.7000", "0.6000", "0.8"]


@pytest.mark.parametrize("preset_name", ["apiq-bw", "apiq-lw", "fast"])
def test_the_report_of_a_calibration(tmp_path: Path, preset_name: str) -> None:
    epochs = {} if preset_name == "fast" else {"epochs": 2}
    _, reports = quantize(
        tiny(),
        tokens(),
        ApiQConfig(bits=2, group_size=32, r=4),
        preset(preset_name, **epochs),
        show_progress=False,
    )
    write_csv(reports, tmp_path / "r.csv")
    found = rows(tmp_path / "r.csv")
    trained = {bool(row["layer"]) for row in found if row["last_loss"]}
    assert trained == {"apiq-bw": {False}, "apiq-lw": {True}, "fast": set()}[preset_name]
    assert len(found) == 2 * (1 + 7)
    assert [k.layers for k in kinds_of(reports)] == [2] * 7
    apart = preset_name != "apiq-bw"  # each layer is worked on by itself
    assert all(bool(row["seconds"]) == apart for row in found if row["layer"])
    for report in reports:
        assert sum(layer.seconds or 0 for layer in report.layers) <= report.seconds
        if Path("/proc/self/status").exists():
            assert report.peak_bytes is not None
            assert 2**20 < report.peak_bytes < 2**40


def test_the_plot_is_a_png_that_depends_on_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_plot(REPORTS, tmp_path / "all.png")
    write_plot(REPORTS[:1], tmp_path / "first.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.png", "first.png"]
    whole, first = ((tmp_path / name).read_bytes() for name in ("all.png", "first.png"))
    assert whole[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", whole[16:24])) > 500  # width and height
    assert whole != first


def test_a_missing_matplotlib_is_told_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'road-apiq-peft\[bench\]'"):
        write_plot(REPORTS, tmp_path / "r.png")
    assert not list(tmp_path.iterdir())
