"""One request from admission to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from road_peft.serve.errors import ApiError, unavailable
from road_peft.serve.protocol import Sampling
from road_peft.serve.text import Detokeniser, StopStrings

if TYPE_CHECKING:
    from road_peft.serve.engine import Engine


class Job:
    """Holds a place in the queue, then a lease and a request of the batch, until `close`.

    Lives in the event loop. `error` ends it wherever it waits.
    """

    def __init__(self, engine: Engine, name: str, seconds: float) -> None:
        self._engine, self.id = engine, name
        self.began = time.perf_counter()
        self.first_token: float | None = None  # when it came, on the same clock
        self.prompt_tokens = self.generated_tokens = 0
        self.finish_reason = "length"
        self.running = False
        self.error: ApiError | None = None
        self._sampling: Sampling | None = None
        self._output: Any = None  # the latest; each holds all tokens so far
        self._news = asyncio.Event()
        self._closed = False
        loop = asyncio.get_running_loop()
        self._deadline = loop.time() + seconds
        late = unavailable(f"the request took longer than {seconds:.3g} seconds", "timeout")
        self._alarm = loop.call_at(self._deadline, self.fail, late)

    # ---- what the engine tells ----------------------------------------------------------------

    def feed(self, output: Any) -> None:
        """Take over what has been generated so far."""
        self._output = output
        self.generated_tokens = len(output.generated_tokens)
        if self.first_token is None and self.generated_tokens:
            stamps = output.timestamps
            self.first_token = stamps[0] if stamps else time.perf_counter()
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End with an error, unless it has one already."""
        self.error = self.error or error
        self._news.set()

    # ---- what the application asks for --------------------------------------------------------

    async def start(self, adapter: str | None, prompt: Sequence[int], sampling: Sampling) -> None:
        """Wait for the adapter, then begin to generate.

        Raises:
            ApiError: the prompt is too long, the adapter cannot be served, or no slot became free.
        """
        limit = self._engine.new_tokens(len(prompt), sampling.max_tokens)
        self.prompt_tokens, self._sampling = len(prompt), sampling
        left = self._deadline - asyncio.get_running_loop().time()
        lease = await self._engine.lease(adapter, left)
        if self.error is not None:
            lease.release()
            raise self.error
        self._engine.begin(self, lease, prompt, sampling, limit)
        self.running = True

    async def text(self) -> str:
        """Give the whole text."""
        return "".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[str]:
        """Give the text as it comes; afterwards `finish_reason` says why it ended.

        Raises:
            ApiError: generation failed, or the request took too long.
        """
        assert self._sampling is not None
        words, stops = Detokeniser(self._engine.tokenizer), StopStrings(self._sampling.stop)
        while True:
            await self._news.wait()
            self._news.clear()
            if self.error is not None:
                raise self.error
            output, ended = self._output, self._output.is_finished()
            if output.error is not None:
                raise unavailable(f"generation failed: {output.error}", "generation_failed")
            ids = output.generated_tokens
            at_eos = ended and bool(ids) and ids[-1] in self._engine.eos_ids
            piece = words.feed(ids[:-1] if at_eos else ids, last=ended)
            text, stopped = stops.feed(piece, last=ended)
            if text:
                yield text
            if ended or stopped:
                self.finish_reason = "stop" if at_eos or stopped else "length"
                return

    def close(self) -> None:
        """Give everything back, whatever state it is in; a second time does nothing."""
        if not self._closed:
            self._closed = True
            self._alarm.cancel()
            ended = self._output is not None and self._output.is_finished()
            self._engine.end(self, cancel=self.running and not ended)
