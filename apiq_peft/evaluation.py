"""Perplexity, size on disk and bits per weight of a model, quantised or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from apiq_peft.packed import PackedLinear


@dataclass(frozen=True)
class Perplexity:
    """exp(nats / tokens), with what it was computed from."""

    nats: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity; infinite if it is too large for a float."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf


@torch.no_grad()
def perplexity(
    model: Any,
    tokens: Tensor,
    window: int,
    stride: int | None = None,
    limit: int | None = None,
    show_progress: bool = False,
) -> Perplexity:
    """Give the perplexity of a causal model on a text, window by window.

    Without `stride` windows lie side by side and every token but a window's first is predicted
    (the protocol of GPTQ and its successors). With it windows overlap, and only the tokens that no
    earlier window predicted count. `limit` windows are used at most; the denominator is the number
    of tokens that were predicted.

    Shapes:
        tokens: (length,), token ids.
    Raises:
        ValueError: the text is shorter than two tokens, or a window or stride makes no sense.
    """
    stride = stride or window
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window {window} and stride {stride} must satisfy 1 <= stride <= window")
    if tokens.dim() != 1 or len(tokens) < 2:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; give at least two, in one row")
    overlapping = stride < window
    last = len(tokens) - (1 if overlapping else window)
    starts = list(range(0, max(last, 0) + (0 if overlapping else 1), stride)) or [0]
    was_training = model.training
    model.eval()
    nats, counted, predicted = 0.0, 0, 1
    try:
        for start in tqdm(starts[:limit], disable=not show_progress, unit="window"):
            part = tokens[start : start + window].to(model.device)
            first = max(1, predicted - start) if overlapping else 1
            if len(part) <= first:
                continue
            logits = model(input_ids=part.unsqueeze(0), use_cache=False).logits[0, first - 1 : -1]
            nats += float(F.cross_entropy(logits.float(), part[first:], reduction="sum"))
            counted += len(part) - first
            predicted = start + len(part)
    finally:
        model.train(was_training)
    return Perplexity(nats, counted)


@dataclass(frozen=True)
class Size:
    """What a model takes, in bytes and in bits for each weight of its quantised layers."""

    packed_bytes: int
    other_bytes: int  # embeddings, head, norms, biases
    adapter_bytes: int
    weights: int  # in packed layers
    adapter_bits: int  # stored bits of all adapters beside packed layers

    @property
    def bits_per_weight(self) -> float:
        """Of packed layers: codes, zero points and scales."""
        return 8 * self.packed_bytes / self.weights if self.weights else math.nan

    @property
    def bits_with_adapters(self) -> float:
        """The same, with the adapters counted at 16 bits a value."""
        return self.bits_per_weight + (self.adapter_bits / self.weights if self.weights else 0)


def size_of(model: Any, adapter_value_bits: int = 16) -> Size:
    """Measure a model; biases of packed layers count among the others."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    held = sum(t.nbytes for m in packed for t in (m.qweight, m.qzeros, m.scales))
    adapters = [p for n, p in model.named_parameters() if ".lora_" in n]
    others = [p for n, p in model.named_parameters() if ".lora_" not in n]
    values = sum(p.numel() for p in adapters)
    return Size(
        held,
        sum(p.nbytes for p in others),
        sum(p.nbytes for p in adapters),
        sum(m.in_features * m.out_features for m in packed),
        values * adapter_value_bits,
    )
