"""A last pass over the whole model: all adapters together learn what full precision predicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from apiq_peft.calibration.capture import Batch, Given, giving
from apiq_peft.calibration.fitting import CalibrationError, schedule
from apiq_peft.calibration.processes import Processes
from apiq_peft.calibration.settings import Calibration


def end_to_end(
    model: Any,
    final: Given,
    factors: Iterable[nn.Parameter],
    batches: Sequence[Batch],
    settings: Calibration,
    processes: Processes,
    show_progress: bool = True,
) -> list[float]:
    """Train the A and B of all layers on the predictions of the full-precision model.

    `final` has the states that the last stack ends with in full precision: what follows it, norm
    and head, is not quantised and turns them into the predictions to learn. The loss is the
    divergence KL(full || quantised), mean over tokens; it is returned for every epoch. `batches`
    are those of this process. All activations of the model are in memory, unlike before.

    Raises:
        CalibrationError: a loss is not finite; the factors are those of before.
    Source:
        Distillation of the logits, as in RILQ (arXiv:2412.01129); not part of ApiQ.
    """
    factors = list(factors)
    before = [p.detach().clone() for p in factors]
    optimizer = torch.optim.AdamW(factors, lr=settings.final_lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    groups = processes.steps(len(batches))
    steps = settings.final_epochs * len(groups)
    masks = [_mask(batch) for batch in batches]
    weights = processes.relative([float(m.sum()) for m in masks], factors[0].device)
    losses: list[float] = []
    with tqdm(total=steps, unit="step", disable=not show_progress) as bar:
        for epoch in range(settings.final_epochs):
            total = torch.zeros((), dtype=torch.float64, device=factors[0].device)
            order = torch.randperm(len(groups), generator=generator).tolist()
            for step, group in enumerate(order, epoch * len(groups)):
                optimizer.zero_grad(set_to_none=True)
                mean = torch.zeros(1, dtype=torch.float64, device=factors[0].device)
                for number in groups[group]:
                    each = _divergences(model, final, batches[number], number)
                    real = masks[number].to(each.device)
                    loss = weights[number] * (each * real).sum() / real.sum() / processes.each
                    loss.backward()
                    mean += loss.detach()
                processes.average([mean])
                if not math.isfinite(float(mean)):
                    optimizer.zero_grad(set_to_none=True)
                    with torch.no_grad():
                        for factor, value in zip(factors, before, strict=True):
                            factor.copy_(value)
                    raise CalibrationError(
                        f"the loss of the last pass is {float(mean)} in epoch {epoch + 1}, step"
                        f" {group}; lower final_lr, or set final_epochs to 0"
                    )
                for one in optimizer.param_groups:
                    one["lr"] = settings.final_lr * schedule("cosine", 0.1, step / steps)
                gradients = [p.grad for p in factors if p.grad is not None]
                processes.average(gradients)
                torch.nn.utils.clip_grad_norm_(factors, 1.0)
                optimizer.step()
                total += mean[0]
                bar.set_postfix_str(f"divergence {float(mean):.4g}")
                bar.update()
            losses.append(float(total) / len(groups))
    for factor in factors:
        factor.grad = None
    return losses


def _mask(batch: Batch) -> Tensor:
    """Give 1 for the tokens of a batch whose predictions are learnt, 0 for padding."""
    side = "decoder_" if "decoder_input_ids" in batch else ""
    mask = batch.get(side + "attention_mask")
    return torch.ones_like(batch[side + "input_ids"]) if mask is None else (mask != 0).long()


def _divergences(model: Any, final: Given, batch: Batch, number: int) -> Tensor:
    """Give KL(full || quantised) of the prediction after every token of a batch."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.no_grad(), giving([final], number):
        wanted = F.log_softmax(model(**inputs, use_cache=False).logits.float(), -1)
    found = F.log_softmax(model(**inputs, use_cache=False).logits.float(), -1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
