"""Where a training stands, kept as a file that an interrupted one goes on from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recipes_peft.errors import explained

__all__ = ["EVERY", "Checkpoint"]

EVERY = 300.0  # seconds from one writing to the next, at least


class Checkpoint:
    """What a training has found so far, and the weights and moments that go with it.

    `points` is for the training to fill: an evaluation or a loss each, as JSON has them. The rest
    is read when the file is written: the trained weights, the best of them, the optimizer's
    moments, the schedule, the scale of losses in fp16, and the states that dropout draws from.

    Without a `file` nothing is written. One that is there is gone on from if it is of a training
    of the same `what`; to delete it is up to who asked for it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        named: Mapping[str, torch.Tensor],
        optimizer: Any,
        schedule: Any,
        what: dict[str, Any],
        file: Path | None,
        every: float = EVERY,
    ) -> None:
        self.accelerator, self.named, self.optimizer = accelerator, named, optimizer
        self.what, self.file, self.every = what, file, every
        self.points: list[Any] = []
        self.best: dict[str, torch.Tensor] = {}
        self._parts = {"schedule": schedule}
        if accelerator.scaler is not None:
            self._parts["scaler"] = accelerator.scaler
        self._written = time.monotonic()

    def keep_best(self) -> None:
        """Keep a copy of the weights as they are: the best so far."""
        self.best = {n: p.detach().to("cpu", copy=True) for n, p in self.named.items()}

    @torch.no_grad()
    def take_best(self) -> None:
        """Put the best weights back, if any were kept."""
        for name, tensor in self.best.items():
            self.named[name].copy_(tensor)

    def save_if_due(self) -> None:
        """Write the file if it has not been for long enough; of several processes the main one."""
        if self.file is None or time.monotonic() - self._written < self.every:
            return
        if self.accelerator.is_main_process:
            self._save(self.file)
        self._written = time.monotonic()

    def _save(self, file: Path) -> None:
        """Write all of it as one file, which appears whole or not at all."""
        moments = self.optimizer.state_dict()
        tensors = {f"now.{n}": p.detach() for n, p in self.named.items()}
        tensors |= {f"best.{n}": p for n, p in self.best.items()}
        for number, values in moments["state"].items():
            tensors |= {f"moment.{number}.{key}": value for key, value in values.items()}
        tensors |= {f"random.{kind}": value for kind, value in _random_states().items()}
        about = {
            "what": self.what,
            "points": self.points,
            "groups": moments["param_groups"],
            **{name: part.state_dict() for name, part in self._parts.items()},
        }
        scratch = file.with_name(f"{file.name}.part")
        # A copy of each, for tensors that are a view or share their memory cannot be written.
        whole = {n: t.to("cpu", copy=True).contiguous() for n, t in tensors.items()}
        save_file(whole, scratch, {"progress": json.dumps(about)})
        os.replace(scratch, file)

    @torch.no_grad()
    def resume(self) -> bool:
        """Go back to what the file holds; False, and nothing changes, if there is none that fits.

        What the next batch is made of is the training's to advance.

        Raises:
            UserError: the file cannot be read.
        """
        if self.file is None or not self.file.exists():
            return False
        before = f"cannot go on from {self.file}: "
        with (
            explained(SafetensorError, OSError, before=before, after="; delete it to start anew"),
            safe_open(self.file, framework="pt") as content,
        ):
            about = json.loads((content.metadata() or {}).get("progress", "{}"))
            names = {n.removeprefix("now.") for n in content.keys() if n.startswith("now.")}  # noqa: SIM118 - not a dict
            if about.get("what") != self.what or names != set(self.named):
                return False
            tensors = {n: content.get_tensor(n) for n in content.keys()}  # noqa: SIM118 - the same
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "now":
                self.named[rest].copy_(tensor)
            elif kind == "best":
                self.best[rest] = tensor
            elif kind == "moment":
                number, _, key = rest.partition(".")
                state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
        for name, part in self._parts.items():
            part.load_state_dict(about[name])
        self.points = about["points"]
        torch.set_rng_state(tensors["random.cpu"])
        if torch.cuda.is_available() and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return True


def _random_states() -> dict[str, torch.Tensor]:
    """Give the states that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states
