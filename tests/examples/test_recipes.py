"""Every recipe: a copy of its folder runs with --smoke, offline, and it holds what it should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path.parent for path in EXAMPLES.glob("*/run.py"))
IDS = [path.name for path in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_a_copy_of_the_folder_runs_offline(recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(recipe, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    data = tmp_path / "own.jsonl"
    rows = [
        {"prompt": f"say {i}", "answer": f"{i}", "source": f"say {i}", "target": f"число {i}"}
        for i in range(24)
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ROAD_APIQ_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
    }
    done = subprocess.run(
        [sys.executable, "copy/run.py", "--smoke", "--data", str(data)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert written == {"copy", "own.jsonl", "demo-output"}
    assert (tmp_path / "demo-output" / "results.json").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_a_recipe_is_three_files_its_modules_and_a_row(recipe: Path) -> None:
    files = {path.name for path in recipe.iterdir() if path.name != "__pycache__"}
    assert files >= {"README.md", "config.yaml", "run.py"}
    assert all(name.endswith(".py") for name in files - {"README.md", "config.yaml"})
    command = f"python examples/{recipe.name}/run.py"
    config = (recipe / "config.yaml").read_text(encoding="utf-8")
    assert config.startswith(f"# {command}")
    assert "smoke" in yaml.safe_load(config)
    readme = (recipe / "README.md").read_text(encoding="utf-8")
    assert command in readme
    options = {key.replace("_", "-") for key in yaml.safe_load(config)} | {"config", "help"}
    assert set(re.findall(r"(?<!\S)`?--([a-z][a-z-]+)", readme)) <= options
    assert f"({recipe.name}/)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len((recipe / "run.py").read_text(encoding="utf-8").splitlines()) <= 200


def test_there_are_recipes_and_no_package_named_examples() -> None:
    assert RECIPES
    assert not (EXAMPLES / "__init__.py").exists()
