"""Finished blocks on disk: what a calibration that was interrupted goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apiq_peft.calibration.student import Solution
from apiq_peft.quantizer import Codes

_RUN = "calibration.json"
_CODES = tuple(f.name for f in fields(Codes))
_FACTORS = ("lora_A", "lora_B", "high_clip", "low_clip")


class BlockFiles:
    """A folder with a file for each finished block, and one that says what the run is.

    A file appears whole, by renaming, or not at all.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Open or make the folder for a run that `run` describes.

        Raises:
            ValueError: the folder belongs to another run, or its description cannot be read.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run, indent=2, sort_keys=True)
        path = folder / _RUN
        if not path.exists():
            _write(path, text.encode())
            return
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}); delete the folder") from error
        now = json.loads(text)
        other = sorted(k for k in before.keys() | now if before.get(k) != now.get(k))
        if other:
            raise ValueError(
                f"{folder} holds a calibration with another {', '.join(other)}; give the same"
                " settings, samples and model to resume it, or choose another folder"
            )

    def load(self, block: str, layers: Mapping[str, Tensor]) -> dict[str, Solution] | None:
        """Give the solutions of a finished block, None if it is not finished.

        Raises:
            ValueError: the file cannot be read, or is of other weights than `layers`.
        """
        path = self._path(block)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                digests = json.loads((file.metadata() or {})["weights"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it") from error
        for name, weight in layers.items():
            if digests.get(name) != digest(weight):
                raise ValueError(
                    f"{path} is of a model whose {name} has other weights; choose another folder"
                )
        return {
            name: Solution(
                Codes(*(held[f"{name}.{part}"] for part in _CODES)),
                *(held[f"{name}.{part}"] for part in _FACTORS),
            )
            for name in layers
        }

    def save(
        self, block: str, solutions: Mapping[str, Solution], layers: Mapping[str, Tensor]
    ) -> None:
        """Write a finished block."""
        tensors = {
            f"{name}.{part}": getattr(source, part).contiguous()
            for name, solution in solutions.items()
            for source, parts in ((solution.codes, _CODES), (solution, _FACTORS))
            for part in parts
        }
        weights = json.dumps({name: digest(weight) for name, weight in layers.items()})
        path = self._path(block)
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, {"weights": weights})
        os.replace(part, path)

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.safetensors"


def digest(tensor: Tensor) -> str:
    """Give a short fingerprint of a tensor's bytes."""
    held = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(held.tobytes(), digest_size=16).hexdigest()


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
