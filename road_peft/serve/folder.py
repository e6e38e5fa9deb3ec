"""Adapters on the disk of a server: which folders may be read, under which names."""

from __future__ import annotations

import re
from pathlib import Path

from road_peft.bank import RoadBank
from road_peft.leases import BankFullError, UnknownAdapterError
from road_peft.mixed_batch import BASE
from road_peft.serve.errors import ApiError, invalid, unavailable, unknown

_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
_FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterFolder:
    """Loads adapters of one folder into a bank, and nothing from outside it.

    All that lie there at the start are registered by the names of their folders, unread. Those that
    come later are found when they are loaded by name. Its methods block: call them in a thread.
    """

    def __init__(self, bank: RoadBank, root: Path | None, model_name: str) -> None:
        self._bank, self._model_name = bank, model_name
        self._root = None if root is None else root.resolve()
        if self._root is not None:
            bank.add_folder(self._root)
        if model_name in bank:
            raise ValueError(
                f"an adapter has the name of the model, {model_name!r}; rename its folder, or name"
                " the model otherwise (model_name)"
            )

    def load(self, name: str, path: str | None, replace: bool) -> None:
        """Read an adapter and register it, in place of another of that name if `replace`.

        Raises:
            ApiError: the name or the path is not allowed.
            ValueError: the name is taken, or the adapter cannot be served.
        """
        if not _NAME.fullmatch(name) or name in (BASE, self._model_name):
            raise invalid(f"{name[:200]!r} cannot name an adapter; choose another", "name")
        folder = self._inside(name if path is None else path)
        if replace and name in self._bank:
            self._bank.replace(name, folder)
        elif name in self._bank:
            raise invalid(
                f'there is an adapter {name!r} already; set "replace" to true, or unload it first',
                "name",
                "already_loaded",
            )
        else:
            self._bank.add(name, folder)

    def pin(self, name: str) -> None:
        """Keep an adapter in a slot, as long as one slot is left to the others.

        Raises:
            ApiError: it would be the last.
            UnknownAdapterError, BankFullError, ValueError: see `RoadBank.acquire`.
        """
        account = self._bank.memory()
        if account.slots_pinned >= account.slots - 1:
            raise invalid(
                f"{account.slots_pinned} of {account.slots} slots are pinned, and one must be left"
                " for the other adapters; unpin one first",
                "name",
                "all_pinned",
            )
        self._bank.pin(name)

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that have it already finish with it."""
        self._bank.remove(name)

    def unpin(self, name: str) -> None:
        """Let an adapter lose its slot again."""
        self._bank.unpin(name)

    def explained(self, error: Exception, name: str) -> ApiError:
        """Say to a client why an adapter cannot be had; errors of the server itself are raised."""
        if isinstance(error, UnknownAdapterError):
            return unknown(name)
        if isinstance(error, BankFullError):
            return unavailable(str(error), "no_slot")
        # what a file that is not as it should be may raise, beside what is checked for
        wrong = (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError, re.error)
        if not isinstance(error, wrong):
            raise error
        text = " ".join(str(error).split())
        # where things lie on this machine is no client's business
        text = text.replace(self._bank.base_model or self._model_name, self._model_name)
        if self._root is not None:
            text = text.replace(f"{self._root}/", "").replace(str(self._root), "")
        return invalid(f"adapter {name[:200]!r} cannot be served: {text}", "model", "bad_adapter")

    def _inside(self, path: str) -> Path:
        """Give the folder that `path` leads to, which must be inside the root, links followed."""
        if self._root is None:
            raise invalid("the server was started without a folder of adapters (--adapters)")
        outside = invalid(f"{path[:200]!r} is no adapter inside the folder of adapters", "path")
        try:
            folder = (self._root / path).resolve()
            places = [folder, *((folder / file).resolve() for file in _FILES)]
            inside = all(self._root in place.parents for place in places)
            if Path(path).is_absolute() or not inside or not places[1].is_file():
                raise outside
        except (OSError, ValueError, RuntimeError) as error:  # no path at all, or a circle of links
            raise outside from error
        return folder
