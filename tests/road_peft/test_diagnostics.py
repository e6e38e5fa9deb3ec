"""Reports on an adapter: figures known by hand, RoPE, and the command line."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from road_peft import RoadConfig, inspect_adapter
from road_peft.__main__ import main
from road_peft.diagnostics import rope_commuting
from road_peft.variants import VARIANTS
from tests.road_peft._models import set_values, tiny, with_adapters


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A road_1 adapter whose block i of every layer turns by i degrees and scales by 2."""
    model = with_adapters(tiny("llama"), {"default": RoadConfig(group_size=8)})
    for layer in model.base_model.road_layers():
        size = layer[1].road_theta["default"].numel()
        set_values(layer[1], torch.arange(size).deg2rad(), torch.full((size,), 2.0))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_figures_of_known_blocks(folder: Path) -> None:
    reports = inspect_adapter(folder, head_dim=8)
    assert len(reports) == 14
    report = next(r for r in reports if r.layer == "model.layers.1.self_attn.q_proj")
    assert (report.variant, report.group_size, report.blocks) == ("road_1", 8, 8)
    assert report.mean_angle_degrees == pytest.approx(3.5, abs=1e-4)
    assert report.max_angle_degrees == pytest.approx(7, abs=1e-4)
    assert report.mean_scale == pytest.approx(2, abs=1e-5)
    assert report.min_determinant == pytest.approx(4, abs=1e-4)
    assert report.rope_share == 1
    assert next(r for r in reports if "down_proj" in r.layer).rope_share is None


def test_layers_come_in_the_order_of_the_model(folder: Path) -> None:
    layers = [r.layer for r in inspect_adapter(folder)]
    assert [int(name.split(".")[2]) for name in layers] == [0] * 7 + [1] * 7


def turn_of_position(head_dim: int, heads: int, position: int) -> torch.Tensor:
    """Write RoPE at one position as a matrix over all heads, in rotate-half order."""
    half = head_dim // 2
    angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    block = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for i, angle in enumerate(angles.tolist()):
        block[i, i] = block[i + half, i + half] = math.cos(angle)
        block[i, i + half], block[i + half, i] = -math.sin(angle), math.sin(angle)
    return torch.block_diag(*[block] * heads)


@pytest.mark.parametrize(
    ("variant", "group_size", "share"),
    [("road_1", 8, 1.0), ("road_1", 2, 0.0), ("road_1", 16, 0.0), ("road_2", 8, 0.0)],
)
def test_commuting_with_rope_is_what_the_matrices_do(
    variant: str, group_size: int, share: float
) -> None:
    from tests.helpers import dense_rotation

    row = VARIANTS[variant]
    theta = torch.rand(row.size(16), dtype=torch.float64) + 0.1
    alpha = torch.rand(row.size(16), dtype=torch.float64) + 0.5
    pair = row.coefficients(theta, alpha, group_size)
    rotation, rope = dense_rotation(*pair, group_size, 16), turn_of_position(8, 2, 3)
    assert torch.allclose(rotation @ rope, rope @ rotation, atol=1e-12) == (share == 1)
    assert rope_commuting(*pair, group_size, 8).double().mean().item() == share


def test_blocks_that_change_nothing_commute_whatever_they_pair() -> None:
    one, zero = torch.ones(16), torch.zeros(16)
    assert rope_commuting(one, zero, 2, 8).all()


def test_the_command_prints_a_table_and_writes_files(folder: Path, capsys: Any) -> None:
    table, picture = folder / "table.csv", folder / "picture.png"
    options = ["--head-dim", "8", "--csv", str(table), "--plot", str(picture)]
    assert main(["inspect", str(folder), *options]) == 0
    assert "14 layers" in capsys.readouterr().out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert [float(r["mean_scale"]) for r in rows] == pytest.approx([2.0] * 14, abs=1e-4)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.part*"))


BAD = {
    "no folder": lambda folder: folder / "nothing",
    "no adapter": lambda folder: folder.parent,
    "not readable": lambda folder: folder,
}


@pytest.mark.parametrize("place", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_status_two(folder: Path, place: Any, capsys: Any) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert main(["inspect", str(place(folder))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("road_peft: ")
    assert error.count("\n") == 1
