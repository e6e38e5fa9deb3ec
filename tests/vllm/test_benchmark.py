"""`benchmarks.serve --engine vllm`, whose engines follow each other in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks._report import read
from tests.vllm._engine import in_bfloat16

ROOT = Path(__file__).parents[2]


@in_bfloat16
def test_every_row_is_right(tmp_path: Path) -> None:
    options = ("--engine", "vllm", "--size", "tiny", "--rounds", "2", "--out", str(tmp_path))
    command = [sys.executable, "-m", "benchmarks.serve", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["wrong"] == []
    rows = read(Path(summary["csv"]))
    assert {row.provider for row in rows} == {"base", "road_1", "lora r8"}
    assert len({row.case for row in rows}) == 2  # an engine for each dtype
    assert Path(summary["png"]).exists()
