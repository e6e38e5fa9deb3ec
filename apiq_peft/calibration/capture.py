"""What the model hands to its blocks: hidden states, and every other argument of each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apiq_peft.calibration.activations import Cache
from apiq_peft.calibration.stacks import Stack
from apiq_peft.fingerprint import digest

Batch = Mapping[str, Tensor]


@dataclass
class Call:
    """The arguments of one block for one batch, without its hidden states; on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        """Give the states that `block` makes of `states`, whether it returns them bare or first."""
        args, kwargs = _beside_states((self.args, self.kwargs), states)
        return first_of(block(states, *args, **kwargs))


def _beside_states(value: Any, states: Tensor) -> Any:
    """Give tensors on the device of the states, masks and position embeddings in their dtype."""
    if isinstance(value, Tensor):
        return value.to(states) if value.is_floating_point() else value.to(states.device)
    if isinstance(value, tuple | list):
        return type(value)(_beside_states(v, states) for v in value)
    if isinstance(value, dict):
        return {name: _beside_states(v, states) for name, v in value.items()}
    return value


def first_of(output: Any) -> Tensor:
    """Give the hidden states among what a block returns.

    Raises:
        TypeError: it returns neither a tensor nor a tuple that starts with one.
    """
    states = output[0] if isinstance(output, tuple) else output
    if not isinstance(states, Tensor):
        raise TypeError(
            f"a block returns {type(output).__name__}; its hidden states must be a tensor, or the"
            " first of a tuple"
        )
    return states


class _Recorder(nn.Module):
    """Stands for a block: notes its arguments, and passes the states on unchanged.

    What a block returns beside its states (T5's first block computes the position bias for all) is
    that of the first block, which therefore runs; the others need no weights.
    """

    def __init__(self, block: nn.Module, calls: list[Call], beside: Beside, first: bool) -> None:
        super().__init__()
        self._block, self._calls, self._beside, self._first = [block], calls, beside, first
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # models read attributes of blocks (attention_type)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _states_first(args, kwargs)
        self._calls.append(Call(args[1:], dict(kwargs)))
        if self._first:
            self.states = args[0]
            self._beside.note(self._block[0](*args, **kwargs))
        return self._beside.with_states(args[0])


class _Finished(_Recorder):
    """Stands for a block of an earlier stack: gives the final states of that stack."""

    def __init__(self, block: nn.Module, states: Tensor, beside: Beside) -> None:
        super().__init__(block, [], beside, False)
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.states is not None
        args, kwargs = _states_first(args, kwargs)
        return self._beside.with_states(self.states.to(args[0]))


@dataclass
class Beside:
    """What a stack's blocks return beside their states: nothing, or the rest of a tuple."""

    rest: tuple[Any, ...] | None = None

    def note(self, output: Any) -> None:
        """Take over what a block returned."""
        self.rest = output[1:] if isinstance(output, tuple) else None

    def with_states(self, states: Tensor) -> Any:
        """Give states as a block would return them."""
        return states if self.rest is None else (states, *self.rest)


def _states_first(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return args, kwargs
    kwargs = dict(kwargs)
    return (kwargs.pop("hidden_states"),), kwargs


class _EnoughError(Exception):
    """Raised to leave the model's forward once all blocks were seen."""


@dataclass(frozen=True)
class Given:
    """A stack that is done: its final states by the number of a batch."""

    stack: Stack
    states: Callable[[int], Tensor]
    beside: Beside


@dataclass(frozen=True)
class Captured:
    """What a model hands to a stack.

    `calls` has for every block the call of each batch; `masks` the attention mask (samples, length)
    of each batch, for the rows of the states and for those of an encoder that this stack looks at.
    """

    calls: list[list[Call]]
    masks: list[Masks]
    beside: Beside


Masks = tuple[Tensor | None, Tensor | None]


@torch.no_grad()
def capture(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Batch],
    given: Sequence[Given],
    device: torch.device,
    cache: Cache,
    enter: Callable[[Tensor], None],
) -> Captured:
    """Run the model around `stack` and note what its blocks would get.

    `enter` takes the states that enter the first block, batch by batch; the other arguments are
    kept in `cache`, equal tensors once. Of all blocks only the first of `stack` runs.
    """
    found = Captured([[] for _ in stack.blocks], [], Beside())
    pool = _Pool(cache, stack.name)
    for number, batch in enumerate(batches):
        noted: list[list[Call]] = [[] for _ in stack.blocks]
        recorders = [
            _Recorder(block, noted[index], found.beside, index == 0)
            for index, block in enumerate(stack.blocks)
        ]
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with giving(given, number), _replaced(stack, recorders), _stop_after(recorders[-1]):
            model(**inputs, use_cache=False)
        entered = recorders[0].states
        assert entered is not None
        enter(entered)
        found.masks.append(_masks(batch, entered, later=bool(given)))
        with pool.of_one_batch() as intern:
            for block_calls, seen in zip(found.calls, noted, strict=True):
                block_calls.append(Call(intern(seen[0].args), intern(seen[0].kwargs)))
    return found


def _masks(batch: Batch, states: Tensor, later: bool) -> Masks:
    """Give the masks of a batch that say which rows of the states are real, if some are not."""
    padding = batch.get("attention_mask")
    if not (later and any(name.startswith("decoder_") for name in batch)):
        own, other = padding, None
    else:
        own, other = batch.get("decoder_attention_mask"), padding
    if own is not None and own.shape != states.shape[:2]:
        own = None
    if other is not None and other.dim() != 2:
        other = None
    return (
        None if own is None or bool((own != 0).all()) else own,
        None if other is None or bool((other != 0).all()) else other,
    )


@contextmanager
def giving(given: Sequence[Given], number: int) -> Iterator[None]:
    """Put the states that are known for batch `number` in the place of what stacks would give.

    Their blocks do not run and need no weights.
    """
    with ExitStack() as replaced:
        for each in given:
            states = each.states(number)
            blocks = [_Finished(block, states, each.beside) for block in each.stack.blocks]
            replaced.enter_context(_replaced(each.stack, blocks))
        yield


@contextmanager
def _replaced(stack: Stack, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    """Put other modules in the place of the blocks."""
    blocks = list(stack.blocks)
    try:
        for index, stand_in in enumerate(stand_ins):
            stack.blocks[index] = stand_in
        yield
    finally:
        for index, block in enumerate(blocks):
            stack.blocks[index] = block


@contextmanager
def _stop_after(module: nn.Module) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _EnoughError

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _EnoughError:
        pass
    finally:
        handle.remove()


class _Pool:
    """Keeps one of several equal tensors."""

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache, self._name = cache, name
        self._held: dict[Any, Tensor] = {}
        self._seen: dict[int, Tensor] = {}

    @contextmanager
    def of_one_batch(self) -> Iterator[Callable[[Any], Any]]:
        """Give what takes the arguments of blocks, among which the same tensors return."""
        try:
            yield self._intern
        finally:
            self._seen.clear()

    def _intern(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._seen:
                self._seen[id(value)] = self._one(value)
            return self._seen[id(value)]
        if isinstance(value, tuple | list):
            return type(value)(self._intern(v) for v in value)
        if isinstance(value, dict):
            return {name: self._intern(v) for name, v in value.items()}
        return value

    def _one(self, value: Tensor) -> Tensor:
        key = (value.shape, value.dtype, digest(value))
        if key not in self._held:
            name = f"{self._name}-argument-{len(self._held):05d}"
            self._held[key] = self._cache.keep(value, name)
        return self._held[key]
