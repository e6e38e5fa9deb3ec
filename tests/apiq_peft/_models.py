"""Tiny models of many kinds, and texts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, WIDTH = 96, 64
_BLOCKS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = {**_BLOCKS, "vocab_size": VOCABULARY, "intermediate_size": 128, "num_key_value_heads": 1}
_ENCODER = {**_BLOCKS, "vocab_size": VOCABULARY, "intermediate_size": 128}

KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=32)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_DECODER,
            head_dim=32,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=WIDTH,
            max_position_embeddings=64,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64)
    ),
    "bert": lambda: BertModel(BertConfig(**_ENCODER)),
    "roberta": lambda: RobertaModel(RobertaConfig(**_ENCODER, max_position_embeddings=70)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=32,
            d_ff=128,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=64,
        )
    ),
}


def tiny(kind: str = "llama", seed: int = 0) -> Any:
    """Give a model in evaluation mode whose linear layers do more than its residual stream."""
    torch.manual_seed(seed)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "shared" not in name:
                parameter.mul_(3)
    return model


def tokens(samples: int = 6, length: int = 12, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def outputs(model: Any, ids: Tensor) -> Tensor:
    """Give the last hidden states or the logits of a model."""
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        found = model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def error(actual: Tensor, reference: Tensor) -> float:
    return float((actual - reference).norm() / reference.norm())
