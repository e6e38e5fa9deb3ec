"""One attention function for transformers' interface, with any softmax of `softmax_variants`.

Function and mask are both registered: without the mask transformers passes none, and a causal
model sees the future. What a model was pretrained with is written in its configuration
(`attention_variant`, `attention_gate`) and put back by `restore`; plain `from_pretrained` would
compute the plain softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from softmax_variants import Variant
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import logging

from recipes_peft.errors import UserError, explained

__all__ = [
    "GATES",
    "NAME",
    "Gate",
    "GateConfig",
    "attend",
    "attentions",
    "build",
    "configure",
    "register_ncs",
    "restore",
    "swapped",
    "variant_of",
]

NAME = "ncs"
# model type: the name of the attention module in a block
ATTENTIONS = {"bert": "attention.self", "opt": "self_attn"}


# ---- attention ----------------------------------------------------------------------------------


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    gate: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend with the softmax that the module's configuration names.

    The keys of a row are counted from the mask, so padding, causal rows, a cache and documents side
    by side all have the T of what they see. Softmax in float32, dropout after clipping.

    Shapes:
        query: (B, H, Q, d). key, value: (B, H or fewer, K, d). attention_mask: (B or 1, 1, Q, K),
        added to the scores, or bool. gate: (B, H, Q, 1). Returns (B, Q, H, d) and (B, H, Q, K).
    Raises:
        RuntimeError: a causal module got no mask.
    """
    if attention_mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
        raise RuntimeError(
            "a causal module got no mask and would see the future; call register_ncs, which"
            " registers function and mask under one name"
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = _seen(module, "scores", query @ key.transpose(2, 3) * scaling)
    visible = None
    if attention_mask is None:
        n_visible = torch.full((1, 1, 1, 1), key.shape[2], device=key.device)
    else:
        mask = attention_mask[..., : key.shape[2]]
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        n_visible = visible.sum(-1, keepdim=True)
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    probs = variant_of(module.config)(scores, n_visible, visible).to(query.dtype)
    probs = _seen(module, "probs", probs)
    kept = nn.functional.dropout(probs, dropout, module.training)
    out = kept @ value
    if gate is not None:
        out = out * gate
    return _seen(module, "context", out).transpose(1, 2).contiguous(), probs


def _seen(module: nn.Module, point: str, tensor: Tensor) -> Tensor:
    """Pass what has no module of its own through the quantisers that `w8a8` attaches, if any."""
    quantizers = getattr(module, "activation_quantizers", None)
    return tensor if quantizers is None else quantizers[point](tensor)


def register_ncs(name: str = NAME) -> None:
    """Teach transformers the attention function, and the mask that it needs, under a name."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)


def variant_of(config: Any) -> Variant:
    """Give the softmax that a configuration names; the plain one if it names none."""
    return Variant(**getattr(config, "attention_variant", None) or {})


@contextmanager
def swapped(model: Any, variant: Variant) -> Iterator[None]:
    """Compute with another softmax than the model was trained with, for a while."""
    before = model.config.attention_variant
    model.config.attention_variant = asdict(variant)
    try:
        yield
    finally:
        model.config.attention_variant = before


# ---- gates --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateConfig:
    """How attention's output is gated.

    `pi` is what a gate lets through at first. An ungated model that is finetuned with gates takes
    `scale` 1 / pi and a small `std` (0.01 for BERT, 0.001 for OPT).

    Raises:
        UserError: there is no such kind, or a number makes no sense.
    """

    kind: str = "linear"
    pi: float = 0.25
    std: float = 0.02
    scale: float = 1.0
    width: int = 4  # of the hidden layer of `mlp`

    def __post_init__(self) -> None:
        if self.kind not in GATES:
            raise UserError(f"the gate is {self.kind!r}; choose from {', '.join(GATES)}")
        if not 0 < self.pi < 1:
            raise UserError(f"pi is {self.pi}; a gate lets a share between 0 and 1 through")


class Gate(nn.Module):
    """One scalar for each head and token, sigmoid(G_h(x_h)), from the input of the attention.

    Shapes:
        x: (B, T, hidden); x_h is its part of hidden / heads features. Returns (B, heads, T, 1).
    Source:
        Bondarenko et al. (NeurIPS 2023), gated attention.
    """

    def __init__(self, hidden: int, heads: int, how: GateConfig) -> None:
        super().__init__()
        self.heads, self.how = heads, how
        shapes = GATES[how.kind](hidden, heads, how.width)
        self.weights = nn.ParameterList(torch.randn(shape) * how.std for shape in shapes)
        mlp = how.kind == "mlp"
        self.inner_bias = nn.Parameter(torch.zeros(shapes[0][:2])) if mlp else None
        self.bias = nn.Parameter(torch.full((heads,), math.log(how.pi / (1 - how.pi))))

    def forward(self, x: Tensor) -> Tensor:
        if self.how.kind == "heads":
            found = torch.einsum("btd,hd->bth", x, self.weights[0])
        else:
            by_head = x.unflatten(-1, (self.heads, -1))
            if self.inner_bias is not None:
                by_head = torch.einsum("bthd,hnd->bthn", by_head, self.weights[0])
                by_head = torch.relu(by_head + self.inner_bias)
            found = torch.einsum("bthd,hd->bth", by_head, self.weights[-1])
        gate = self.how.scale * torch.sigmoid(found + self.bias)
        return gate.transpose(1, 2).unsqueeze(-1)


# kind: the shapes of its weights
GATES = {
    "linear": lambda hidden, heads, width: [(heads, hidden // heads)],
    "mlp": lambda hidden, heads, width: [(heads, width, hidden // heads), (heads, width)],
    "heads": lambda hidden, heads, width: [(heads, hidden)],
}


def attentions(model: Any) -> list[nn.Module]:
    """Give the attention modules of a model in the order they run.

    Raises:
        UserError: it is neither a BERT nor an OPT.
    """
    kind = model.config.model_type
    if kind not in ATTENTIONS:
        raise UserError(f"the model is a {kind}; give one of {', '.join(ATTENTIONS)}")
    return [m for name, m in model.named_modules() if name.endswith(f".{ATTENTIONS[kind]}")]


def add_gates(model: Any, how: GateConfig) -> None:
    """Gate every attention of a model; the gates are part of its parameters."""
    config = model.config
    for module in attentions(model):
        gate = Gate(config.hidden_size, config.num_attention_heads, how)
        module.gate = gate.to(model.device, model.dtype)
        module.register_forward_pre_hook(_pass_gate, with_kwargs=True)


def _pass_gate(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Compute the gate from the input; transformers hands it on to the attention function."""
    x = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, "gate": module.gate(x)}


