"""The settings of a server: each described once, here, for Python and for the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


def _told(text: str, kind: type, least: float | None = None) -> dict[str, Any]:
    """Describe a setting: its help, the type its text is read as, the least value allowed."""
    return {"help": text, "kind": kind, "least": least}


@dataclass(frozen=True)
class ServeOptions:
    """What is served, and how much of it at most.

    Raises:
        ValueError: a number is below what it can be, or `adapters` is no folder.
    """

    adapters: Path | None = field(
        default=None,
        metadata=_told("folder of adapter folders; those loaded later lie inside it too", Path),
    )
    model_name: str | None = field(
        default=None,
        metadata=_told("name of the model without adapter; if not given, MODEL's last part", str),
    )
    base_model: str | None = field(
        default=None,
        metadata=_told("base that adapters must state; if not given, MODEL; '' for any", str),
    )
    slots: int = field(default=32, metadata=_told("adapters applied at one time, at most", int, 1))
    host_bytes: int | None = field(
        default=None,
        metadata=_told("adapter values kept in the host's memory; if not given, all", int, 0),
    )
    target_modules: str | None = field(
        default=None,
        metadata=_told("modules adapters may rotate, a,b,c; if not given, all linear ones", str),
    )
    max_body_bytes: int = field(default=1 << 20, metadata=_told("largest body", int, 1))
    max_queue: int = field(
        default=256, metadata=_told("requests waiting or running; more are refused", int, 1)
    )
    max_new_tokens: int = field(
        default=1024, metadata=_told("tokens generated: the most, and the default", int, 1)
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata=_told("longest prompt; if not given, what the model allows", int, 1)
    )
    request_timeout: float = field(
        default=300.0, metadata=_told("seconds until a request is given up", float, 0.001)
    )
    drain_seconds: float = field(
        default=30.0, metadata=_told("seconds that running requests get at the end", float, 0)
    )
    cache_tokens: int | None = field(
        default=None,
        metadata=_told("tokens whose keys and values are kept; if not given, by memory", int, 1),
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata=_told("tokens of one step; if not given, what transformers chooses", int, 1),
    )
    top_p: bool = field(
        default=False,
        metadata=_told("allow top_p in requests; sorts the vocabulary at every step", bool),
    )
    api_key: str | None = field(
        default=None, metadata=_told("key that clients send; better in ROAD_API_KEY", str)
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata["least"]
            # written so that a NaN is refused too
            if value is not None and least is not None and not value >= least:
                raise ValueError(f"{one.name} is {value}; it must be at least {least}")
        if self.adapters is not None and not self.adapters.is_dir():
            raise ValueError(f"adapters is {str(self.adapters)!r}, which is no folder; make it")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty; give a key, or none")

    @property
    def targets(self) -> list[str] | None:
        """The modules of `target_modules`, None for all linear ones."""
        return self.target_modules.split(",") if self.target_modules else None
