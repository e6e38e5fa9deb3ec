"""Tiny models with random interventions, and the same written out with dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from road_peft import RoadInterventionConfig, RoadInterventionModel
from tests.road_peft._models import tiny

HALVES: dict[str, Any] = {"lower": (0.0, 0.5), "upper": (0.5, 1.0)}
ROWS = [["lower"], [], ["upper"], ["upper", "lower"]]


def wrapped(
    model: str | nn.Module = "llama", *, dtype: torch.dtype = torch.float32, **settings: Any
) -> RoadInterventionModel:
    """Give a model with strong random interventions, on its first block if not said otherwise."""
    base = tiny(model, dtype=dtype) if isinstance(model, str) else model
    fields = {"layers": [0], "subspaces": HALVES, **settings}
    return randomized(RoadInterventionModel(base, RoadInterventionConfig(**fields)))


def randomized(model: RoadInterventionModel) -> RoadInterventionModel:
    """Draw values far from the identity and from singular ones."""
    with torch.no_grad():
        for site in model.sites:
            for theta, alpha in zip(site.theta, site.alpha, strict=True):
                theta.uniform_(-0.6, 0.6)
                alpha.uniform_(0.7, 1.3)
    return model.eval()


def dense(model: RoadInterventionModel, names: Sequence[str], site: int = 0) -> Tensor:
    """Write the rotation by the named subspaces as a matrix, from the values of every block.

    From RoAd (arXiv:2409.00119), eq. 3, block by block: an oracle that shares no code with ours.
    """
    config, held = model.interventions_config, model.sites[site]
    half = config.group_size // 2
    matrix = torch.eye(held.features, dtype=torch.float64)
    values = {name: t.double() for name, t in held.tensors().items()}
    for name in names:
        theta, alpha = (values[f"{held.name}.{v}.{name}"] for v in ("theta", "alpha"))
        each = {"road_1": 1, "road_2": 2, "road_4": 4}[config.variant]
        for block, t, a in zip(
            held.blocks[name], theta.view(-1, each), alpha.view(-1, each), strict=True
        ):
            t11, t22, t12, t21 = (t[i % each] for i in _ORDER[each])
            a11, a22, a12, a21 = (a[i % each] for i in _ORDER[each])
            low = block // half * config.group_size + block % half
            high = low + half
            matrix[low, low], matrix[low, high] = a11 * t11.cos(), -a12 * t12.sin()
            matrix[high, low], matrix[high, high] = a21 * t21.sin(), a22 * t22.cos()
    return matrix


# where a block's values hold those of the entries 11, 22, 12 and 21
_ORDER = {1: (0, 0, 0, 0), 2: (0, 1, 0, 1), 4: (0, 1, 2, 3)}


def by_hand(
    model: RoadInterventionModel, module: nn.Module, where: Tensor, rows: Any, **inputs: Any
) -> Tensor:
    """Give the logits when a hook of our own multiplies the states at `where` by matrices."""
    matrices = torch.stack([dense(model, names) for names in rows])

    def turn(module: nn.Module, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        flat, state = state, state.view(*where.shape, -1)  # some models flatten rows and tokens
        turned = torch.einsum("rij,rtj->rti", matrices, state.double()).to(state.dtype)
        state = torch.where(where[..., None], turned, state).view(flat.shape)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = module.register_forward_hook(turn)
    try:
        return model.base_model(**inputs).logits
    finally:
        handle.remove()
