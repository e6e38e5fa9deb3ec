"""The configuration of an ApiQ adapter: a LoRA, and the grid of the weights under it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from apiq_peft.quantizer import check

# what a quantised base cannot have, or what would calibrate against the wrong weight
_UNSUPPORTED = ("use_dora", "use_qalora", "target_parameters", "velora_config", "loftq_config")


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

    @classmethod
    def of(cls, config: Any) -> ApiQConfig:
        """Give `config` as this class; fields that a plain LoRA configuration lacks are default."""
        if isinstance(config, cls):
            return config
        known = {f.name for f in fields(cls)} - {"peft_type"}
        return cls(**{name: value for name, value in vars(config).items() if name in known})

    def grid_of(self, module_name: str) -> tuple[int, int]:
        """Give (bits, group_size) for the module of that name."""
        bits = get_pattern_key(list(self.bits_pattern), module_name)
        group_size = get_pattern_key(list(self.group_size_pattern), module_name)
        return (
            self.bits_pattern.get(bits, self.bits),
            self.group_size_pattern.get(group_size, self.group_size),
        )
