"""What the model hands to its blocks: hidden states, and every other argument of each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apiq_peft.calibration.stacks import Stack

Batch = Mapping[str, Tensor]


@dataclass
class Call:
    """The arguments of one block for one batch, without its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        """Give the states that `block` makes of `states`, whether it returns them bare or first."""
        args, kwargs = _in_dtype((self.args, self.kwargs), states.dtype)
        return first_of(block(states, *args, **kwargs))


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Give masks and position embeddings in the dtype that a block computes in."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_in_dtype(v, dtype) for v in value)
    if isinstance(value, dict):
        return {name: _in_dtype(v, dtype) for name, v in value.items()}
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
    that of the first block, which therefore runs.
    """

    def __init__(self, block: nn.Module, calls: list[Call], extras: list[Any], first: bool) -> None:
        super().__init__()
        self._block, self._calls, self._extras, self._first = [block], calls, extras, first
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
            output = self._block[0](*args, **kwargs)
            self._extras[:] = output[1:] if isinstance(output, tuple) else [None]
            return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
        return args[0] if self._extras == [None] else (args[0], *self._extras)


def _states_first(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return args, kwargs
    kwargs = dict(kwargs)
    return (kwargs.pop("hidden_states"),), kwargs


class _EnoughError(Exception):
    """Raised to leave the model's forward once all blocks were seen."""


@torch.no_grad()
def capture(
    model: nn.Module,
    stack: Stack,
    batches: Sequence[Batch],
    given: Mapping[str, Callable[[int], Tensor]],
    stacks: Sequence[Stack],
) -> tuple[list[Tensor], list[list[Call]]]:
    """Run the model around `stack` and note what its blocks would get.

    `given` has, by the name of each earlier stack, the final states of a batch. Returns the states
    that enter the first block, and for every block the call of each batch. Equal tensors of
    different batches are kept once.
    """
    states: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in stack.blocks]
    pool = _Pool()
    device = next(model.parameters()).device
    for number, batch in enumerate(batches):
        noted: list[list[Call]] = [[] for _ in stack.blocks]
        extras: list[Any] = []
        recorders = [
            _Recorder(block, noted[index], extras, index == 0)
            for index, block in enumerate(stack.blocks)
        ]
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with (
            _replaced(stack, recorders),
            _giving(stacks, given, number),
            _stop_after(recorders[-1]),
        ):
            model(**inputs, use_cache=False)
        entered = recorders[0].states
        assert entered is not None
        states.append(entered)
        for block_calls, found in zip(calls, noted, strict=True):
            block_calls.append(Call(pool.intern(found[0].args), pool.intern(found[0].kwargs)))
    return states, calls


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
def _giving(
    stacks: Sequence[Stack], given: Mapping[str, Callable[[int], Tensor]], number: int
) -> Iterator[None]:
    """Put the states that are known for batch `number` in the place of what earlier stacks give."""

    def give(states: Callable[[int], Tensor]) -> Callable[..., Any]:
        def hook(block: nn.Module, args: Any, output: Any) -> Any:
            known = states(number).to(first_of(output))
            return (known, *output[1:]) if isinstance(output, tuple) else known

        return hook

    handles = [
        stack.blocks[-1].register_forward_hook(give(given[stack.name]))
        for stack in stacks
        if stack.name in given
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

    def __init__(self) -> None:
        self._held: dict[Any, list[Tensor]] = {}

    def intern(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            held = self._held.setdefault((value.shape, value.dtype), [])
            same = next((t for t in held if t is value or torch.equal(t, value)), None)
            if same is None:
                held.append(value)
            return value if same is None else same
        if isinstance(value, tuple | list):
            return type(value)(self.intern(v) for v in value)
        if isinstance(value, dict):
            return {name: self.intern(v) for name, v in value.items()}
        return value
