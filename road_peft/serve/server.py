"""Running the application: signals first drain it, then end it."""

from __future__ import annotations

import asyncio
from types import FrameType

import uvicorn

from road_peft.serve.engine import Engine


class DrainingServer(uvicorn.Server):
    """Goes on listening while the requests there are finish: /health tells, new ones are refused.

    uvicorn alone closes its sockets at once and ends by the signal. Here the first SIGTERM or
    SIGINT drains, a second one ends at once, and the process exits with 0 either way.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._told = False

    async def startup(self, *arguments: object, **options: object) -> None:
        """Note the event loop, for the handler of signals."""
        self._loop = asyncio.get_running_loop()
        await super().startup(*arguments, **options)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end if that has begun."""
        if self._told or self._loop is None:
            self.should_exit = True
        else:
            self._told = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        try:
            await self._engine.drain(self._engine.options.drain_seconds)
        finally:
            self.should_exit = True
