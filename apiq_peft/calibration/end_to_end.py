"""A last pass over the whole model: all adapters together learn what full precision predicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from apiq_peft.calibration.capture import Batch, Given, giving
from apiq_peft.calibration.finite import LastSound, all_finite, first_not_finite, in_layer
from apiq_peft.calibration.fitting import schedule
from apiq_peft.calibration.processes import Processes
from apiq_peft.calibration.settings import Calibration


def end_to_end(
    model: Any,
    final: Given,
    layers: Mapping[str, nn.Module],
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

    A loss or a parameter that is not finite restores the state of the last epoch, and it goes on
    once at a tenth of the rate.

    Raises:
        CalibrationError: it happens a second time; A and B are those of the last epoch in which
            all was finite.
    Source:
        Distillation of the logits, as in RILQ (arXiv:2412.01129); not part of ApiQ.
    """
    factors = {name: _factors(layer) for name, layer in layers.items()}
    trained = [p for held in factors.values() for p in held]
    device = trained[0].device
    sound = LastSound(trained)
    optimizer = torch.optim.AdamW(trained, lr=settings.final_lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    groups = processes.steps(len(batches))
    steps = settings.final_epochs * len(groups)
    masks = [_mask(batch) for batch in batches]
    weights = processes.relative([float(m.sum()) for m in masks], device)
    losses: list[float] = []

    def loss_of(number: int) -> Tensor:
        each = _divergences(model, final, batches[number], number)
        real = masks[number].to(each.device)
        return weights[number] * (each * real).sum() / real.sum().clamp(min=1) / processes.each

    with (
        _alone(model, trained),
        tqdm(total=steps, unit="step", disable=not show_progress) as bar,
    ):
        while len(losses) < settings.final_epochs:
            total = torch.zeros((), dtype=torch.float64, device=device)
            order = torch.randperm(len(groups), generator=generator).tolist()
            for number, group in enumerate(order):
                share = (len(losses) * len(groups) + number) / steps
                mean = torch.zeros(1, dtype=torch.float64, device=device)
                for batch in groups[group]:
                    loss = loss_of(batch)
                    loss.backward()
                    mean += loss.detach()
                processes.average([mean])
                if not math.isfinite(float(mean)):
                    wrong = f"the loss of the last pass is {float(mean)}"
                    layer = first_not_finite(layers, loss_of, groups[group])
                    break
                for one in optimizer.param_groups:
                    one["lr"] = sound.rate * settings.final_lr * schedule("cosine", 0.1, share)
                processes.average([p.grad for p in trained if p.grad is not None])
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if not all_finite(trained):
                    wrong = "A or B in the last pass is not finite"
                    layer = next(n for n, held in factors.items() if not all_finite(held))
                    break
                total += mean[0]
                bar.set_postfix_str(f"divergence {float(mean):.4g}")
                bar.update()
            else:
                losses.append(float(total) / len(groups))
                sound.keep()
                continue
            optimizer.zero_grad(set_to_none=True)
            sound.restore(
                f"{wrong} in epoch {len(losses) + 1}, step {number + 1}{in_layer(layer)}",
                "lower final_lr, or set final_epochs to 0: blocks that were kept in a folder are"
                " not calibrated again",
            )
            optimizer = torch.optim.AdamW(trained, lr=settings.final_lr, weight_decay=0.0)
            bar.reset()
            bar.update(len(losses) * len(groups))
    return losses


def _factors(layer: nn.Module) -> list[nn.Parameter]:
    """Give A and B of an adapted layer."""
    return [p for name, p in layer.named_parameters() if name.startswith("lora_")]


@contextmanager
def _alone(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let nothing but `trained` have gradients."""
    kept = set(trained)
    others = [p for p in model.parameters() if p.requires_grad and p not in kept]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


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
