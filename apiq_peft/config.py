"""The configuration of an ApiQ adapter: a LoRA, and the grid of the weights under it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from apiq_peft.quantizer import check

# what a quantised base cannot have, or what would calibrate against the wrong weight
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "target_parameters",
    "velora_config",
    "loftq_config",
    "kasa_config",
)
# of init_lora_weights; the others take something out of the weight of the base or measure it
_STARTS = (True, False, "gaussian", "orthogonal", "mica")


@dataclass
class ApiQConfig(LoraConfig):
    """A LoRA beside weights of 2, 3 or 4 bits; for `get_peft_model` and `apiq_peft.quantize`.

    What is missing here is LoRA's: `r`, `lora_alpha`, `target_modules` ("all-linear" if not given),
    `lora_dropout`, `rank_pattern` and so on.

    Raises:
        ValueError: a width, group size or scheme that does not exist, or a kind of LoRA that does
            not go with quantised weights.
    Source:
        ApiQ (arXiv:2402.05147).
    """

    bits: int = field(default=2, metadata={"help": "Width of a code: 2, 3 or 4."})
    group_size: int = field(
        default=64,
        metadata={"help": "Inputs that share a scale and a zero point; -1 for a whole row."},
    )
    scheme: str = field(
        default="asymmetric",
        metadata={
            "help": "'asymmetric'; 'gptq_symmetric', which every reader of GPTQ files understands;"
            " 'apiq_symmetric', the one of the published code."
        },
    )
    bits_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Module name or regular expression to width, where it differs."},
    )
    group_size_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Module name or regular expression to group size, where it differs."},
    )
    packed_base: bool = field(
        default=False,
        metadata={
            "help": "Set when the adapter is added: it is for codes that packing without data does"
            " not give, and so goes on a packed base alone."
        },
    )
    base_codes: str | None = field(
        default=None,
        metadata={
            "help": "Set with it: a fingerprint of these codes, so that an adapter is refused on"
            " others in the same grid; None for a new adapter."
        },
    )
    grid_given: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.target_modules is None:
            self.target_modules = "all-linear"
        super().__post_init__()
        self.peft_type = PeftType("APIQ")
        for bits in (self.bits, *self.bits_pattern.values()):
            for group_size in (self.group_size, *self.group_size_pattern.values()):
                check(bits, group_size, self.scheme)
        for name in _UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; ApiQ trains a plain LoRA, leave it out"
                )
        if self.init_lora_weights not in _STARTS:
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}, which needs a base in full"
                f" precision; choose from {', '.join(map(repr, _STARTS))}"
            )

    @classmethod
    def of(cls, config: Any) -> ApiQConfig:
        """Give `config` as this class.

        The fields that a plain LoRA configuration lacks are those of the base that it is for, if
        that is packed, and else default.
        """
        if isinstance(config, cls):
            return config
        known = {f.name for f in fields(cls)} - {"peft_type"}
        made = cls(**{name: value for name, value in vars(config).items() if name in known})
        made.grid_given = False  # type: ignore[misc]  # of this one alone
        return made

    def on_grids(self, grids: Mapping[str, tuple[int, int]], scheme: str) -> ApiQConfig:
        """Give a copy for modules that are packed in these (bits, group_size)."""
        config = copy.copy(self)
        (config.bits, config.group_size), _ = Counter(grids.values()).most_common(1)[0]
        config.bits_pattern = {n: bits for n, (bits, _) in grids.items() if bits != config.bits}
        config.group_size_pattern = {
            n: size for n, (_, size) in grids.items() if size != config.group_size
        }
        config.scheme = scheme
        return config

    def grid_of(self, module_name: str) -> tuple[int, int]:
        """Give (bits, group_size) for the module of that name."""
        bits = get_pattern_key(list(self.bits_pattern), module_name)
        group_size = get_pattern_key(list(self.group_size_pattern), module_name)
        return (
            self.bits_pattern.get(bits, self.bits),
            self.group_size_pattern.get(group_size, self.group_size),
        )
