"""Where a run is kept, finished or not: its place follows from what its numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["named", "settings_of", "unfinished"]

# what the numbers of a run do not depend on
APART = ("out", "arms", "tuners", "rates", "seeds", "side_seeds", "save_steps")


def settings_of(given: Any) -> dict[str, Any]:
    """Give the settings that a run's numbers depend on."""
    return {name: value for name, value in vars(given).items() if name not in APART}


def named(folder: Path, kind: str, values: Mapping[str, Any]) -> Path:
    """Give the folder of what is made by these values: others have another."""
    key = json.dumps(values, sort_keys=True)
    return folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def unfinished(given: Any, name: object) -> Path:
    """Give the folder of a training that is not finished."""
    return named(Path(given.out) / "trainer", str(name), settings_of(given))
