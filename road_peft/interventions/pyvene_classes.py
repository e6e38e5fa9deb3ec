"""The rotations and interchanges of this library as interventions of pyvene, if it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from road_peft.interventions.calls import Intervention, Rows, Source
from road_peft.interventions.config import RoadInterventionConfig, Subspace
from road_peft.interventions.site import Site
from road_peft.interventions.subspaces import blocks_of

_pyvene: Any = importlib.import_module("pyvene")
_Sourceless: Any = _pyvene.SourcelessIntervention
_Trainable: Any = _pyvene.TrainableIntervention
_Distributed: Any = _pyvene.DistributedRepresentationIntervention


class _PyveneSite:
    """What both classes share: a site, and which of its subspaces each example takes."""

    site: Site

    def _build(self, features: int, subspaces: Mapping[str, Subspace], **settings: Any) -> None:
        config = RoadInterventionConfig(subspaces=subspaces, **settings)
        self.site = Site(
            "pyvene",
            features,
            blocks_of(config, features, "embed_dim"),
            variant=config.variant,
            group_size=config.group_size,
            interchange=config.interchange,
        )

    def _apply(self, base: Tensor, source: Tensor | None, subspaces: Any) -> Tensor:
        names = list(self.site.blocks)
        chosen: Sequence[Sequence[Any]] = [names] * len(base) if subspaces is None else subspaces
        rows = Rows([[names[n] if isinstance(n, int) else n for n in row] for row in chosen])
        tokens = base.shape[:-1]
        order = torch.arange(tokens.numel()).view(tokens)
        given = None if source is None else Source({"pyvene": source.flatten(0, -2)}, order)
        call = Intervention(rows, torch.ones(tokens, dtype=torch.bool), given)
        return call.apply(self.site, base)


class RoadIntervention(_PyveneSite, _Sourceless, _Trainable, _Distributed):
    """R_S h: rotates the subspaces of each example, given to pyvene as numbers or names.

    Takes `embed_dim`, and `subspaces`, `variant`, `group_size` and `allow_overlap` as
    `RoadInterventionConfig` does.
    """

    def __init__(
        self,
        embed_dim: int,
        subspaces: Mapping[str, Subspace],
        *,
        variant: str = "road_1",
        group_size: int = 2,
        allow_overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dim=embed_dim, **{"keep_last_dim": True, **kwargs})
        settings = {"variant": variant, "group_size": group_size, "allow_overlap": allow_overlap}
        self._build(embed_dim, subspaces, **settings)

    def forward(
        self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any
    ) -> Tensor:
        return self._apply(base, None, subspaces)


class RoadInterchange(_PyveneSite, _Trainable, _Distributed):
    """DII(b, s): takes one coordinate of each rotated pair of the subspaces from the source.

    Takes what `RoadIntervention` takes, and `interchange`.
    """

    def __init__(
        self,
        embed_dim: int,
        subspaces: Mapping[str, Subspace],
        *,
        variant: str = "road_1",
        group_size: int = 2,
        allow_overlap: bool = False,
        interchange: str = "low",
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dim=embed_dim, **{"keep_last_dim": True, **kwargs})
        settings = {"variant": variant, "group_size": group_size, "allow_overlap": allow_overlap}
        self._build(embed_dim, subspaces, **settings, interchange=interchange)

    def forward(self, base: Tensor, source: Tensor, subspaces: Any = None, **kwargs: Any) -> Tensor:
        return self._apply(base, source, subspaces)
