"""The model that tuning on noise starts from: pretrained, or made here, and warmed up if wanted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from correcting import fit
from correction import CrossEntropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apiq_peft.export import save_whole
from recipes_peft import models, tiny
from recipes_peft.data import Encoded
from recipes_peft.errors import explained

__all__ = ["start", "warmed"]


def start(given: Any, out: Path) -> str:
    """Give the folder or name of the model, making a random one of the settings' size if asked."""
    if given.model != "scratch":
        return given.model
    names = ("layers", "hidden", "tokenizer")
    return _once(out, "scratch", given, names, lambda folder: _scratch(given, folder))


def warmed(given: Any, out: Path, model: str, rows: Sequence[Encoded]) -> str:
    """Give the folder of the model after training all its weights on clean pairs."""

    def make(folder: Path) -> None:
        loaded, tokenizer = models.load(model, given.dtype)
        fit(
            loaded,
            rows,
            tokenizer,
            given,
            out / "trainer",
            steps=given.warm_steps,
            learning_rate=given.warm_learning_rate,
            seed=0,
            token_loss=CrossEntropy(given.label_smoothing),
        )
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    apart = ("out", "arms", "tuners", "rates", "seeds", "side_seeds")
    names = [name for name in vars(given) if name not in apart]
    return _once(out, "warmed", given, names, make)


def _once(out: Path, kind: str, given: Any, names: Sequence[str], make: Any) -> str:
    key = json.dumps({name: getattr(given, name) for name in names}, sort_keys=True)
    folder = out / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not folder.exists():
        save_whole(folder, make)
    return str(folder)


def _scratch(given: Any, folder: Path) -> None:
    tokenizer = tiny.tokenizer()
    if given.tokenizer:
        with explained(OSError, ValueError, before=f"cannot load {given.tokenizer!r}: "):
            tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=given.hidden,
                intermediate_size=4 * given.hidden,
                num_hidden_layers=given.layers,
                num_attention_heads=max(2, given.hidden // 64),
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
