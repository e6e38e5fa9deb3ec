"""A batch in the middle of its generation: one decode step, repeatable from the same cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks._measure import Stages, graphed, operations
from benchmarks._models import VOCABULARY
from benchmarks._serving import Server


@dataclass(frozen=True)
class Context:
    """What all providers decode from: a token of every row, and the keys and values before it."""

    ids: Tensor
    past: tuple[tuple[Tensor, Tensor], ...]  # of every block

    @classmethod
    def random(cls, base: Any, rows: int, tokens: int) -> Context:
        """Give `rows` rows with `tokens` tokens in the cache, for the model `base`."""
        config, like = base.config, next(base.parameters())
        shape = (rows, config.num_key_value_heads, tokens, config.head_dim)
        return cls(
            torch.randint(1, VOCABULARY, (rows, 1), device=like.device),
            tuple(
                (like.new_empty(shape).normal_(), like.new_empty(shape).normal_())
                for _ in range(config.num_hidden_layers)
            ),
        )


class Session:
    """One batch on one server. `open` starts it; steps then find what it has prepared.

    A step leaves the cache as it was, so all steps are alike.
    """

    def __init__(self, server: Server, names: Sequence[str], context: Context) -> None:
        self._server, self._names, self._context = server, list(names), context
        self._cache = DynamicCache()
        for block, (keys, values) in enumerate(context.past):
            self._cache.update(keys, values, block)
        self._rewind()
        self._inside = ExitStack()
        self._replay: Callable[[], None] | None = None

    def open(self) -> None:
        """Hand the names over and make a first step, which builds tables and the like."""
        self.close()
        self._inside.enter_context(self._server.rows(self._names))
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of every row."""
        self._server.model(input_ids=self._context.ids, past_key_values=self._cache, use_cache=True)
        self._rewind()

    def capture(self) -> None:
        """Capture the step of an open session in a CUDA graph."""
        self._replay = graphed(self.step, self._context.ids.device)

    def replay(self) -> None:
        """Decode one token of every row by the captured step."""
        assert self._replay is not None
        self._replay()

    def close(self) -> None:
        """Take the names back."""
        self._replay = None  # reads what the end of the context frees
        self._inside.close()

    def operations(self) -> int:
        """Count the operations of a step that is not the first."""
        self.open()
        count = operations(self.step)
        self.close()
        return count

    def stages(self, mode: str, first: str, captured: bool) -> Stages:
        """Give the stages of a sample: open, a step called `mode`, and one from a graph."""
        stages: dict[str, Callable[[], object]] = {first: self.open, mode: self.step}
        if captured and self._context.ids.device.type == "cuda":
            stages |= {"_capture": self.capture, "graph": self.replay}
        return stages

    def _rewind(self) -> None:
        for layer, pair in zip(self._cache.layers, self._context.past, strict=True):
            layer.keys, layer.values = pair


@contextmanager
def closing(sessions: Sequence[Session]) -> Iterator[None]:
    """Close all sessions at the end."""
    try:
        yield
    finally:
        for session in sessions:
            session.close()
