"""Losses that doubt the labels: self-correction, and what it is compared with.

With z the logits of a token, y its label, V the vocabulary and t/T the share of training behind:

    p = softmax(z)                               what the model predicts
    p^ = softmax(z / tau), without gradient      the same, sharper
    g = 1 / (1 + exp(-B (t/T - beta)))           trust, which grows with training
    c = 1 - H(p) / log V                         certainty of this token, without gradient
    lambda = g c                                 or g alone
    q~ = (1 - lambda) q + lambda p^              the label, revised
    L = -sum_v q~_v log p_v                      whose gradient by z is p - q~

q~ has an entry for every word of the vocabulary; it is never built for more than a few tokens:

    L = (1 - lambda) CE(q) + lambda sum_v p^_v (-log p_v)

Every loss is frozen settings and a call `(logits, targets, progress)` that gives one value for each
token: logits (N, V), targets (N,), progress t/T in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

__all__ = [
    "CorrectedTrainer",
    "CrossEntropy",
    "ErrorNormTruncation",
    "SelfCorrectionLoss",
    "TokenLossMixin",
    "TruncationLoss",
    "certainty",
    "cross_entropy",
    "error_norm",
    "label_mass",
    "selected",
    "sharpened",
    "trust",
]

CHUNK = 1024  # tokens whose distributions over the vocabulary are in memory at a time


def trust(progress: float, steepness: float = 6.0, middle: float = 0.6) -> float:
    """Give g: how far the model is believed after a share `progress` of training."""
    return (1 + math.tanh(steepness * (progress - middle) / 2)) / 2


def certainty(logits: Tensor) -> Tensor:
    """Give c = 1 - H(p) / log V for each row; V counts the entries that are not masked (-inf)."""
    logits = logits.float()
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    return (1 - entropy / torch.isfinite(logits).sum(-1).log()).clamp(0, 1)


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """Give p^: the prediction at a temperature, cut off from the gradient."""
    return (logits.detach().float() / temperature).softmax(-1)


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Give the cross-entropy of each token; `smoothing` is shared by all entries not masked."""
    log_p = logits.float().log_softmax(-1)
    loss = -log_p.gather(-1, targets[:, None]).squeeze(-1)
    if not smoothing:
        return loss
    usable = torch.isfinite(logits)
    others = -log_p.masked_fill(~usable, 0).sum(-1) / usable.sum(-1)
    return (1 - smoothing) * loss + smoothing * others


def error_norm(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the Euclidean norm of p - onehot(y): 0 where the label is certain, at most sqrt 2."""
    p = logits.float().softmax(-1)
    labelled = p.gather(-1, targets[:, None]).squeeze(-1)
    return ((p * p).sum(-1) - 2 * labelled + 1).clamp(min=0).sqrt()


@dataclass(frozen=True)
class CrossEntropy:
    """Believe every label."""

    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, progress: float) -> Tensor:
        return _chunked(lambda z, y: cross_entropy(z, y, self.label_smoothing), logits, targets)


@dataclass(frozen=True)
class SelfCorrectionLoss:
    """Move the label towards the model's own, sharper prediction, the more the later.

    With tau = 1 and without certainty the gradient is that of cross-entropy times 1 - g: not a
    correction, a learning rate that falls. `teacher`, a call's last argument, are logits of another
    model to believe instead of the model itself, which is distillation.
    """

    tau: float = 0.5
    B: float = 6.0
    beta: float = 0.6
    certainty: bool = True
    label_smoothing: float = 0.0

    def __call__(
        self, logits: Tensor, targets: Tensor, progress: float, teacher: Tensor | None = None
    ) -> Tensor:
        def loss(z: Tensor, y: Tensor, believed: Tensor) -> Tensor:
            share = self.share(z.detach(), progress)
            log_p = z.float().log_softmax(-1)
            p_hat = sharpened(believed, self.tau)
            own = -(p_hat * log_p.masked_fill(p_hat == 0, 0)).sum(-1)
            return (1 - share) * cross_entropy(z, y, self.label_smoothing) + share * own

        return _chunked(loss, logits, targets, logits if teacher is None else teacher)

    def share(self, logits: Tensor, progress: float) -> Tensor:
        """Give lambda for each row."""
        g = trust(progress, self.B, self.beta)
        return g * certainty(logits) if self.certainty else logits.new_full(logits.shape[:1], g)


@dataclass(frozen=True)
class TruncationLoss:
    """Ignore the labels that cost most, a fraction of each batch's tokens, after a warm period."""

    fraction: float = 0.2
    start: float = 0.3  # progress
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, progress: float) -> Tensor:
        smoothed = CrossEntropy(self.label_smoothing)(logits, targets, progress)
        if progress < self.start:
            return smoothed
        with torch.no_grad():
            plain = CrossEntropy()(logits, targets, progress)
            kept = torch.ones_like(plain)
            kept[plain.topk(int(self.fraction * len(plain))).indices] = 0
        return smoothed * kept


