"""Values that are not finite: where they begin, and the state to go back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

RETRY_RATE = 0.1  # of the learning rates, after the first step that was not finite


class CalibrationError(RuntimeError):
    """A calibration that cannot go on: where, and what to do."""


class LastSound:
    """The values that parameters had when all of them were last known to be finite."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self.keep()

    def keep(self) -> None:
        """Take the values of now."""
        self._values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to them."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.copy_(value)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no value of some tensors of one device is infinite or not a number."""
    return bool(torch.stack([torch.isfinite(t.detach()).all() for t in tensors]).all())


def first_not_finite(
    layers: Mapping[str, nn.Module], run: Callable[[int], Any], batches: Sequence[int]
) -> str | None:
    """Give the name of the first layer whose output is not finite while `run` runs some batches.

    None if they all give finite values, and what is not comes from elsewhere.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if not found and not all_finite([output]):
                found.append(name)

        return hook

    with torch.no_grad(), _hooked(layers, watch):
        for batch in batches:
            run(batch)
    return found[0] if found else None


@contextmanager
def _hooked(
    layers: Mapping[str, nn.Module], hook_of: Callable[[str], Callable[..., None]]
) -> Iterator[None]:
    handles = [m.register_forward_hook(hook_of(name)) for name, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_layer(name: str | None) -> str:
    """Say in a message which layer it was, if that is known."""
    return "" if name is None else f", in layer {name}"
