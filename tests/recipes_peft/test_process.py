"""A script run alone gets its arguments, gives its status, and is no member of a launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes_peft.process import run_alone


def test_status_arguments_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "names = {'RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'ACCELERATE_USE_CPU'}\n"
        "gone = not names & {*os.environ}\n"
        "sys.exit(int(sys.argv[1]) if gone and os.environ['KEPT'] == 'yes' else 99)\n"
    )
    assert run_alone(str(script), ["3"]) == 3
