"""Interventions on hidden states by subspace: rotations that compose, and interchange.

`RoadInterventionModel(model, RoadInterventionConfig(...))` gives a model whose `forward` and
`generate` take `subspaces`, one list of names for each row.
"""

from road_peft.interventions.collator import SubspaceCollator
from road_peft.interventions.config import RoadInterventionConfig
from road_peft.interventions.files import Interventions
from road_peft.interventions.model import RoadInterventionModel
from road_peft.interventions.site import Site

__all__ = [
    "Interventions",
    "RoadInterventionConfig",
    "RoadInterventionModel",
    "Site",
    "SubspaceCollator",
]
