"""A tiny random Llama, a tokenizer of bytes and toy examples, made in place for smoke runs."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes_peft.data import Example

__all__ = ["examples", "model", "save", "tokenizer"]

_END = "<end>"


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the 256 bytes and one end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=_END, pad_token=_END)


def model(layers: int = 2, hidden: int = 64) -> LlamaForCausalLM:
    """Make a Llama with random weights from a fixed seed; `hidden` is a multiple of 64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=257,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                bos_token_id=None,
                eos_token_id=256,
                pad_token_id=256,
            )
        )


def save(folder: Path, layers: int = 2, hidden: int = 64) -> None:
    """Write the model and the tokenizer as a folder that `from_pretrained` reads."""
    model(layers, hidden).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def examples(count: int = 40) -> list[Example]:
    """Make toy examples: say the first of three letters."""
    letters = "abcdefgh"
    rows = [f"{a} {b} {c}" for a in letters for b in letters for c in letters]
    # a stride that shares no factor with 512 visits rows all over the list
    return [Example(row, row[0], group=row) for row in (rows[i * 37 % 512] for i in range(count))]