@dataclass(frozen=True)
class ErrorNormTruncation:
    """Ignore the labels that the prediction is far from, wherever its mass is, after a while."""

    threshold: float = 1.3
    start: float = 0.3  # progress
    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, targets: Tensor, progress: float) -> Tensor:
        smoothed = CrossEntropy(self.label_smoothing)(logits, targets, progress)
        if progress < self.start:
            return smoothed
        with torch.no_grad():
            kept = _chunked(error_norm, logits, targets) <= self.threshold
        return smoothed * kept


def label_mass(loss: Any, logits: Tensor, targets: Tensor, progress: float) -> Tensor:
    """Give what a loss leaves of the label: the mass of q~ on y, (1 - lambda) + lambda p^(y)."""
    if not isinstance(loss, SelfCorrectionLoss):
        return torch.ones(len(targets), device=targets.device)

    def mass(z: Tensor, y: Tensor) -> Tensor:
        share = loss.share(z, progress)
        return 1 - share + share * sharpened(z, loss.tau).gather(-1, y[:, None]).squeeze(-1)

    return _chunked(mass, logits, targets)


def _chunked(loss: Any, *rows: Tensor) -> Tensor:
    """Apply a function to a chunk of rows at a time, computing it again in the backward pass."""
    parts = zip(*(tensor.split(CHUNK) for tensor in rows), strict=True)
    return torch.cat([checkpoint(loss, *part, use_reentrant=False) for part in parts])


def selected(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Give the logits and labels of the positions that count.

    Shapes:
        logits: (rows, columns, V). labels: (rows, columns). Returns (N, V) and (N,). A `causal`
        model's logits are for the label one column on, an encoder-decoder's for their own.
    """
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != ignore_index
    return logits[counted], labels[counted]


class TokenLossMixin:
    """Give a `Trainer` a loss of this module: `class CorrectedTrainer(TokenLossMixin, Trainer)`.

    Progress is optimizer steps over all steps planned, whatever a step accumulates, and the loss is
    the sum over the tokens of a step divided by their number, on all processes together.
    """

    def __init__(
        self,
        *args: Any,
        token_loss: Any,
        vocabulary: int | None = None,  # rows of logits that mean a word, if some are padding
        causal: bool = True,
        teacher: bool = False,  # believe the model without its adapter: distillation
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_loss_func=self._token_loss, **kwargs)
        self.token_loss, self.vocabulary, self.causal = token_loss, vocabulary, causal
        self.teacher, self._believed = teacher, None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.teacher:
            plain = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.no_grad(), plain.disable_adapter():
                self._believed = plain(**rest).logits
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _token_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        def rows(logits: Tensor) -> tuple[Tensor, Tensor]:
            return selected(logits[..., : self.vocabulary], labels, causal=self.causal)

        logits, targets = rows(outputs.logits)
        believed = (rows(self._believed)[0],) if self.teacher else ()
        state = self.state  # type: ignore[attr-defined]
        losses = self.token_loss(logits, targets, state.global_step / state.max_steps, *believed)
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / count


class CorrectedTrainer(TokenLossMixin, Trainer):
    """A `Trainer` whose loss is one of this module."""
