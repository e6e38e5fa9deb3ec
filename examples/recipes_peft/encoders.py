"""Load an encoder (BERT, RoBERTa and their like) by name, folder or hub id, bare or with a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from recipes_peft import e5
from recipes_peft.assets import ASSETS, cache_dir, fetch, once
from recipes_peft.errors import UserError, explained

__all__ = ["NAMES", "load_classifier", "load_encoder", "load_reader", "locate", "save_tiny"]

# What an encoder goes by here; everything else is a folder or a hub id.
NAMES = ("minilm-l6", "e5-small", "tiny")


def locate(name: str) -> str:
    """Give the folder of an encoder that has a name here, fetching it once, else `name` itself."""
    if name == "tiny":
        return str(once(cache_dir() / "tiny-encoder", save_tiny))
    if name == "e5-small":
        folder = cache_dir() / "multilingual-e5-small"
        made = once(folder, lambda to: e5.convert(fetch(name), to))
        return str(made)
    return str(fetch(name)) if name in ASSETS and name in NAMES else name


def load_encoder(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Load an encoder without a head, in evaluation mode, and its tokenizer.

    Raises:
        UserError: there is no such encoder, or its tokenizer cannot pad.
    """
    return _load(AutoModel, name, dtype, seed=0)


def load_classifier(
    name: str, labels: int, dtype: str = "float32", seed: int = 0
) -> tuple[Any, Any]:
    """Load an encoder with a head for `labels` classes, in evaluation mode, and its tokenizer.

    One label makes it a regression. What the files lack, as a rule the head, is random from `seed`.

    Raises:
        UserError: as `load_encoder`; or the files hold a head of another number of classes.
    """
    return _load(AutoModelForSequenceClassification, name, dtype, seed, num_labels=labels)


def load_reader(name: str, dtype: str = "float32", seed: int = 0) -> tuple[Any, Any]:
    """Load an encoder with a head that points at an answer's first and last token, as above.

    Raises:
        UserError: as `load_encoder`.
    """
    return _load(AutoModelForQuestionAnswering, name, dtype, seed)


def save_tiny(folder: Path, layers: int = 3, hidden: int = 64) -> None:
    """Write a random BERT and a tokenizer of bytes as a folder that `from_pretrained` reads.

    `hidden` is a multiple of 32.
    """
    tokenizer = _bytes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 32,
                max_position_embeddings=512,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bytes() -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes that joins two texts as BERT does: [CLS] a [SEP] b [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    signs = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, special, strict=True)),
    )


def _load(kind: Any, name: str, dtype: str, seed: int, **options: int) -> tuple[Any, Any]:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}; choose float32, bfloat16 or float16")
    logging.disable_progress_bar()
    place = locate(name)
    hint = (
        "; give a folder with an encoder in transformers' format, the id of one on the hub, or one"
        f" of {', '.join(NAMES)}"
    )
    before = logging.get_verbosity()
    try:
        # A head that the files lack is expected here, not worth a warning.
        logging.set_verbosity_error()
        with (
            explained(
                OSError,
                ValueError,
                RuntimeError,
                SafetensorError,
                before=f"cannot load the encoder {name!r}: ",
                after=hint,
            ),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(seed)
            tokenizer = AutoTokenizer.from_pretrained(place)
            model = kind.from_pretrained(place, dtype=getattr(torch, dtype), **options)
    finally:
        logging.set_verbosity(before)
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name!r} has no token for padding; set one in it")
    return model.eval(), tokenizer
