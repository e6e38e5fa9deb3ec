"""Waiting for slots without a thread for each who waits."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from road_peft.bank import RoadBank
from road_peft.leases import BankFullError, Lease
from road_peft.serve.errors import ApiError, unavailable

_PATIENCE = 0.5  # seconds the first in the queue is overtaken, at most
_LOOK = 0.2  # seconds between looks at the bank, should nobody tell of a free slot


class SlotQueue:
    """Hands out leases of a bank in the order of asking, from one event loop.

    Those who wait for the same adapter are served together. A newcomer whose adapter is in a slot
    already need not wait, until the first in the queue has waited for half a second: then all line
    up, so nobody starves. Only reading and loading take a thread.
    """

    def __init__(self, bank: RoadBank, pool: ThreadPoolExecutor) -> None:
        self._bank, self._pool = bank, pool
        self._waiting: dict[str, deque[asyncio.Future[Lease]]] = {}
        self._since: dict[str, float] = {}  # when the first of an adapter came, the oldest first
        self._freed = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def lease(self, name: str | None, timeout: float) -> Lease:
        """Hold the adapter in a slot, waiting up to `timeout` seconds for one; None for the base.

        Raises:
            ApiError: no slot became free in time.
            LookupError, ValueError: see `RoadBank.acquire`.
        """
        if name is None:
            return self._bank.acquire(None)
        if name not in self._waiting and not self._impatient():
            try:
                return await self._acquire(name)
            except BankFullError:
                pass
        return await self._in_line(name, timeout)

    def wake(self) -> None:
        """Tell that a slot may have become free."""
        self._freed.set()

    def fail(self, error: Exception) -> None:
        """Send all away who wait."""
        waiting = [future for queue in self._waiting.values() for future in queue]
        self._waiting.clear()
        self._since.clear()
        for future in waiting:
            future.set_exception(error)
        self.wake()

    async def close(self) -> None:
        """End; nobody may wait any more."""
        if self._serving is not None:
            await self._serving

    def _impatient(self) -> bool:
        first = next(iter(self._since.values()), None)
        return first is not None and time.monotonic() - first > _PATIENCE

    async def _acquire(self, name: str) -> Lease:
        """Acquire in a thread; a lease that comes when nobody waits for it any more is returned."""
        work = asyncio.get_running_loop().run_in_executor(self._pool, self._bank.acquire, name)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_give_back)
            raise

    async def _in_line(self, name: str, timeout: float) -> Lease:
        future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, deque()).append(future)
        self._since.setdefault(name, time.monotonic())
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        try:
            await asyncio.wait({future}, timeout=timeout)
            if future.done():
                return future.result()
            raise no_slot(name, timeout)
        except BaseException:
            self._leave(name, future)
            raise

    def _leave(self, name: str, future: asyncio.Future[Lease]) -> None:
        queue = self._waiting.get(name, ())
        if future in queue:
            self._remove(name, future)
        elif future.done():
            _give_back(future)

    def _remove(self, name: str, future: asyncio.Future[Lease]) -> None:
        self._waiting[name].remove(future)
        if not self._waiting[name]:
            del self._waiting[name], self._since[name]

    async def _serve(self) -> None:
        """Serve the queue until it is empty."""
        while self._waiting:
            self._freed.clear()
            name = next(iter(self._waiting))
            try:
                lease = await self._acquire(name)
            except BankFullError:
                await _either(self._freed, _LOOK)
            except Exception as error:  # noqa: BLE001 - it is raised where the adapter was asked for
                for future in list(self._waiting.get(name, ())):
                    self._remove(name, future)
                    future.set_exception(error)
            else:
                if name in self._waiting:
                    future = self._waiting[name][0]
                    self._remove(name, future)
                    future.set_result(lease)
                else:  # all who wanted it have left meanwhile
                    lease.release()


def no_slot(name: str, seconds: float) -> ApiError:
    """Tell that waiting for a slot was in vain."""
    return unavailable(f"no slot became free for {name!r} in {seconds:.3g} seconds", "no_slot")


def _give_back(work: asyncio.Future[Lease]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().release()


async def _either(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event or the time, whichever comes first."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except asyncio.TimeoutError:
        return
