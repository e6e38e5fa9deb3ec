"""The only place that touches the registries of PEFT and transformers."""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers.quantizers import auto

NAME = "APIQ"


def add_peft_type() -> None:
    """Extend PEFT's enumeration by APIQ; does nothing if that was done before."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)  # what attribute access finds from Python 3.12 on


def register() -> None:
    """Make `ApiQConfig` and packed checkpoints known; does nothing a second time."""
    add_peft_type()
    from apiq_peft.checkpoint import METHOD, ApiQHfQuantizer, ApiQQuantizationConfig
    from apiq_peft.config import ApiQConfig
    from apiq_peft.model import ApiQModel

    if PeftType(NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=ApiQConfig, model_cls=ApiQModel, prefix="lora_"
        )
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(ApiQQuantizationConfig)
        auto.register_quantizer(METHOD)(ApiQHfQuantizer)
