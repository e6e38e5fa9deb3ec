"""Values that are not finite: where they begin, and the state to go back to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_RETRY_RATE = 0.1
_log = logging.getLogger(__name__)


class CalibrationError(RuntimeError):
    """A calibration that cannot go on: where, and what to do."""


class LastSound:
    """The values that parameters had when all of them were last known to be finite.

    `rate` is what learning rates are to be multiplied by: a tenth once values were restored.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters, self.rate = parameters, 1.0
        self.keep()

    def keep(self) -> None:
        """Take the values of now."""
        self._values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def restore(self, wrong: str, advice: str) -> None:
        """Go back to them, since of what came after something is `wrong`.

        Raises:
            CalibrationError: it happens a second time.
        """
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.copy_(value)
        if self.rate < 1:
            raise CalibrationError(f"{wrong}, also at a tenth of the learning rate; {advice}")
        _log.warning("%s; going on from the epoch before at a tenth of the learning rate", wrong)
        self.rate = _RETRY_RATE


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
