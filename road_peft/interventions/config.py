"""What to intervene on: modules, tokens, and the named subspaces of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from road_peft.interventions.positions import check_positions
from road_peft.variants import VARIANTS

Subspace = tuple[float, float] | list[int]
INTERCHANGES = ("low", "high", "both")


@dataclass(frozen=True)
class RoadInterventionConfig:
    """Rotations of hidden states by subspace, at chosen modules and tokens.

    A subspace is a set of blocks, the pairs of features that RoAd rotates. A tuple `(start, end)`
    is a share of the features, `(0, 0.5)` the lower half; its ends must fall between groups. A list
    holds the numbers of blocks: block k * g/2 + i is pair i of group k.

    Raises:
        ValueError: a field with a value that it cannot have.
    Source:
        RoAd (arXiv:2409.00119), sections 2.3, 3.2 and 4.3.
    """

    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of the blocks of the model; None if `component` is a path."},
    )
    component: str = field(
        default="block_output",
        metadata={
            "help": "'block_output', 'attention_output', 'mlp_output', or the path of a module:"
            " inside each of `layers`, or from the root of the model without them."
        },
    )
    positions: str | Callable[[Tensor], Tensor] | None = field(
        default="l1",
        metadata={
            "help": "Tokens of the prompt: 'f2' are the first two, 'l1' the last, 'f2+l1' both,"
            " 'all' all; or a function from an attention mask (rows, tokens) to a mask of its"
            " shape. None, from a file of such a function: to be replaced."
        },
    )
    variant: str = field(default="road_1", metadata={"help": "How the blocks are parametrised."})
    group_size: int = field(
        default=2, metadata={"help": "Pairs lie half of this apart; 2, the paper's, is adjacent."}
    )
    subspaces: Mapping[str, Subspace] = field(
        default_factory=lambda: {"all": (0.0, 1.0)},
        metadata={"help": "Name to a share of the features or a list of blocks."},
    )
    allow_overlap: bool = field(
        default=False,
        metadata={"help": "Let subspaces share blocks; what they share is one parameter."},
    )
    prefill_only: bool = field(
        default=True,
        metadata={
            "help": "Leave generated tokens alone. If False, one is intervened on if `positions`"
            " name it while it is the last: all of them for 'l1' and 'all'."
        },
    )
    interchange: str = field(
        default="low",
        metadata={
            "help": "Which coordinate of each rotated pair a source gives: 'low' or 'high', along"
            " a direction that is learnt, or 'both', where the rotation cancels."
        },
    )

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; choose from {sorted(VARIANTS)}")
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"group_size is {self.group_size}; it must be even and positive")
        if self.interchange not in INTERCHANGES:
            raise ValueError(f"interchange is {self.interchange!r}; choose from {INTERCHANGES}")
        if self.layers is not None and (
            not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0
        ):
            raise ValueError(
                f"layers is {self.layers}; give different numbers from 0 on, or None with the path"
                " of a module as component"
            )
        if isinstance(self.positions, str):
            check_positions(self.positions)
        if not self.subspaces:
            raise ValueError("there are no subspaces; name at least one")
        held = {name: _checked(name, value) for name, value in self.subspaces.items()}
        object.__setattr__(self, "subspaces", held)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON holds them; positions that are a function become None."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if not isinstance(self.positions, str):
            values["positions"] = None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoadInterventionConfig:
        """Read what `to_dict` gave, through JSON or not.

        Raises:
            ValueError: a field that there is not, or with a value that it cannot have.
        """
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown field(s) {', '.join(unknown)}: written by a newer version?")
        subspaces = values.get("subspaces")
        if isinstance(subspaces, Mapping):  # JSON knows no tuples
            values = {**values, "subspaces": {n: _from_json(v) for n, v in subspaces.items()}}
        return cls(**values)


def _from_json(value: Any) -> Any:
    shares = isinstance(value, list) and any(isinstance(v, float) for v in value)
    return tuple(value) if shares else value


def _checked(name: str, value: Any) -> Subspace:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} cannot name a subspace; give a text that is not empty")
    if isinstance(value, tuple):
        if len(value) != 2 or not 0 <= value[0] < value[1] <= 1:
            raise ValueError(
                f"subspace {name!r} is {value}; a tuple holds the start and the end of a share of"
                " the features, 0 <= start < end <= 1 (a list holds numbers of blocks)"
            )
        return float(value[0]), float(value[1])
    if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError(
            f"subspace {name!r} is {value!r}; give a tuple (start, end) of shares or a list of"
            " block numbers"
        )
    if not value or len(set(value)) < len(value):
        raise ValueError(f"subspace {name!r} is {value}; its blocks must be some, and different")
    return sorted(value)
