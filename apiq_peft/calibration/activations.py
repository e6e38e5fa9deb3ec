"""Activations between blocks: one tensor for each batch, in memory or in files."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class Cache:
    """Where tensors wait until they are computed with: in the memory of the CPU, or in files.

    With a folder the files are mapped into memory, so that the system may drop them, and lose their
    names at once: their room is free again when the tensors are gone, however the process ends, and
    calibrations with the same folder do not meet.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def empty(self, shape: torch.Size, dtype: torch.dtype, name: str) -> Tensor:
        """Give a tensor to fill; `name` is that of its file in an error.

        Raises:
            OSError: there is no room for it.
        """
        if self._folder is None:
            return torch.empty(shape, dtype=dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="apiq-", dir=self._folder) as own:
            return _mapped(Path(own) / f"{name}.bin", shape, dtype)

    def keep(self, tensor: Tensor, name: str) -> Tensor:
        """Give a tensor with the same values; the same one if it is where it would be kept."""
        if self._folder is None:
            return tensor.cpu()
        held = self.empty(tensor.shape, tensor.dtype, name)
        return held.copy_(tensor)


class Activations:
    """The hidden states of all batches, each of a fixed shape, overwritten block by block.

    They are kept in `dtype`, by default each in its own.
    """

    def __init__(
        self, cache: Cache, dtype: torch.dtype | None = None, name: str = "activations"
    ) -> None:
        self._cache, self._dtype, self._name = cache, dtype, name
        self._tensors: list[Tensor] = []

    def like(self, name: str) -> Activations:
        """Give others of the same shapes, without values."""
        other = Activations(self._cache, self._dtype, name)
        for held in self._tensors:
            other._add(held.shape, held.dtype)
        return other

    def append(self, states: Tensor) -> None:
        """Keep the states of one more batch.

        Raises:
            OSError: there is no room for them.
        """
        self._add(states.shape, self._dtype or states.dtype).copy_(states.detach())

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, index: int) -> torch.Size:
        """Give the shape of the states of one batch."""
        return self._tensors[index].shape

    def get(self, index: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Give the states of one batch on a device, in a dtype."""
        return self._tensors[index].to(device, dtype)

    def put(self, index: int, states: Tensor) -> None:
        """Replace the states of one batch.

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

    def _add(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        name = f"{self._name}-{len(self._tensors):05d}"
        self._tensors.append(self._cache.empty(shape, dtype, name))
        return self._tensors[-1]


def _mapped(path: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    size = math.prod(shape)
    with path.open("wb") as file:
        try:
            file.truncate(size * dtype.itemsize)
            if size and hasattr(os, "posix_fallocate"):  # a write to a full disk is no exception
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path}: no room for {size * dtype.itemsize} bytes of activations"
                f" ({error.strerror}); free some, or choose another cache_dir",
            ) from error
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
