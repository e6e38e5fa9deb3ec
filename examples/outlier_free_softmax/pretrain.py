"""Pretrain small BERTs and OPTs from random weights, alike but for how they attend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import attention
import corpus
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from attention import GateConfig
from softmax_variants import Variant, beta_of
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, OPTConfig

from apiq_peft.export import save_whole
from recipes_peft import loop, report
from recipes_peft.loop import Training

__all__ = ["ARMS", "FAMILIES", "Family", "Text", "batches", "loss", "matching", "pretrain"]


@dataclass(frozen=True)
class Text:
    """A tokenizer, and the folders of tokens to train on and held out."""

    tokenizer: Any
    train: Path
    held_out: Path

    def windows(self, part: str, length: int) -> corpus.Windows:
        """Give the windows of `train` or `held_out`."""
        return corpus.Windows(getattr(self, part), length, self.tokenizer.cls_token_id)


# ---- families -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A kind of model: its class, its configuration, and what makes a batch of windows."""

    auto_class: Any
    config: Callable[[Any, Any], Any]
    join: Callable[[Any, Any, int | None], Any]


def _bert(given: Any, tokenizer: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        intermediate_size=given.ffn,
        hidden_dropout_prob=given.dropout,
        attention_probs_dropout_prob=given.dropout,
        max_position_embeddings=max(given.length, given.task_length),
        initializer_range=given.init_std,
        pad_token_id=tokenizer.pad_token_id,
    )


def _opt(given: Any, tokenizer: Any) -> OPTConfig:
    return OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        word_embed_proj_dim=given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        ffn_dim=given.ffn,
        dropout=given.dropout,
        max_position_embeddings=max(given.length, given.task_length),
        init_std=given.init_std,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )


FAMILIES = {
    "opt": Family(AutoModelForCausalLM, _opt, lambda given, tokenizer, seed: corpus.causal),
    "bert": Family(
        AutoModelForMaskedLM,
        _bert,
        lambda given, tokenizer, seed: corpus.masked(tokenizer, given.masked, seed),
    ),
}


# ---- arms ---------------------------------------------------------------------------------------


def _clipped(given: Any, family: str) -> Variant:
    return Variant("clipped", given.zeta, gamma=getattr(given, f"{family}_gamma"))


def matching(given: Any, family: str) -> Variant:
    """Give the normalised softmax that equals the clipped one at the pretraining length."""
    clipped = _clipped(given, family)
    beta = beta_of(clipped.gamma, clipped.zeta, given.length)
    return Variant("normalized", clipped.zeta, beta=beta)


# how an arm attends; a gate is the other remedy, beside the plain softmax
ARMS: dict[str, Callable[[Any, str], Variant]] = {
    "vanilla": lambda given, family: Variant(),
    "cs": _clipped,
    "ncs": matching,
    "ncs-a": lambda given, family: Variant("normalized", 1.03, beta=1.0),
    "ncs-half": lambda given, family: Variant("normalized", 1.0, beta=0.5),
    "gated": lambda given, family: Variant(),
}


def pretrain(
    accelerator: Accelerator, given: Any, family: str, arm: str, seed: int, text: Text, folder: Path
) -> Path:
    """Train one arm and keep it in a folder, unless it is there; gives the folder.

    An interrupted training goes on from `folder`.part.
    """
    if (folder / "curve.json").exists():
        return folder
    kind = FAMILIES[family]
    set_seed(given.seed + seed)
    gate = GateConfig(given.gate, given.gate_pi) if arm == "gated" else None
    config = attention.configure(kind.config(given, text.tokenizer), ARMS[arm](given, family), gate)
    model = attention.build(kind.auto_class, config).to(accelerator.device)
    how = Training(
        getattr(given, f"{family}_steps"),
        given.batch_size,
        given.micro_batch_size,
        getattr(given, f"{family}_rate"),
        given.evaluate_every,
        seed=given.seed + seed,
        warmup=given.warmup,
        clip=given.clip,
        schedule=given.schedule,
        weight_decay=given.weight_decay,
    )

    def measured() -> tuple[float, None]:
        return loss(model, batches(given, family, text, given.length)), None

    before, progress = measured()[0], folder.with_name(f"{folder.name}.progress")
    folder.parent.mkdir(parents=True, exist_ok=True)
    curve = loop.fit(
        accelerator,
        model,
        text.windows("train", given.length),  # type: ignore[arg-type]
        kind.join(given, text.tokenizer, None),
        how,
        measured,
        f"{family} {arm}, seed {seed}",
        progress,
    )
    if accelerator.is_main_process:

        def write(part: Path) -> None:
            accelerator.unwrap_model(model).save_pretrained(part)
            text.tokenizer.save_pretrained(part)
            points = [asdict(point) for point in curve]
            report.write_json(part / "curve.json", {"untrained": before, "points": points})

        save_whole(folder, write)
        progress.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return folder


def batches(
    given: Any, family: str, text: Text, length: int, count: int | None = None, part: str = ""
) -> Iterator[dict[str, Any]]:
    """Give batches of windows, held out unless `part` is `train`; their masks are always the same.

    `count` windows of the pretraining length, and as many tokens at other lengths.
    """
    rows = text.windows(part or "held_out", length)
    wanted = (count or given.held_out_windows) * given.length // length
    size = given.micro_batch_size * given.length // length
    for number, start in enumerate(range(0, min(wanted, len(rows)), size)):
        join = FAMILIES[family].join(given, text.tokenizer, number)
        yield join([rows[i] for i in range(start, min(start + size, wanted, len(rows)))])


@torch.no_grad()
def loss(model: Any, rows: Any) -> float:
    """Give the mean loss, in nats, of the tokens that are predicted."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in rows:
        labels = batch["labels"]
        # a causal model does not predict the first token of a window
        shifted = labels[:, 1:] if model.config.model_type == "opt" else labels
        counted = int((shifted != -100).sum())
        if counted:
            total += model(**loop.to(batch, model.device)).loss.item() * counted
            tokens += counted
    return total / tokens if tokens else float("nan")
