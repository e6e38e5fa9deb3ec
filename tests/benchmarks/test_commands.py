"""Every command on tiny cases: its rows, its last line, its plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _report, merge, ops, serve, train
from benchmarks._command import Command, main
from benchmarks._providers import BASE, LORA, OURS, STOCK, TRAINED
from benchmarks._serving import SERVED


def _run(command: Command, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    code = main(command, ["--size", "tiny", "--rounds", "2", "--out", str(out), *more])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    return code, summary, _report.read(Path(summary["csv"]))


@pytest.mark.parametrize(
    "command", [train.COMMAND, merge.COMMAND, ops.COMMAND], ids=lambda c: c.name
)
def test_command_writes_rows_plot_and_json(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, summary, rows = _run(command, tmp_path, capsys, "--only", "float32")
    assert code == 0
    assert summary["wrong"] == []
    assert summary["benchmark"] == command.name
    assert summary["rows"] == len(rows) > 0
    assert Path(summary["png"]).read_bytes().startswith(b"\x89PNG")
    assert {aim["aim"] for aim in summary["aims"]} == {aim.text for aim in command.aims}
    for row in rows:
        assert "float32" in row.case
        assert row.p20 <= row.p50 <= row.p80
        assert "torch" in row.versions
        assert row.device
    assert all(panel.rows(rows) for panel in command.panels)
    assert {r.metric for r in rows} >= {"error", "time", "ratio"}


def test_serve_measures_every_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, summary, rows = _run(serve.COMMAND, tmp_path, capsys, "--only", "float32")
    assert code == 0
    assert summary["wrong"] == []
    assert summary["rows"] == len(rows)
    assert Path(summary["png"]).read_bytes().startswith(b"\x89PNG")
    on_gpu_only = {"rotation_bank"}
    for panel in serve.COMMAND.panels:
        if panel.modes != ("graph",) and panel.cases not in on_gpu_only:
            assert panel.rows(rows), panel
    cases = {r.case.partition(":")[0]: r for r in rows}
    assert set(cases) == set(serve.PANELS)
    timed = {r.provider for r in rows if r.metric == "time" and r.case.startswith("batch")}
    assert timed == set(SERVED)
    assert not {r.mode for r in rows if r.mode.startswith("_")}
    more = {(r.provider, r.x): r.p50 for r in rows if r.metric == "more operations"}
    assert more[OURS, 4] == more[BASE, 4] == 0
    assert more[STOCK, 4] > 0
    assert more[LORA, 4] > 0


def test_train_compares_every_provider_and_counts_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, rows = _run(train.COMMAND, tmp_path, capsys, "--only", "linear tiny up bfloat16")
    assert {r.provider for r in rows if r.metric == "time"} == set(TRAINED)
    saved = {r.provider: r.p50 for r in rows if r.metric == "saved"}
    assert saved[BASE] == 0
    assert saved[OURS] <= 1
    assert saved[STOCK] == 4  # two tensors in float32
    assert 0 < saved[LORA] < saved[STOCK]


def test_merge_reports_error_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, rows = _run(merge.COMMAND, tmp_path, capsys, "--only", "bfloat16")
    values = {(r.provider, r.mode, r.metric): r.p50 for r in rows}
    assert values[OURS, "cycle", "changed"] == 0
    assert values[STOCK, "cycle", "changed"] > 0
    assert values[OURS, "merge", "error"] < values[STOCK, "merge", "error"]
    weight_mib = 256 * 128 * 2 / 2**20
    assert values[OURS, "merge", "held"] == pytest.approx(weight_mib)
    assert values["road_1 inverse", "merge", "held"] == 0


def test_rows_are_appended_and_the_latest_run_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--only", "g=64 float32")
    _, first, _ = _run(ops.COMMAND, tmp_path, capsys, *arguments)
    place = _report.Place("elsewhere", "torch", "none", "9999-01-01T00:00:00+00:00")
    later = place.row("case", "provider", "step", "time", "ms", 1, [1.0, 2.0, 3.0])
    _report.append(tmp_path / "ops.csv", [later])
    assert _report.read(tmp_path / "ops.csv") == [later]
    lines = (tmp_path / "ops.csv").read_text().splitlines()
    assert len(lines) == first["rows"] + 2
