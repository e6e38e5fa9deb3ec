"""A bank of adapters for serving: many adapters, few slots, one model.

Adapters are known by name. Their files may lie on disk by the thousand, the values of those in use
in the host's memory, and the coefficients of those being applied in slots: tables on the device,
one for each layer, that `rotate_by_slot` reads.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn

from road_peft.adapter_files import load_adapter_files
from road_peft.adapter_values import AdapterValues
from road_peft.bank_routes import BankRows, SlotRoute
from road_peft.config import RoadConfig
from road_peft.layer import RoadLayer
from road_peft.leases import (
    BankFullError,
    BankMemory,
    Entry,
    Lease,
    Slot,
    UnknownAdapterError,
)
from road_peft.mixed_batch import BASE, route_rows
from road_peft.routing import Routing
from road_peft.shards import layout_of
from road_peft.targets import linear_layers_of_blocks, why_bypassed, wrap

Source = str | Path | tuple[Any, Mapping[str, Tensor]]  # folder, hub repository, or what it holds


class RoadBank:
    """Serves adapters of one model by name, while the model runs.

    The layers of `model` that `target_modules` names (as in `RoadConfig`; every linear layer of the
    blocks if not given) are wrapped in place until `detach()`. Tables of `slots` adapters are
    allocated at once, in float32, and never move: a compiled model or a captured CUDA graph goes on
    with other adapters. When an adapter is wanted that has no slot, the least recently used one
    that nobody holds makes room.

    Every method may be called from any thread, also while the model runs in another. A batch or a
    request holds leases; what it holds does not change under it when the adapter is replaced or
    removed.

    Args:
        slots: How many adapters can be applied at one time; each takes `memory().slot_bytes`.
        host_bytes: Values kept in the host's memory, at most; all of them if not given. Those of
            adapters added from memory always stay, and count.
        base_model: The name that adapters must state as their base; that of the model if not given,
            and "" accepts any. Only the last part of a path is compared.
    """

    lora_names: Sequence[str] = ()  # a bank holds rotations only

    def __init__(
        self,
        model: nn.Module,
        slots: int = 8,
        *,
        target_modules: list[str] | str | None = None,
        host_bytes: int | None = None,
        base_model: str | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                "the model has adapters of its own; give the base model (merge or unload first)"
            )
        self.model, self.host_bytes = model, host_bytes
        name = getattr(model, "name_or_path", "") if base_model is None else base_model
        self.base_model: str = name
        self.routing = Routing()
        self._condition = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._host: OrderedDict[Entry, None] = OrderedDict()  # least recently used first
        self._host_used = 0
        self._slots = [Slot(index) for index in range(slots)]
        self._recent: OrderedDict[Slot, None] = OrderedDict()  # least recently used first
        self._loads = self._reads = self._evictions = 0
        self._layers = self._wrap(target_modules)
        self.tables = {name: self._table(layer) for name, layer in self._layers.items()}

    # ---- the model ----------------------------------------------------------------------------

    def _wrap(self, target_modules: list[str] | str | None) -> dict[str, RoadLayer]:
        config = RoadConfig(group_size=2, remainder="identity", target_modules=target_modules)
        if config.target_modules is None or config.target_modules == "all-linear":
            config.target_modules = sorted(linear_layers_of_blocks(self.model, config))
        layers: dict[str, RoadLayer] = {}
        for name, module in list(self.model.named_modules()):
            if not name or not check_target_module_exists(config, name):
                continue
            parent, _, child = name.rpartition(".")
            reason = why_bypassed(self.model, self.model.get_submodule(parent), child)
            if reason is not None:
                raise ValueError(f"{name} cannot be adapted: {reason}")
            try:
                if layout_of(self.model, name, module) is not None:
                    raise ValueError(
                        "a bank cannot follow a tensor-parallel plan; load the adapters by PEFT's"
                        " load_adapter and choose among them by adapter_names"
                    )
                layer = wrap(module, **get_quantization_kwargs(self.model))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            layer.module_name, layer.routing = name, self.routing
            layer.train(module.training)
            layers[name] = layer
        if not layers:
            raise ValueError(f"target_modules {target_modules!r} match no module of the model")
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer)
        return layers

    @torch.inference_mode(False)  # else slots could be written in that mode only
    def _table(self, layer: RoadLayer) -> tuple[Tensor, Tensor]:
        base = layer.get_base_layer()
        device, dtype = layer._get_base_layer_device_and_dtype(base)
        if device is None:
            device = next(self.model.parameters()).device
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        count = len(self._slots)
        return (
            torch.zeros(count, 2, layer.out_features, dtype=wide, device=device),
            torch.zeros(count, dtype=torch.int32, device=device),
        )

    def detach(self) -> None:
        """Give the model its own layers back; the bank cannot be used afterwards."""
        for name, layer in self._layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.base_layer)
        with self._condition:
            while self._entries:
                self._drop(self._entries.popitem()[1])
            self._layers, self.tables = {}, {}

    # ---- registering --------------------------------------------------------------------------

    def add(self, name: str, source: Source) -> None:
        """Register an adapter and read it: from a folder, a hub repository, or memory.

        From memory, `source` is (configuration, tensors), the tensors named as in a saved file;
        `peft.get_peft_model_state_dict` gives them.

        Raises:
            ValueError: the name is taken, or the adapter cannot be served (`AdapterValues.check`).
        """
        self._check_name(name, new=True)
        values = self._read(name, source)
        with self._condition:
            self._check_name(name, new=True)
            self._enter(name, source, values)

    def add_folder(self, folder: str | Path) -> list[str]:
        """Register every adapter folder inside `folder` by its name, unread; give the new names.

        An adapter is read and checked when it is first wanted. Names that are taken are left alone.
        """
        found = sorted(p.parent.name for p in Path(folder).glob("*/adapter_config.json"))
        with self._condition:
            new = [name for name in found if name not in self._entries and name != BASE]
            for name in new:
                self._entries[name] = Entry(name, str(Path(folder) / name))
        return new

    def replace(self, name: str, source: Source) -> None:
        """Put a new version in the place of an adapter; who holds a lease keeps the old one.

        One that is pinned takes a slot when it is next wanted, and keeps it.

        Raises:
            UnknownAdapterError: there is none of that name.
            ValueError: the new version cannot be served; the old one stays.
        """
        self._check_name(name, new=False)
        values = self._read(name, source)
        with self._condition:
            old = self._find(name)
            self._drop(old)
            self._enter(name, source, values).pins = old.pins

    def remove(self, name: str) -> None:
        """Forget an adapter; who holds a lease keeps it until the end.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        with self._condition:
            self._drop(self._find(name))
            del self._entries[name]

    def pin(self, name: str) -> None:
        """Bring an adapter into a slot and keep it there until `unpin`.

        Raises:
            UnknownAdapterError, BankFullError, ValueError: see `acquire`.
        """
        with self.acquire(name), self._condition:
            self._find(name).pins = True

    def unpin(self, name: str) -> None:
        """Let an adapter lose its slot again."""
        with self._condition:
            self._find(name).pins = False
            self._condition.notify_all()

    @property
    def names(self) -> list[str]:
        """The registered adapters, sorted."""
        with self._condition:
            return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        with self._condition:
            return name in self._entries

    def __len__(self) -> int:
        with self._condition:
            return len(self._entries)

    def memory(self) -> BankMemory:
        """Give an exact account of what the bank holds."""
        with self._condition:
            sizes = [t.nbytes for pair in self.tables.values() for t in pair]
            return BankMemory(
                table_bytes=sum(sizes),
                slot_bytes=sum(sizes) // len(self._slots),
                host_bytes=self._host_used,
                slots=len(self._slots),
                slots_used=sum(s.entry is not None or s.uses > 0 for s in self._slots),
                slots_held=sum(s.uses > 0 for s in self._slots),
                slots_pinned=sum(s.entry is not None and s.entry.pins for s in self._slots),
                host_adapters=len(self._host),
                registered=len(self._entries),
                loads=self._loads,
                reads=self._reads,
                evictions=self._evictions,
            )

    # ---- applying -----------------------------------------------------------------------------

    @contextmanager
    def rows(
        self, names: Sequence[str | None], *, repeats: int = 1, timeout: float = 0
    ) -> Iterator[None]:
        """Make row i of a batch take the adapter `names[i]`, for all calls of the model inside.

        None or "__base__" is no adapter. `repeats` is how often `generate` repeats a row, for beams
        or return sequences. Affects calls from this thread only.

        Raises:
            UnknownAdapterError, BankFullError, ValueError: see `acquire`.
        """
        rows = [BASE if name is None else name for name in names]
        with ExitStack() as stack:
            wanted = list(dict.fromkeys(name for name in rows if name != BASE))
            leases = [stack.enter_context(lease) for lease in self._acquire(wanted, timeout)]
            places = {name: lease.slot for name, lease in zip(wanted, leases, strict=True)}
            stack.enter_context(
                route_rows(self.model, self.routing, BankRows(self, rows, repeats, places))
            )
            yield

    @contextmanager
    def routed(self, slots: Tensor) -> Iterator[None]:
        """Make the rows (or tokens) of a batch take the slots that `slots` holds.

        For callers that hold leases and keep one tensor of slots, say in a captured CUDA graph.

        Shapes:
            slots: the leading dimensions of every layer's input, integer, -1 for no adapter.
        """
        with self.routing.use(SlotRoute(self, slots)):
            yield

    def acquire(self, name: str | None, timeout: float = 0) -> Lease:
        """Bring an adapter into a slot, if it is not in one, and hold it there.

        Waits up to `timeout` seconds for a slot if all are held or pinned.

        Raises:
            UnknownAdapterError: there is none of that name.
            BankFullError: no slot became free in time.
            ValueError: the adapter is read now for the first time and cannot be served.
        """
        if name is None or name == BASE:
            return Lease(BASE, -1, None, self._release)
        return self._acquire([name], timeout)[0]

    def _acquire(self, names: Sequence[str], timeout: float) -> list[Lease]:
        """Hold all of the names or none: two batches cannot wait for a half of each other."""
        deadline = time.monotonic() + timeout
        read: dict[Entry, AdapterValues] = {}  # which the bank may have dropped again
        while True:
            found = self._place(names, read, deadline)
            if not isinstance(found, Entry):
                return found
            try:
                assert found.path is not None
                read[found] = self._read(found.name, found.path)
                with self._condition:
                    if self._entries.get(found.name) is found:
                        self._keep(found, read[found])
            finally:
                with self._condition:
                    found.reading = False
                    self._condition.notify_all()

    def _place(
        self, names: Sequence[str], read: Mapping[Entry, AdapterValues], deadline: float
    ) -> list[Lease] | Entry:
        """Give the leases, or an entry whose file the caller must read first."""
        with self._condition:
            while True:
                entries = [self._find(name) for name in names]
                unread = [e for e in entries if not (e.slot or e.values or e in read)]
                for entry in unread:
                    if not entry.reading:
                        entry.reading = True
                        return entry
                if unread:
                    self._condition.wait()  # another thread reads it, and tells when it has
                    continue
                new = [entry for entry in entries if entry.slot is None]
                free = self._free_slots(keep=entries) if new else []
                if len(new) <= len(free):
                    for entry, slot in zip(new, free, strict=False):
                        self._fill(slot, entry, entry.values or read[entry])
                    return [self._hold(entry) for entry in entries]
                left = deadline - time.monotonic()
                if left <= 0 or len(names) > len(self._slots):
                    wanted = ", ".join(repr(entry.name) for entry in new)
                    raise BankFullError(
                        f"{wanted} need {len(new)} slot(s), but of {len(self._slots)} only"
                        f" {len(free)} are neither held nor pinned; wait (timeout), unpin, or make"
                        " the bank with more slots"
                    )
                self._condition.wait(left)

    def table(self, layer: RoadLayer, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the coefficients (slots, 2, d) and the group sizes (slots,) of a layer."""
        return self.tables[layer.module_name]

    # ---- slots, with the lock held ------------------------------------------------------------

    def _hold(self, entry: Entry) -> Lease:
        slot = entry.slot
        assert slot is not None
        slot.uses += 1
        self._recent[slot] = None
        self._recent.move_to_end(slot)
        if entry in self._host:
            self._host.move_to_end(entry)
        return Lease(entry.name, slot.index, slot, self._release)

    def _release(self, slot: Slot) -> None:
        with self._condition:
            slot.uses -= 1
            self._condition.notify_all()

    def _free_slots(self, keep: Sequence[Entry]) -> list[Slot]:
        """Give the slots that may be filled: empty ones, then the least recently used first."""
        unheld = [slot for slot in self._slots if slot.uses == 0]
        empty = [slot for slot in unheld if slot.entry is None]
        idle = [s for s in unheld if s.entry and not s.entry.pins and s.entry not in keep]
        order = {slot: place for place, slot in enumerate(self._recent)}
        return empty + sorted(idle, key=order.__getitem__)

    def _fill(self, slot: Slot, entry: Entry, values: AdapterValues) -> None:
        """Write an adapter into a slot, which nobody reads, in the table of every layer."""
        if slot.entry is not None:
            slot.entry.slot, slot.entry = None, None
            self._evictions += 1
        self._loads += 1
        some = next(iter(self.tables.values()))[0]
        with torch.no_grad():
            pairs = values.coefficients(some.device, some.dtype)
            for name, (table, group_sizes) in self.tables.items():
                held = values.layers.get(name)
                group_sizes[slot.index] = 0 if held is None else held.group_size
                if held is not None:
                    table[slot.index, :, : pairs[name].shape[1]] = pairs[name]
        if some.device.type == "cuda":  # who holds the lease may run on another stream
            torch.cuda.current_stream(some.device).synchronize()
        entry.slot, slot.entry = slot, entry

    def _drop(self, entry: Entry) -> None:
        """Take an entry out of its slot and of the host's memory."""
        if entry.slot is not None:
            entry.slot.entry, entry.slot = None, None
        self._forget(entry)
        self._condition.notify_all()

    # ---- the host's memory, with the lock held ------------------------------------------------

    def _keep(self, entry: Entry, values: AdapterValues) -> None:
        entry.values = values
        self._host[entry] = None
        self._host_used += values.nbytes
        if self.host_bytes is None:
            return
        for other in list(self._host):
            if self._host_used <= self.host_bytes:
                break
            if other.path is not None:
                self._forget(other)

    def _forget(self, entry: Entry) -> None:
        if entry.values is not None:
            del self._host[entry]
            self._host_used -= entry.values.nbytes
            entry.values = None

    # ---- names and files ----------------------------------------------------------------------

    def _find(self, name: str) -> Entry:
        if name not in self._entries:
            raise UnknownAdapterError(
                f"there is no adapter {name!r} among the {len(self._entries)} registered; add it"
                " first"
            )
        return self._entries[name]

    def _check_name(self, name: str, new: bool) -> None:
        if not name or name == BASE:
            raise ValueError(f"{name!r} cannot name an adapter; it stands for none")
        with self._condition:
            if not new:
                self._find(name)
            elif name in self._entries:
                raise ValueError(f"there is an adapter {name!r} already; replace or remove it")

    def _read(self, name: str, source: Source) -> AdapterValues:
        config, tensors = source if isinstance(source, tuple) else load_adapter_files(source)
        widths = {n: layer.out_features for n, layer in self._layers.items()}
        held = {n: getattr(layer.base_layer, "weight", None) for n, layer in self._layers.items()}
        shapes = {n: weight.shape for n, weight in held.items() if weight is not None}
        values = AdapterValues.check(name, config, tensors, widths, self.base_model, shapes)
        with self._condition:
            self._reads += not isinstance(source, tuple)
        return values

    def _enter(self, name: str, source: Source, values: AdapterValues) -> Entry:
        path = None if isinstance(source, tuple) else str(source)
        entry = self._entries[name] = Entry(name, path)
        self._keep(entry, values)
        return entry
