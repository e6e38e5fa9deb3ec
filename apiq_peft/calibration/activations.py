"""Activations between blocks: one tensor for each batch, in memory or in files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """The hidden states of all batches, of fixed shapes, overwritten block by block.

    With a folder they lie in files that are mapped into memory, so that the system may drop them.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        dtype: torch.dtype,
        folder: Path | None = None,
        name: str = "activations",
    ) -> None:
        self._tensors = [
            torch.empty(shape, dtype=dtype)
            if folder is None
            else _mapped(folder / f"{name}-{number:05d}.bin", shape, dtype)
            for number, shape in enumerate(shapes)
        ]

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, index: int) -> torch.Size:
        """Give the shape of the states of one batch."""
        return self._tensors[index].shape

    def get(self, index: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Give the states of one batch on a device, in a dtype."""
        return self._tensors[index].to(device, dtype)

    def put(self, index: int, states: Tensor) -> None:
        """Keep the states of one batch.

        Raises:
            ValueError: they have another shape than those before.
        """
        held = self._tensors[index]
        if held.shape != states.shape:
            raise ValueError(
                f"a block gives states of shape {tuple(states.shape)} for inputs of"
                f" {tuple(held.shape)}; only blocks that keep the shape can be calibrated"
            )
        held.copy_(states.detach())


def _mapped(path: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = math.prod(shape)
    with path.open("wb") as file:
        try:
            file.truncate(size * dtype.itemsize)
            if size and hasattr(os, "posix_fallocate"):  # a write to a full disk is no exception
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        except OSError as error:
            path.unlink()
            raise OSError(
                error.errno,
                f"{path}: no room for {size * dtype.itemsize} bytes of activations"
                f" ({error.strerror}); free some, or choose another cache_dir",
            ) from error
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
