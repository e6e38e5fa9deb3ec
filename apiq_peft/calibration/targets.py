"""Which layers of a model are calibrated, and what each is to become."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from apiq_peft.calibration.student import Grid
from apiq_peft.config import ApiQConfig
from apiq_peft.layer import weight_of
from apiq_peft.packed import PackedLinear

_NUMBERED = re.compile(r"\.\d+\.")  # inside a block


def target_names(model: nn.Module, config: ApiQConfig) -> list[str]:
    """Give the modules that `config` targets, as PEFT finds them.

    Raises:
        ValueError: there is none, or one is no linear layer; or all are targeted where there are
            experts.
    """
    wildcard = config.target_modules == "all-linear"
    if wildcard:
        _refuse_experts(model)
    config = _maybe_include_all_linear_layers(config, model)
    names = [n for n, _ in model.named_modules() if n and check_target_module_exists(config, n)]
    if wildcard:  # poolers and heads, which only single tokens reach, have no block
        names = [n for n in names if _NUMBERED.search(n)]
    if not names:
        raise ValueError(f"target_modules {config.target_modules!r} match no module of the model")
    for name in names:
        if weight_of(model.get_submodule(name)) is None:
            kind = type(model.get_submodule(name)).__name__
            raise ValueError(f"{name} is a {kind}, which ApiQ cannot quantise; leave it out")
    return names


def _refuse_experts(model: nn.Module) -> None:
    """Refuse a mixture of experts, most of whose weights would stay in full precision."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        named = name.rpartition(".")[2] == "experts" or kind.endswith("Experts")
        if named and next(module.parameters(), None) is not None:
            raise ValueError(
                f"{name} ({kind}) holds the experts of a mixture, which are not quantised: a router"
                " sends each only some tokens, too few of calibration samples. Name other layers"
                " in target_modules, such as those of attention, to quantise these alone"
            )


def grids_of(model: nn.Module, names: list[str], config: ApiQConfig) -> dict[str, Grid]:
    """Give the grid and the LoRA of each layer.

    Raises:
        ValueError: the sizes of a layer do not fit.
    """
    grids = {name: _grid(config, name) for name in names}
    for name, grid in grids.items():
        weight = weight_of(model.get_submodule(name))
        assert weight is not None
        N, K = weight.shape
        try:
            PackedLinear(K, N, grid.bits, grid.group_size, device="meta")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return grids


def _grid(config: ApiQConfig, name: str) -> Grid:
    bits, group_size = config.grid_of(name)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    scale = alpha / rank**0.5 if config.use_rslora else alpha / rank
    return Grid(bits, group_size, config.scheme, rank, scale)
