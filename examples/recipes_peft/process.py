"""Run a recipe's script once more, in a process of its own that knows nothing but the files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["run_alone"]


def run_alone(script: str, argv: Sequence[str]) -> int:
    """Run a Python script and give its exit status; it is not part of an `accelerate launch`."""
    launched = ("MASTER_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_")
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(launched) and not key.endswith(("RANK", "WORLD_SIZE"))
    }
    return subprocess.run([sys.executable, script, *argv], env=environment, check=False).returncode
