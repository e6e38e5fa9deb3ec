"""Tiny models for the tests of the tuner, and adapters on them whose every value matters.

A fresh RoAd adapter is the identity, and copies of one adapter hide a row that took the wrong one.
So the adapters made here are random, each different, and far from singular.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import peft.tuners.road as stock
import torch
import transformers
from torch import Tensor, nn

import road_peft

VOCABULARY = 40
LIBRARIES = ("stock", "ours")

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_BLOCKS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_BERT = {**_BLOCKS, "vocab_size": VOCABULARY, "pad_token_id": 1}
_OPT = {
    **_TOKENS,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
_GPT2 = {
    **_TOKENS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 1,
    "initializer_factor": 2.0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}

# name: (class in transformers, settings of its configuration)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**_BLOCKS, **_TOKENS, "num_key_value_heads": 1}),
    "opt": ("OPTForCausalLM", _OPT),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "t5": ("T5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART),
    "roberta": ("RobertaModel", _BERT),
    "bert classifier": ("BertForSequenceClassification", {**_BERT, "num_labels": 4}),
    "llama classifier": (
        "LlamaForSequenceClassification",
        {**_BLOCKS, **_TOKENS, "num_key_value_heads": 1, "num_labels": 4},
    ),
}


def tiny(name: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """Build a model of the table in evaluation mode, with biases that are not zero."""
    class_name, defaults = TINY[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**{**defaults, **settings}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()


class Mlp(nn.Module):
    """Two linear layers with biases: what PEFT sees of a model that is not from transformers."""

    def __init__(self, width: int = 8, hidden: int = 16, outputs: int = 4) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


@contextmanager
def registered(library: str) -> Iterator[type[Any]]:
    """Give `PeftType.ROAD` to one of LIBRARIES and yield its config class; ours has it again after.

    `stock` is PEFT's own RoAd, whose defects the tests set beside what ours does.
    """
    try:
        if library == "stock":
            road_peft.unregister()
            yield stock.RoadConfig
        else:
            road_peft.register()
            yield road_peft.RoadConfig
    finally:
        road_peft.register()


def randomize(model: nn.Module, *names: str, spread: float = 0.4) -> nn.Module:
    """Draw values for the named adapters, or for all: strong, different, far from singular."""
    with torch.no_grad():
        for layer in adapted(model):
            for name in names or tuple(layer.road_theta):
                layer.road_theta[name].uniform_(-spread, spread)
                layer.road_alpha[name].uniform_(0.7, 1.3)
                if name in getattr(layer, "road_lora_B", {}):
                    layer.road_lora_B[name].normal_(0, 0.3)
    return model


def with_adapters(model: nn.Module, configs: dict[str, Any], **kwargs: Any) -> peft.PeftModel:
    """Put one random adapter on `model` for each entry of `configs`; the first one is active."""
    first, *others = configs
    model = peft.get_peft_model(model, configs[first], adapter_name=first, **kwargs)
    for name in others:
        model.add_adapter(name, configs[name])
    return randomize(model).eval()


def adapted(model: nn.Module) -> Iterator[Any]:
    """Give the layers that carry RoAd adapters, PEFT's own or ours."""
    return (m for m in model.modules() if isinstance(m, stock.RoadLayer))


def layer_of(base: nn.Module, **settings: Any) -> Any:
    """Give the layer that `get_peft_model` makes of `base`, with one random adapter `default`."""
    config = road_peft.RoadConfig(target_modules=["0"], **{"group_size": 4, **settings})
    model = peft.get_peft_model(nn.Sequential(base), config)
    return randomize(model).base_model.model[0]


def set_values(layer: Any, theta: Any, alpha: Any, name: str = "default") -> None:
    """Write the parameters of one adapter of a layer."""
    with torch.no_grad():
        layer.road_theta[name].copy_(torch.as_tensor(theta))
        layer.road_alpha[name].copy_(torch.as_tensor(alpha))


def by_hand(variant: str, theta: Tensor, alpha: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Write out the diagonal and off-diagonal coefficient of every channel, one by one.

    From RoAd (arXiv:2409.00119), eq. 3, and the order of parameters in a group of a PEFT file.
    """
    g, half = group_size, group_size // 2
    features = theta.numel() * 2 // {"road_1": 1, "road_2": 2, "road_4": 4}[variant]
    first, second = [], []
    for c in range(features):
        group, within = divmod(c, g)
        diagonal, off = {
            "road_1": (group * half + within % half, group * half + within % half),
            "road_2": (c, c),
            "road_4": (group * 2 * g + within, group * 2 * g + g + within),
        }[variant]
        first.append(alpha[diagonal] * theta[diagonal].cos())
        second.append(alpha[off] * theta[off].sin())
    return torch.stack(first), torch.stack(second)


def bytes_of(module: nn.Module) -> dict[str, bytes]:
    """Give every parameter and buffer of `module` as bytes, for exact comparison, NaN included."""
    return {
        name: tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def no_hooks(model: nn.Module) -> bool:
    """Say whether no module has a forward hook or pre-hook."""
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def call_silently(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call without the warnings that PEFT gives on the way, which no test is about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
