"""One adapter per row of a batch, by name: PEFT's argument `adapter_names`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from road_peft.routing import Route, Routing

BASE = "__base__"  # in a list of names: no adapter

# where transformers, and torch's checkpoint wrapper (as accelerate uses it), keep the function
_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")
_BINDING = threading.Lock()  # while these functions are exchanged, in whatever model


class Rows:
    """The adapters of the rows of a batch, however `generate` or a block lays rows out.

    A decoder sees a row as often as it is repeated, an encoder once. Some blocks (OPT's) flatten
    (rows, tokens) before a linear layer; then a row stands for its tokens. A slot is the place of a
    name in `names`. Tables are kept for as long as the rows, unless gradients are wanted: a
    generation builds them once. On a CPU, if that at most doubles them, these tables have one entry
    for each row, in order: a step of decoding then reads them in place and gathers nothing.
    """

    def __init__(self, adapter_names: Sequence[str], repeats: int = 1) -> None:
        if not adapter_names:
            raise ValueError("there are no adapter_names; give one for each row")
        self.adapter_names, self.repeats = list(adapter_names), repeats
        self.names: Sequence[str] = [n for n in dict.fromkeys(adapter_names) if n != BASE]
        self.tokens_per_row = 1
        self._place({name: slot for slot, name in enumerate(self.names)})
        self._tensors: dict[Any, Tensor] = {}
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def _place(self, places: Mapping[str, int]) -> None:
        self._slots = [places.get(name, -1) for name in self.adapter_names]
        self._few_repeat = len(self._slots) <= 2 * len(set(self._slots) - {-1})

    def slots(self, layer: Any, x: Tensor) -> Tensor:
        """Give one slot for each of the rows of `x`.

        Raises:
            ValueError: `x` has a number of rows that these names do not explain.
        """
        one_each, compiling = self._one_each(x), torch.compiler.is_compiling()
        key = None if compiling else (one_each, x.shape[0], x.dim(), self.tokens_per_row, x.device)
        if key in self._tensors:  # the same for all layers and steps
            return self._tensors[key]
        copies = self._copies(x)
        if copies is None:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.adapter_names)} and {len(x)} respectively."
            )
        values = list(range(len(self._slots))) if one_each else self._slots
        slots = torch.tensor(self._repeated(values, copies), dtype=torch.int64, device=x.device)
        if not compiling:
            self._tensors[key] = slots
        return slots

    def table(self, layer: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the table of `layer`, for data like `like`, with all slots that `slots` gives."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._table(layer, like, False)
        key = (layer, like.dtype, like.device)
        if key not in self._tables:
            self._tables[key] = self._table(layer, like, self._one_each(like))
        return self._tables[key]

    def _table(self, layer: Any, like: Tensor, one_each: bool) -> tuple[Tensor, Tensor]:
        return layer.coefficient_table(self.adapter_names if one_each else self.names, like)

    def _one_each(self, like: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return self._few_repeat and like.device.type == "cpu"

    def rows_of(self, slot: int, layer: Any, x: Tensor) -> Tensor:
        """Give the positions of the rows of `x` that have this slot."""
        slots = self._repeated(self._slots, self._copies(x) or 1)
        places = [place for place, other in enumerate(slots) if other == slot]
        return torch.tensor(places, dtype=torch.int64, device=x.device)

    def note_shape(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-hook of a model: remember how many tokens a row has."""
        for value in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1]):
            if isinstance(value, Tensor) and value.dim() > 1:
                self.tokens_per_row = value.shape[1]
                break

    def add_names(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Pre-hook of one of PEFT's modules to save: hand it one name per row of its input."""
        copies = (self._copies(args[0]) if args else 1) or 1
        names = self._repeated(self.adapter_names, copies)
        # not every adapter has a copy of its own
        names = [name if name in module._adapters else BASE for name in names]
        return args, {**kwargs, "adapter_names": names}

    def _copies(self, x: Tensor) -> int | None:
        """Give how many rows of `x` one name stands for, None if the numbers do not fit."""
        allowed = [1, self.repeats]
        if x.dim() == 2:
            allowed += [n * self.tokens_per_row for n in allowed]
        # sizes may be symbolic
        return next((n for n in allowed if len(x) == n * len(self.adapter_names)), None)

    @staticmethod
    def _repeated(values: list[Any], copies: int) -> list[Any]:
        return [value for value in values for _ in range(copies)]


@contextmanager
def route_rows(model: nn.Module, routing: Routing, rows: Rows) -> Iterator[None]:
    """Make row i of every layer inside `model` use the i-th adapter of `rows`.

    Modules to save are switched by row too. What gradient checkpointing recomputes in the backward,
    after this context, finds the same rows. Other threads, with rows of their own, are not touched.
    Nothing stays on the model afterwards, whatever the body raises.
    """
    with _Followers(model, routing).follow(rows):
        yield


class _Followers:
    """The modules of a model, beside RoAd layers, that must know of the rows of a batch."""

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self.routing = routing
        modules = list(model.modules())
        self.switched = [m for m in modules if isinstance(m, AuxiliaryTrainingWrapper)]
        self.shaped: list[nn.Module] = []
        self.checkpoints: list[tuple[nn.Module, str]] = []
        if not torch.compiler.is_compiling():  # hooks cannot be traced
            self.shaped = [m for m in modules if isinstance(m, PreTrainedModel)]
            self.checkpoints = [(m, n) for m in modules for n in _CHECKPOINTS if n in vars(m)]

    @contextmanager
    def follow(self, route: Route) -> Iterator[None]:
        """Put `route` in force in this thread, and whatever is recomputed later as well."""
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        if isinstance(route, Rows):
            hooks += [(module, route.add_names) for module in self.switched]
            hooks += [(module, route.note_shape) for module in self.shaped]

        def here(hook: Callable[..., Any], *call: Any) -> Any:
            return hook(*call) if self.routing.current is route else None

        with self.routing.use(route), ExitStack() as stack:
            for module, hook in hooks:
                stack.enter_context(_hooked(module, partial(here, hook)))
            if self.checkpoints and torch.is_grad_enabled():
                stack.enter_context(self._bound())
            yield

    @contextmanager
    def _bound(self) -> Iterator[None]:
        """Make checkpoints remember the route; the last of several threads takes this back."""
        held = []
        with _BINDING:
            for module, name in self.checkpoints:
                function = vars(module)[name]
                if not (
                    isinstance(function, _Checkpoint)
                    and function.followers.routing is self.routing  # else what it follows is other
                ):
                    function = vars(module)[name] = _Checkpoint(function, self)
                function.users += 1
                held.append((module, name, function))
        try:
            yield
        finally:
            with _BINDING:
                for module, name, function in held:
                    function.users -= 1
                    if not function.users:
                        vars(module)[name] = function.checkpoint


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Keep a forward pre-hook on `module`, also where torch.compile traces this."""
    if not torch.compiler.is_compiling():
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return
    forward = module.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook(module, args, kwargs)
        return forward(*args, **kwargs)

    vars(module)["forward"] = hooked
    try:
        yield
    finally:
        del vars(module)["forward"]


class _Checkpoint:
    """A checkpoint function that recomputes under the route under which it was called."""

    def __init__(self, checkpoint: Callable[..., Any], followers: _Followers) -> None:
        self.checkpoint, self.followers, self.users = checkpoint, followers, 0

    def __call__(self, body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        route = self.followers.routing.current
        if route is None:
            return self.checkpoint(body, *args, **kwargs)

        def run(*inputs: Any, **options: Any) -> Any:
            with self.followers.follow(route):
                return body(*inputs, **options)

        return self.checkpoint(run, *args, **kwargs)


def repeats_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Give how often `generate(*args, **kwargs)` repeats each row, for beams or more sequences."""
    configs = [value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)]
    configs.append(getattr(model, "generation_config", None))
    counts = [1]
    for name in ("num_beams", "num_return_sequences"):
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        counts.append(next((value for value in values if value is not None), 1))
    return max(counts)
