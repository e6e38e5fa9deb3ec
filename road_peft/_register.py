"""The only place that touches PEFT's registry."""

from __future__ import annotations

from typing import Any

import peft.tuners.road as upstream
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

from road_peft.config import RoadConfig
from road_peft.model import RoadModel


def register() -> None:
    """Give `PeftType.ROAD` to this library; done by importing it, harmless to repeat.

    From then on a plain `peft.RoadConfig` gets our layers as well. Models that were built before
    keep theirs.
    """
    _assign(RoadConfig, RoadModel)


def unregister() -> None:
    """Give `PeftType.ROAD` back to PEFT's own classes. Models with our layers keep working."""
    _assign(upstream.RoadConfig, upstream.RoadModel)


def _assign(config_class: type[Any], model_class: type[Any]) -> None:
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROAD] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ROAD] = model_class
