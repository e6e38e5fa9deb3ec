"""The configurations for `accelerate launch` that the README shows."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.distributed._launched import solved
from tests.distributed._two import adam, assert_alike, found, llama, moved, road, train

README = Path(__file__).parents[2] / "README.md"
SHOWN = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(3))
def test_accelerate_reads_what_the_readme_shows(number: int, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(SHOWN[number])
    config = load_config_from_file(str(file))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert config.num_processes == 8
    for engine in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(config, engine, None) or {}) <= set(known)


@pytest.mark.parametrize("nodes", [1, 2])
def test_what_is_launched_does_what_one_process_does(nodes: int, tmp_path: Path) -> None:
    (tmp_path / "ddp.yaml").write_text(SHOWN[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(tmp_path / "ddp.yaml"), "--num_processes", "2"),
        *("--num_machines", str(nodes), "--main_process_ip", "127.0.0.1"),
        *("--main_process_port", str(port)),
    ]
    root = README.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    without_gpu = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | {"PYTHONPATH": path} | without_gpu
    script = ["-m", "tests.distributed._launched", str(tmp_path)]
    started = [
        subprocess.Popen([*command, "--machine_rank", str(node), *script], env=environment)
        for node in range(nodes)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0] * nodes
    finally:
        for process in started:
            process.kill()
    model = road(llama())
    seen = found(tmp_path, "road")
    assert moved(seen)
    assert_alike(seen, train(model, adam(model)))
    assert_alike(found(tmp_path, "apiq"), solved())


def test_accelerate_leaves_out_what_the_readme_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = re.findall(r"`fsdp_ignored_modules: (.*?)`", README.read_text())
    monkeypatch.setenv("FSDP_IGNORED_MODULES", pattern[0])  # as launch does with such a key
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert plugin.ignored_modules == pattern[0]
    assert re.fullmatch(pattern[0], "base_model.model.layers.0.self_attn.q_proj.road_theta")


def test_all_that_are_shown_are_read() -> None:
    assert len(SHOWN) == 3
