"""RoAd: adapters that rotate and scale pairs of a layer's outputs, as a tuner of PEFT.

Importing this package gives `PeftType.ROAD` to its classes: `get_peft_model`, `PeftModel` and
transformers' adapter methods use them from then on. Files interchange with PEFT's own RoAd.
"""

from road_peft._register import register, unregister
from road_peft.config import RoadConfig
from road_peft.layer import RoadEmbedding, RoadLayer, RoadLinear
from road_peft.model import RoadModel

__all__ = [
    "RoadConfig",
    "RoadEmbedding",
    "RoadLayer",
    "RoadLinear",
    "RoadModel",
    "register",
    "unregister",
]

register()
