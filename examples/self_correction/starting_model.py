"""The model that tuning on noise starts from: pretrained, or made here, and warmed up if wanted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from correcting import Watch, fit
from correction import CrossEntropy
from run_files import named, settings_of, unfinished
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apiq_peft.export import save_whole
from recipes_peft import models, tiny
from recipes_peft.data import Encoded
from recipes_peft.errors import explained

__all__ = ["start", "warmed"]


def start(given: Any, out: Path) -> str:
    """Give the folder or name of the model, making a random one of the settings' size if asked.

    Of several processes the main one makes it, before the others ask.
    """
    if given.model != "scratch":
        return given.model
    names = ("layers", "hidden", "tokenizer")
    folder = named(out, "scratch", {name: getattr(given, name) for name in names})
    if not folder.exists():
        save_whole(folder, partial(_scratch, given))
    return str(folder)


def warmed(given: Any, out: Path, model: str, rows: Sequence[Encoded]) -> str:
    """Give the folder of the model after training all its weights on clean pairs.

    Several processes train it together; the main one writes it.
    """
    folder = named(out, "warmed", settings_of(given))
    if folder.exists():
        return str(folder)
    loaded, tokenizer = models.load(model)
    part = unfinished(given, "warmed")
    fit(
        loaded,
        rows,
        tokenizer,
        given,
        part,
        steps=given.warm_steps,
        learning_rate=given.warm_learning_rate,
        seed=0,
        token_loss=CrossEntropy(given.label_smoothing),
        watch=Watch(),
    )

    def write(to: Path) -> None:
        loaded.save_pretrained(to)
        tokenizer.save_pretrained(to)

    processes = PartialState()
    if processes.is_main_process:
        save_whole(folder, write)
        shutil.rmtree(part, ignore_errors=True)
    processes.wait_for_everyone()
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
