"""Handing the subspaces of examples to a model through a data collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SubspaceCollator:
    """Collates by another collator, and passes on the lists of names under "subspaces"."""

    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Give one batch."""
        rest = [{k: v for k, v in e.items() if k != "subspaces"} for e in examples]
        return {**self.collate(rest), "subspaces": [list(e["subspaces"]) for e in examples]}
