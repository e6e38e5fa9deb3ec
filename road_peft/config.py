"""The configuration of a RoAd adapter: PEFT's own, and the fields that it lacks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import peft.tuners.road as upstream
from peft.utils.other import get_pattern_key

from road_peft.variants import VARIANTS

# Plain PEFT ignores keys that it does not know. Where that would change the function of the
# adapter, the file names the variant in a way that plain PEFT refuses.
_NEEDS_US = " (needs road_peft)"
_CHANGES_FUNCTION = (
    "group_size_pattern",
    "variant_pattern",
    "trainable_token_indices",
    "lora_rank",
    "target_parameters",
)
_CHOOSES_MODULES = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass
class RoadConfig(upstream.RoadConfig):
    """What to rotate and how; a drop-in for `peft.RoadConfig`.

    `target_modules=None` means every linear layer of the repeated blocks, as in the paper. Files
    hold PEFT's keys only while the further fields keep their defaults, so both libraries read them.
    If modules were chosen by `exclude_modules` or `layers_to_transform`, the file lists the
    resulting names. If a field changes the function in a way that plain PEFT cannot compute, the
    file is written so that plain PEFT refuses it instead of computing something else.

    Raises:
        ValueError: an unknown variant, an odd group size, or fields that contradict each other.
    """

    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (suffixes, or one regular expression) to leave out."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the blocks to adapt; all if not given."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list that holds the blocks, if it is not a common one."},
    )
    variant_pattern: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "Module name or regular expression to variant, where it differs."},
    )
    group_size_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Module name or regular expression to group size, where it differs."},
    )
    remainder: str = field(
        default="error",
        metadata={
            "help": "If group_size does not divide a layer's outputs: 'error', or 'identity' to"
            " leave the features after the last whole group as they are."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of parameters to adapt that belong to no layer: experts stacked as"
            " (experts, out, in). Costs time and memory of the size of the weights."
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Token ids whose embeddings are trained and saved with the adapter."},
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of a LoRA beside the rotation, z = R W x + B A x; 0 for none. The delta"
            " is not rotated (RoAd paper, Table 6)."
        },
    )
    lora_alpha: float = field(
        default=16, metadata={"help": "The LoRA delta is scaled by lora_alpha / lora_rank."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of the LoRA, in training."}
    )
    recompute: bool = field(
        default=False,
        metadata={
            "help": "Keep a layer's output for the backward instead of the input of its rotation,"
            " and invert the rotation there. For road_1 only; no alpha may be 0."
        },
    )
    exact_unmerge: bool = field(
        default=True,
        metadata={
            "help": "Keep the original weight of a merged layer (once more its memory) and restore"
            " it bit for bit. If False, unmerging inverts the rotation and rounds."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.variant, str):
            self.variant = self.variant.removesuffix(_NEEDS_US)
        super().__post_init__()
        self._resolved_modules: list[str] | None = None
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check()

    def _check(self) -> None:
        if self.remainder not in ("error", "identity"):
            raise ValueError(f"remainder is {self.remainder!r}; choose 'error' or 'identity'")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern is given without layers_to_transform; give both or neither"
            )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} cannot be used when target_modules is a regular expression; put"
                        " the block numbers into the expression or list the module names"
                    )
        for pattern, variant in self.variant_pattern.items():
            if variant not in VARIANTS:
                raise ValueError(
                    f"variant_pattern[{pattern!r}] is {variant!r}; choose from {sorted(VARIANTS)}"
                )
        for pattern, size in self.group_size_pattern.items():
            if size <= 0 or size % 2:
                raise ValueError(
                    f"group_size_pattern[{pattern!r}] is {size}; it must be even and positive"
                )
        if self.recompute and {self.variant, *self.variant_pattern.values()} != {"road_1"}:
            raise ValueError(
                "recompute inverts the rotation in the backward, which only road_1 does safely;"
                " set variant='road_1' or recompute=False"
            )
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank is {self.lora_rank}; it must be 0 (no LoRA) or positive")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it must be in [0, 1)")

    @classmethod
    def of(cls, config: Any) -> RoadConfig:
        """Give `config` as this class; fields that a plain `peft.RoadConfig` lacks are default."""
        if isinstance(config, cls):
            return config
        known = {f.name for f in fields(cls)} - {"peft_type"}
        return cls(**{name: value for name, value in vars(config).items() if name in known})

    def layer_arguments(self, module_name: str) -> dict[str, Any]:
        """Give what `RoadLayer.update_layer` takes for the module of that name."""
        variant_key = get_pattern_key(list(self.variant_pattern), module_name)
        group_size_key = get_pattern_key(list(self.group_size_pattern), module_name)
        return {
            "variant": self.variant_pattern.get(variant_key, self.variant),
            "group_size": self.group_size_pattern.get(group_size_key, self.group_size),
            "init_weights": self.init_weights,
            "remainder": self.remainder,
            "recompute": self.recompute,
            "exact_unmerge": self.exact_unmerge,
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "inference_mode": self.inference_mode,
        }

    def to_dict(self) -> dict[str, Any]:
        """Give the dictionary that is saved: PEFT's keys, and ours where they are not default."""
        values = asdict(self)
        default = {f.name: _default(f) for f in fields(self)}
        for name in _OWN_FIELDS:
            if values[name] == default[name]:
                del values[name]
        chooses = any(name in values for name in _CHOOSES_MODULES)
        if chooses and self._resolved_modules is not None:
            for name in _CHOOSES_MODULES:
                values.pop(name, None)
            # plain PEFT must find the very same layers, and not draw random values for others
            values |= {"target_modules": list(self._resolved_modules), "init_weights": True}
            chooses = False
        if chooses or any(name in values for name in _CHANGES_FUNCTION):
            values["variant"] += _NEEDS_US
        return values


def _default(entry: Any) -> Any:
    return entry.default_factory() if callable(entry.default_factory) else entry.default


_OWN_FIELDS = tuple(
    f.name
    for f in fields(RoadConfig)
    if f.name not in {g.name for g in fields(upstream.RoadConfig)}
)