# ---- models -------------------------------------------------------------------------------------


def configure(config: Any, variant: Variant, gate: GateConfig | None = None) -> Any:
    """Write into a configuration how its model attends; it is saved with the model."""
    config.attention_variant = asdict(variant)
    config.attention_gate = asdict(gate) if gate else None
    return config


def build(auto_class: Any, config: Any) -> Any:
    """Make a model with random weights that attends as its configuration says."""
    register_ncs()
    model = auto_class.from_config(config, attn_implementation=NAME)
    if config.attention_gate:
        add_gates(model, GateConfig(**config.attention_gate))
    return model


def restore(folder: str | Path, auto_class: Any, **options: Any) -> Any:
    """Load a model that `save_pretrained` wrote, with the softmax and gates it was trained with.

    Raises:
        UserError: there is no such model, or its configuration does not say how it attends.
    """
    register_ncs()
    before, level = f"cannot load the model {folder}: ", logging.get_verbosity()
    logging.disable_progress_bar()
    try:
        logging.set_verbosity_error()  # a head that is new, and gates that are read below
        with explained(OSError, ValueError, RuntimeError, SafetensorError, before=before):
            config = AutoConfig.from_pretrained(folder)
            if not hasattr(config, "attention_variant"):
                raise UserError(
                    f"{folder} does not say how its attention was computed (attention_variant);"
                    " give a model that this recipe pretrained"
                )
            model = auto_class.from_pretrained(folder, attn_implementation=NAME, **options)
            if config.attention_gate:
                add_gates(model, GateConfig(**config.attention_gate))
                _load_gates(model, Path(folder) / "model.safetensors")
    finally:
        logging.set_verbosity(level)
    return model.eval()


@torch.no_grad()
def _load_gates(model: Any, file: Path) -> None:
    gates = {name: p for name, p in model.named_parameters() if ".gate." in name}
    with safe_open(file, framework="pt") as saved:
        for name, parameter in gates.items():
            parameter.copy_(saved.get_tensor(name))
