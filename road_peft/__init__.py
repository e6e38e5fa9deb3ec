"""RoAd: adapters that rotate and scale pairs of a layer's outputs, as a tuner of PEFT.

Importing this package gives `PeftType.ROAD` to its classes: `get_peft_model`, `PeftModel` and
transformers' adapter methods use them from then on. Files interchange with PEFT's own RoAd. It also
watches optimizers for weight decay on RoAd's scales, and warns.
"""

from road_peft._register import register, unregister
from road_peft.bank import RoadBank
from road_peft.batching import AdapterBatching
from road_peft.config import RoadConfig
from road_peft.diagnostics import LayerReport, inspect_adapter
from road_peft.distributed import merged_state_dict, replicate_adapters
from road_peft.hotswap import hotswap_adapter
from road_peft.interventions import (
    Interventions,
    RoadInterventionConfig,
    RoadInterventionModel,
    SubspaceCollator,
)
from road_peft.layer import RoadEmbedding, RoadLayer, RoadLinear
from road_peft.leases import BankFullError, BankMemory, Lease, UnknownAdapterError
from road_peft.model import RoadModel
from road_peft.optim import PRESETS, Preset, road_parameter_groups, watch_optimizers

__all__ = [
    "PRESETS",
    "AdapterBatching",
    "BankFullError",
    "BankMemory",
    "Interventions",
    "LayerReport",
    "Lease",
    "Preset",
    "RoadBank",
    "RoadConfig",
    "RoadEmbedding",
    "RoadInterventionConfig",
    "RoadInterventionModel",
    "RoadLayer",
    "RoadLinear",
    "RoadModel",
    "SubspaceCollator",
    "UnknownAdapterError",
    "hotswap_adapter",
    "inspect_adapter",
    "merged_state_dict",
    "register",
    "replicate_adapters",
    "road_parameter_groups",
    "unregister",
]

register()
watch_optimizers()
