"""Reading the inputs of a model: how many tokens, which are the prompt, which are meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from road_peft.interventions.config import RoadInterventionConfig
from road_peft.interventions.positions import select_in_sequence

Inputs = Mapping[str, Any]


def shape_of(inputs: Inputs, args: tuple[Any, ...] = ()) -> tuple[int, int]:
    """Give rows and tokens of the inputs of a model.

    Raises:
        ValueError: there are neither input_ids nor inputs_embeds.
    """
    for value in (inputs.get("inputs_embeds"), inputs.get("input_ids"), *args[:1]):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[0], value.shape[1]
    raise ValueError("there are no inputs; give input_ids or inputs_embeds, (rows, tokens, ...)")


def length_of_cache(inputs: Inputs) -> int:
    """Give how many tokens of every row were computed before."""
    cache = inputs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def tokens_meant(config: RoadInterventionConfig, inputs: Inputs, causal: bool) -> Tensor:
    """Give the tokens of one call that `config.positions` name.

    Shapes:
        Returns (rows, tokens of this call), bool, on the host.
    Raises:
        ValueError: a mask does not fit, or what the prompt is cannot be told.
    """
    rows, tokens = shape_of(inputs)
    past = length_of_cache(inputs)
    mask = _mask(inputs, "attention_mask", rows, past + tokens)
    prompt = _prompt(inputs, mask, past, causal)
    mask = F.pad(mask, (0, prompt.shape[1] - mask.shape[1]), value=True)  # of chunks to come
    prompt = prompt & mask
    if causal and config.prefill_only and not prompt.any(1).all():
        raise ValueError(
            "a row has no prompt to intervene on, labels or padding from its first token on: set"
            " the labels of the prompt to -100, give prompt_mask, or set prefill_only=False"
        )
    positions: Any = config.positions
    return select_in_sequence(positions, mask, prompt, config.prefill_only)[:, past : past + tokens]


def attention_of_prompts(inputs: Inputs, pad_token_id: Any) -> Tensor:
    """Give the attention mask of prompts: that of the inputs, else one without padding.

    Raises:
        ValueError: the mask is not one of tokens, or there is none and a prompt holds the padding
            token.
    """
    ids, given = inputs.get("input_ids"), inputs.get("attention_mask")
    if given is not None:
        if given.dim() != 2:
            raise ValueError(
                f"attention_mask has {given.dim()} dimensions; give one of (rows, tokens)"
            )
        return given
    if ids is not None and isinstance(pad_token_id, int) and bool((ids == pad_token_id).any()):
        raise ValueError(
            f"the prompts hold the padding token {pad_token_id}; give attention_mask, so that the"
            " tokens to intervene on are known"
        )
    device = inputs["inputs_embeds"].device if ids is None else ids.device
    return torch.ones(shape_of(inputs), dtype=torch.int64, device=device)


def _prompt(inputs: Inputs, mask: Tensor, past: int, causal: bool) -> Tensor:
    """Give the tokens of the prompt; they may reach further than `mask`, never less far."""
    labels, given = inputs.get("labels"), inputs.get("prompt_mask")
    if given is not None:
        if not isinstance(given, Tensor) or given.dim() != 2 or len(given) != len(mask):
            raise ValueError(f"prompt_mask must be a mask of ({len(mask)}, tokens of the prompt)")
        return F.pad(given.cpu().bool(), (0, max(0, mask.shape[1] - given.shape[1])))
    if past:
        raise ValueError(
            f"the cache holds {past} tokens: give prompt_mask, which marks the tokens of the prompt"
            " from the first one on, or use generate"
        )
    if not causal or labels is None or labels.shape != mask.shape:
        return mask
    return (labels.cpu() != -100).long().cumsum(1) == 0


def _mask(inputs: Inputs, name: str, rows: int, tokens: int) -> Tensor:
    mask = inputs.get(name)
    if mask is None:
        return torch.ones(rows, tokens, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != (rows, tokens):
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} is {given}; it must be a mask of ({rows}, {tokens})")
    return mask.cpu().bool()
