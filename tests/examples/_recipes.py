"""What tests of recipes share: the modules beside a script, and a run in this process."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def beside(recipe: str) -> Iterator[SimpleNamespace]:
    """Import the modules of a recipe as its script does; their names are free again afterwards."""
    folder = EXAMPLES / recipe
    names = [path.stem for path in folder.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def run(recipe: str, *argv: str) -> int:
    """Run a recipe's script with these arguments; gives its exit status."""
    script, before = str(EXAMPLES / recipe / "run.py"), sys.argv
    sys.argv = [script, *argv]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = before
    return int(ended.value.code or 0)


def elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with a cache of its own and without packages to download."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
