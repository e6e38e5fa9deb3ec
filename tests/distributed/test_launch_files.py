"""The configurations for `accelerate launch` that the README shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

README = Path(__file__).parents[2] / "README.md"
SHOWN = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(2))
def test_accelerate_reads_what_the_readme_shows(number: int, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(SHOWN[number])
    config = load_config_from_file(str(file))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert config.num_processes == 8
    assert set(getattr(config, "fsdp_config", None) or {}) <= set(known)


def test_accelerate_leaves_out_what_the_readme_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = re.findall(r"`fsdp_ignored_modules: (.*?)`", README.read_text())
    monkeypatch.setenv("FSDP_IGNORED_MODULES", pattern[0])  # as launch does with such a key
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert plugin.ignored_modules == pattern[0]
    assert re.fullmatch(pattern[0], "base_model.model.layers.0.self_attn.q_proj.road_theta")


def test_all_that_are_shown_are_read() -> None:
    assert len(SHOWN) == 2
