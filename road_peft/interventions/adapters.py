"""Subspaces as a RoAd adapter in PEFT's format, where an adapter can compute the same."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from road_peft.adapter_files import PREFIX
from road_peft.config import RoadConfig
from road_peft.interventions.config import RoadInterventionConfig
from road_peft.interventions.site import Site
from road_peft.interventions.sites import find_modules
from road_peft.variants import VARIANTS


def extract(
    model: nn.Module,
    config: RoadInterventionConfig,
    sites: Sequence[Site],
    names: Sequence[str],
    folder: str | Path,
) -> None:
    """Write the named subspaces of `sites` as an adapter of `model`; the folder appears whole.

    Raises:
        ValueError: the folder exists, or no adapter computes this: the interventions are limited to
            some tokens, or not on the outputs of linear layers.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; choose a new folder")
    paths = _linear_layers(model, config)
    tensors: dict[str, Tensor] = {}
    for path, site in zip(paths, sites, strict=True):
        with torch.no_grad():
            pair = site.coefficients(names, torch.float32)
            values = VARIANTS[site.variant].parameters(*pair, site.group_size)
        for vector, value in zip(("road_theta", "road_alpha"), values, strict=True):
            tensors[f"{PREFIX}{path}.{vector}"] = value.cpu().contiguous()
    adapter = RoadConfig(
        variant=config.variant,
        group_size=config.group_size,
        target_modules=paths,
        inference_mode=True,
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".part", dir=folder.parent))
    try:
        adapter.save_pretrained(str(part))
        save_file(tensors, part / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        part.chmod(0o755)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _linear_layers(model: nn.Module, config: RoadInterventionConfig) -> list[str]:
    if config.positions != "all" or config.prefill_only:
        raise ValueError(
            f"positions is {config.positions!r} and prefill_only {config.prefill_only}: what is"
            " done to some tokens cannot be merged into weights, nor be an adapter, which are the"
            " same for all; that takes positions='all' and prefill_only=False"
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model carries adapters; unload or merge them before extracting")
    modules = find_modules(model, config)
    for name, module in modules.items():
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"{name} is a {type(module).__name__}; only the output of a linear layer can be"
                " rotated by an adapter or merged into a weight"
            )
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in modules.values()]
