"""Sampling by request: transformers' batches sample for all, so what is greedy is made certain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingTemperatureLogitsWarper,
)

from road_peft.serve.options import ServeOptions

_PAGE = 256  # tokens; transformers' own default
_ANY = 0.5  # makes transformers build a processor; every request states its own value


class ExactTemperature(ContinuousBatchingTemperatureLogitsWarper):
    """Divides scores by the temperature of their request; 0 leaves the best token alone.

    The best is what `argmax` gives, as in greedy `generate`, ties included; a small temperature
    would draw lots between ties. Scores that are not finite give nonsense, but no probabilities
    that sampling refuses, which would end generation for all.

    Shapes:
        scores: (n, vocabulary), float32. temperatures: at least n float32 values seen as int32.
    """

    def __call__(self, scores: Tensor, temperatures: Tensor) -> Tensor:
        temperature = temperatures[: scores.shape[0]].view(torch.float32).unsqueeze(-1)
        greedy = temperature == 0
        best = scores.argmax(-1, keepdim=True)
        certain = torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0)
        # the largest becomes 0, so that no temperature, however small, makes two scores infinite
        below = scores - scores.amax(-1, keepdim=True)
        drawn = (below / torch.where(greedy, 1.0, temperature)).nan_to_num(nan=0.0)
        return torch.where(greedy, certain, drawn)


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Give the tokens that end an answer: those of the model, or else of the tokenizer."""
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def generation_config(model: Any, tokenizer: Any, options: ServeOptions) -> GenerationConfig:
    """Give the settings that all requests share; nothing of the model's own defaults but the end.

    A client that leaves a field out gets what OpenAI documents for it.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=_ANY,
        top_p=_ANY if options.top_p else None,
        eos_token_id=eos_ids(model, tokenizer) or [-1],  # -1 is no token
        max_new_tokens=options.max_new_tokens,
    )


def batching_config(options: ServeOptions) -> ContinuousBatchingConfig:
    """Give the sizes of batches and of the cache."""
    blocks = None if options.cache_tokens is None else -(-options.cache_tokens // _PAGE)
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=blocks,
        max_batch_tokens=options.max_batch_tokens,
        max_requests_per_batch=min(options.max_queue, 1024),
        per_request_processors=True,
    )


def make_temperature_exact(manager: Any) -> None:
    """Put `ExactTemperature` in the place of transformers' own."""
    processors = manager.logit_processor.logits_processor
    for place, processor in enumerate(processors):
        if isinstance(processor, ContinuousBatchingTemperatureLogitsWarper):
            processors[place] = ExactTemperature(processor)
            return
    raise RuntimeError("transformers made no temperature processor; its version is not supported")
