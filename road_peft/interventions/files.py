"""The values of interventions apart from any model: saved, loaded, taken apart and put together."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from road_peft.interventions.config import RoadInterventionConfig

CONFIG_FILE = "intervention_config.json"
TENSOR_FILE = "interventions.safetensors"


@dataclass(frozen=True)
class Interventions:
    """What was trained: a configuration, and theta and alpha of each subspace at each module.

    Tensors are named `<module>.<theta or alpha>.<subspace>`; values are in the order of the blocks,
    those of a pair together.
    """

    config: RoadInterventionConfig
    tensors: Mapping[str, Tensor]

    def save(self, folder: str | Path) -> None:
        """Write two files, beside those of an adapter if there are; each appears whole.

        Positions that are a function are not written: give them again after loading.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        part = folder / f"{TENSOR_FILE}.part"
        save_file(tensors, part)
        os.replace(part, folder / TENSOR_FILE)
        part = folder / f"{CONFIG_FILE}.part"
        part.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        os.replace(part, folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: str | Path, **changes: Any) -> Interventions:
        """Read what `save` wrote; `changes` are fields of the configuration, such as `positions`.

        Raises:
            ValueError: a file is missing or cannot be read, or the two do not belong together.
        """
        folder = Path(folder)
        try:
            values = json.loads((folder / CONFIG_FILE).read_text())
            tensors = load_file(folder / TENSOR_FILE)
            config = RoadInterventionConfig.from_dict({**values, **changes})
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no readable {CONFIG_FILE} and {TENSOR_FILE}; give a folder that"
                f" was saved by Interventions.save ({error})"
            ) from error
        named = {key.split(".theta.")[-1] for key in tensors if ".theta." in key}
        if named != set(config.subspaces):
            raise ValueError(
                f"{folder}: the tensors are of the subspaces {sorted(named)}, the configuration"
                f" names {sorted(config.subspaces)}; save them again"
            )
        return cls(config, tensors)

    def isolate(self, *names: str) -> Interventions:
        """Give the named subspaces alone, with copies of their values.

        Raises:
            ValueError: a name is unknown, or there is none.
        """
        unknown = sorted(set(names) - set(self.config.subspaces))
        if unknown or not names:
            raise ValueError(
                f"subspaces {unknown or list(names)} do not exist; choose from"
                f" {sorted(self.config.subspaces)}"
            )
        return Interventions(
            replace(self.config, subspaces={n: self.config.subspaces[n] for n in names}),
            {
                key: tensor.clone()
                for key, tensor in self.tensors.items()
                if any(key.endswith((f".theta.{n}", f".alpha.{n}")) for n in names)
            },
        )

    def compose(self, *others: Interventions) -> Interventions:
        """Give the subspaces of these and of the others, which were trained apart.

        Disjoint subspaces change the states as the sum of what each changes. What the model does
        with the sum is to be measured: nothing promises that it does both.

        Raises:
            ValueError: two subspaces have one name, or the configurations differ in anything else.
        """
        subspaces, tensors = dict(self.config.subspaces), dict(self.tensors)
        for other in others:
            ours, theirs = (
                replace(c, subspaces={"all": (0.0, 1.0)}) for c in (self.config, other.config)
            )
            if ours != theirs:
                raise ValueError(
                    f"interventions of different configurations do not compose: {ours} and {theirs}"
                )
            shared = sorted(subspaces.keys() & other.config.subspaces)
            if shared:
                raise ValueError(
                    f"{', '.join(shared)} name subspaces of both; isolate those that you want"
                )
            subspaces |= other.config.subspaces
            tensors |= other.tensors
        config = replace(self.config, subspaces=subspaces)
        return Interventions(config, {key: torch.clone(t) for key, t in tensors.items()})
