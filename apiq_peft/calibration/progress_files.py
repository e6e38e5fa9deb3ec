"""Finished blocks on disk: what a calibration that was interrupted goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from apiq_peft.calibration.capture import Batch
from apiq_peft.calibration.settings import Calibration
from apiq_peft.calibration.student import Solution
from apiq_peft.config import ApiQConfig
from apiq_peft.fingerprint import digest
from apiq_peft.quantizer import Codes

_RUN = "calibration.json"
_CODES = tuple(f.name for f in fields(Codes))
_NOT_OF_BLOCKS = ("cache_dir", "final_epochs", "final_lr", "shared")
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
            with appearing(path) as part:
                part.write_text(text)
            return
        before = _read(path)
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
        write_whole(self._path(block), tensors, {"weights": weights})

    def _path(self, block: str) -> Path:
        return _path(self.folder, block)


def describe(
    batches: Sequence[Batch], config: ApiQConfig, settings: Calibration, step_batches: int
) -> dict[str, Any]:
    """Say what the blocks of a calibration depend on, so that another is not mistaken for it.

    The last pass begins from them, so its settings may be others when a call is repeated.
    """
    samples = [digest(batch[name]) for batch in batches for name in sorted(batch)]
    adapter = {k: v for k, v in config.to_dict().items() if k != "base_model_name_or_path"}
    return {
        "adapter": {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.items()},
        "settings": {k: v for k, v in asdict(settings).items() if k not in _NOT_OF_BLOCKS}
        | {"step_batches": step_batches},
        "samples": samples,
    }


def step_batches_of(folder: Path) -> int | None:
    """Give the batches of a step of the calibration that a folder holds; None if it holds none.

    Raises:
        ValueError: the description of that calibration cannot be read.
    """
    path = folder / _RUN
    if not path.exists():
        return None
    return _read(path)["settings"].get("step_batches")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(found["settings"], dict):
            raise TypeError("its settings are none")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete the folder") from error
    return found


def read_part(folder: Path, block: str, name: str) -> Tensor:
    """Give one tensor of a finished block: `layer.lora_A` and so on."""
    with safe_open(_path(folder, block), "pt") as file:
        return file.get_tensor(name)


def _path(folder: Path, block: str) -> Path:
    return folder / f"{block}.safetensors"


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that appears when it is complete, or not at all.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    with appearing(path) as part:
        save_file(dict(tensors), part, metadata)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give a file to write that becomes `path`, or disappears if that fails."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        number = (error.errno,) if isinstance(error, OSError) else ()
        raise OSError(
            *number,
            f"{path} cannot be written ({error}); make room or choose another folder, then repeat"
            " the call, which goes on after the last block that is complete",
        ) from error
    finally:
        part.unlink(missing_ok=True)
