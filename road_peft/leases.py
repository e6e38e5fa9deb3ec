"""What a bank keeps account of and hands out: slots, entries, leases, numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from road_peft.adapter_values import AdapterValues


class UnknownAdapterError(LookupError):
    """No adapter of that name is registered."""


class BankFullError(RuntimeError):
    """Every slot is in use or pinned."""


@dataclass(eq=False)
class Slot:
    index: int
    uses: int = 0
    entry: Entry | None = None  # None while free, or when its adapter was replaced or removed


@dataclass(eq=False)
class Entry:
    """One version of one adapter; a replacement is another entry."""

    name: str
    path: str | None  # None if it came from memory and cannot be read again
    values: AdapterValues | None = None
    slot: Slot | None = None
    pins: bool = False
    reading: bool = False


@dataclass(eq=False)
class Lease:
    """The right to a slot: until `release`, it holds one version of one adapter.

    Also a context manager. `slot` is what `rotate_by_slot` takes, -1 for no adapter.
    """

    name: str
    slot: int
    _held: Slot | None = field(repr=False)
    _give_back: Callable[[Slot], None] = field(repr=False)

    def release(self) -> None:
        """Give the slot back; a second time does nothing."""
        held, self._held = self._held, None
        if held is not None:
            self._give_back(held)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


@dataclass(frozen=True)
class BankMemory:
    """What a bank holds, in bytes of tensors and in numbers."""

    table_bytes: int  # all slots, on the device, allocated once
    slot_bytes: int  # one of them
    host_bytes: int  # values in the host's memory
    slots: int
    slots_used: int
    slots_held: int  # under a lease now
    slots_pinned: int
    host_adapters: int
    registered: int
    loads: int  # slots written since the start
    reads: int  # files read
    evictions: int  # adapters that lost their slot to another
