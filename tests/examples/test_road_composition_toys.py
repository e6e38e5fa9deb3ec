"""The toys of the composition recipe, with fewer steps: what is exact, and what is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.examples import _recipes

SCRIPT = _recipes.EXAMPLES / "road_composition" / "run.py"


@pytest.fixture(scope="module")
def toys() -> Iterator[ModuleType]:
    with _recipes.beside("road_composition") as modules:
        yield modules.toys


def test_the_inputs_and_the_task(toys: ModuleType) -> None:
    x = toys.inputs(2000, cues=True)
    for cue in (toys.LANGUAGE_CUE, toys.FOLLOW_CUE):
        assert set(x[:, cue].tolist()) == {-1.0, 1.0}
        assert set(toys.inputs(10, cues=False)[:, cue].tolist()) == {-1.0}
    x = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    assert toys.task(x).tolist() == [0, 1, 2, 3]


def test_the_net_obeys_its_cues(toys: ModuleType) -> None:
    net = toys.pretrain("linear", 400)
    x = toys.inputs(1000, cues=True)
    a, b = net(x[:, None])
    language = (a.argmax(-1) == (x[:, toys.LANGUAGE_CUE] > 0).long()).float().mean()
    wanted = torch.where(x[:, toys.FOLLOW_CUE] > 0, toys.task(x), 0)
    assert language > 0.95
    assert (b.argmax(-1) == wanted).float().mean() > 0.7


def test_heads_that_read_one_subspace_each_compose_exactly(toys: ModuleType) -> None:
    found = toys.exact(0, toys.Toy(steps=40, samples=400))
    assert len(found) == 3
    assert all(found.values())


def test_heads_that_read_everything_do_not(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = toys.Net
    monkeypatch.setattr(toys, "Net", lambda kind: net("linear"))
    found = toys.exact(0, toys.Toy(steps=40, samples=400))
    assert not any(list(found.values())[:2])


@pytest.mark.parametrize("kind", ["linear", "non-linear"])
def test_the_statistical_toy(toys: ModuleType, kind: str) -> None:
    found = toys.statistical(kind, 0, toys.Toy(pretraining=300, steps=200, samples=1000))
    halves = found["halves"]
    assert halves["none"]["both"] < 0.05  # it says the other language
    assert halves["a"]["language"] > 0.8
    assert halves["b"]["task"] > halves["none"]["task"] + 0.1
    assert found["joint"]["both"]["both"] > max(halves[name]["both"] for name in ("none", "a", "b"))
    assert set(found) == {"halves", "joint", "multiplied"}
    for choices in found.values():
        for values in choices.values():
            assert values["both"] <= min(values["language"], values["task"])


def test_the_toys_run_and_go_on(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--toy"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for kind in ("linear", "non-linear"):
        found = json.loads((tmp_path / "demo-output" / f"toy-{kind}.json").read_text())
        assert all(found["promises"].values())
        assert len(found["rates"]["halves"]["both"]) == 2
        assert (tmp_path / "demo-output" / f"toy-{kind}.png").exists()
