"""Which adapter each row of a batch takes: what layers ask for, and where they find it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from road_peft.layer import RoadLayer


class Route(Protocol):
    """The slots of one batch, and the coefficients behind them.

    `names` are the adapters of slots 0, 1, ... as far as a layer may have a LoRA for them.
    """

    names: Sequence[str]

    def slots(self, layer: RoadLayer, x: Tensor) -> Tensor:
        """Give the slot of every row or token of `x`, the input of `layer`; -1 for no adapter."""
        ...

    def table(self, layer: RoadLayer, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the coefficients and group sizes of all slots, as `rotate_by_slot` takes them.

        `like` is the output of the layer's base.
        """
        ...

    def rows_of(self, slot: int, layer: RoadLayer, x: Tensor) -> Tensor:
        """Give the positions of `slot` in the flattened `slots(layer, x)`."""
        ...


class Routing(threading.local):
    """The route in force, one for each thread; all layers of a model share one of these.

    No route means that every row takes the active adapters. `kept` holds their coefficients while
    these cannot change, so that a step of generation need not compute them again. A copy or a
    pickle is a fresh one.
    """

    def __init__(self) -> None:  # again in each thread; a graph looks for instance attributes
        self.current: Route | None = None
        self.kept: dict[Any, tuple[Tensor, Tensor]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    @contextmanager
    def use(self, route: Route | None) -> Iterator[None]:
        """Put `route` in force in this thread, and what was before back at the end."""
        before = self.current
        self.current = route
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep coefficients that were computed without gradients until the end."""
        before = self.kept
        self.kept = {}
        try:
            yield
        finally:
            self.kept = before
