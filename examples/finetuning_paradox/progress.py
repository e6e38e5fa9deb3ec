"""Runs that are finished are kept in files, and what was measured in one that is not yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from recipes_peft import report
from recipes_peft.errors import explained

LATER = ("out", "seeds", "arms", "once")  # settings that change no finished run


class Progress:
    """The measurements of a run so far, beside the file that its training goes on from.

    They are as many as that file has points, none without it.
    """

    def __init__(self, saved: Path, writes: bool) -> None:
        """Find what was measured before an interruption; `writes` is of one process alone."""
        self.saved, self.writes = saved, writes
        self.file = saved.with_suffix(".json")
        self.measured: list[dict[str, Any]] = []
        if not self.file.exists():
            saved.unlink(missing_ok=True)  # it is of no use without
        elif saved.exists():
            with explained(ValueError, before=f"{self.file} is torn: ", after="; delete it"):
                kept = json.loads(self.file.read_text(encoding="utf-8"))["measured"]
            self.measured = kept[: _points(saved)]

    def add(self, found: dict[str, Any]) -> None:
        """Keep a measurement, before the training's file has its point."""
        self.measured.append(found)
        if self.writes:
            report.write_json(self.file, {"measured": self.measured})

    def finish(self) -> None:
        """Delete both files."""
        if self.writes:
            self.saved.unlink(missing_ok=True)
            self.file.unlink(missing_ok=True)


def finished(
    out: Path,
    name: str,
    given: Any,
    accelerator: Accelerator,
    job: Callable[[Progress], dict[str, Any]],
) -> dict[str, Any]:
    """Give what a run found: from its file if that is of the same settings, else by running it."""
    file = out / "runs" / f"{name}.json"
    settings = {k: v for k, v in asdict(given).items() if k not in LATER}
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            accelerator.print(f"{name}: found in {file}")
            return kept
    mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    saved = file.with_name(f"{name}-{mark}.safetensors")
    progress = Progress(saved, accelerator.is_main_process)
    found = {"settings": settings, **job(progress)}
    if accelerator.is_main_process:
        report.write_json(file, found)
        progress.finish()
    return found


def _points(saved: Path) -> int:
    with (
        explained(SafetensorError, OSError, before=f"cannot go on from {saved}: "),
        safe_open(saved, framework="pt") as content,
    ):
        return len(json.loads((content.metadata() or {})["progress"])["points"])
