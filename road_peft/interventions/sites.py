"""Finding the modules of a model whose outputs a configuration means."""

from __future__ import annotations

from typing import Any

from torch import nn

from road_peft.interventions.config import RoadInterventionConfig

# what models call the parts of a block; the output of a block is that of the block itself
COMPONENTS = {
    "block_output": ("",),
    "attention_output": ("self_attn", "attn", "attention", "self_attention"),
    "mlp_output": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}


def find_modules(model: nn.Module, config: RoadInterventionConfig) -> dict[str, nn.Module]:
    """Give the modules by the names that files use, which are the same with or without adapters.

    Raises:
        ValueError: the model has no such block or module.
    """
    if config.layers is None:
        if config.component in COMPONENTS:
            raise ValueError(
                f"component is {config.component!r} without layers; give the numbers of the blocks,"
                " or the path of a module as component"
            )
        return {config.component: _submodule(model, config.component, "the model")}
    blocks = _blocks(model)
    if max(config.layers) >= len(blocks):
        raise ValueError(
            f"layers is {config.layers}, but the model has {len(blocks)} blocks, from 0 on"
        )
    return {
        f"{number}.{config.component}": _part(blocks[number], config.component, f"block {number}")
        for number in config.layers
    }


def features_of(module: nn.Module, model: nn.Module) -> int:
    """Give the width of a module's output: a linear layer's own, else that of the hidden states.

    Raises:
        ValueError: neither the module nor the model's configuration tells.
    """
    for name in ("out_features", "nf"):  # nf is that of transformers' Conv1D
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"how many features a {type(module).__name__} gives is not known, since the model has"
            " no config.hidden_size; name a linear layer as component"
        )
    return width


def _blocks(model: nn.Module) -> nn.ModuleList:
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(other + ".") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[name] = module
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(config, "num_hidden_layers", None)
    fitting = [m for m in found.values() if depth is None or len(m) == depth]
    if len(fitting) != 1:
        raise ValueError(
            f"the blocks of this model cannot be told from its lists of modules"
            f" ({', '.join(found) or 'none'}); set layers=None and give the path of a module as"
            " component"
        )
    return fitting[0]


def _part(block: nn.Module, component: str, where: str) -> nn.Module:
    if component not in COMPONENTS:
        return _submodule(block, component, where)
    for name in COMPONENTS[component]:
        if name == "" or hasattr(block, name):
            return block.get_submodule(name)
    raise ValueError(
        f"{where}, a {type(block).__name__}, has none of {', '.join(COMPONENTS[component])} for"
        f" {component!r}; {_choices(block)}"
    )


def _submodule(parent: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{where} has no module {path!r}; {_choices(parent)}") from error


def _choices(parent: nn.Module) -> str:
    names = [name for name, _ in parent.named_modules() if name]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"give as component one of {', '.join(names[:12])}{more}"
