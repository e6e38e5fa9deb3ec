"""The gradient part of a calibration: two groups of parameters, and what if it diverges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from apiq_peft.calibration.finite import LastSound, all_finite, first_not_finite, in_layer
from apiq_peft.calibration.processes import Processes
from apiq_peft.calibration.settings import Calibration
from apiq_peft.calibration.student import StudentLinear


def fit(
    where: str,
    layers: Mapping[str, StudentLinear],
    loss_of: Callable[[int], Tensor],
    weights: Sequence[float],
    settings: Calibration,
    generator: torch.Generator,
    progress: Callable[[int, float], None],
    processes: Processes,
) -> list[float]:
    """Train clipping and LoRA of some layers together; give the mean loss of every epoch.

    `loss_of` gives the loss of a batch by its number, which counts as much as `weights` says for
    that batch. A step takes the mean of losses and gradients over its batches on all processes. A
    loss or a parameter that is not finite on one of them restores on all the state of the last
    epoch, and they go on once at a tenth of the rates.

    Raises:
        CalibrationError: it happens a second time; the layers are in the state of the last epoch
            in which all was finite.
    """
    students = list(layers.values())
    clips = [p for s in students for p in (s.quantizer.high_clip, s.quantizer.low_clip)]
    loras = [p for s in students for p in (s.lora_A, s.lora_B)]
    parameters = [*clips, *loras]
    losses, epoch = [], 0
    sound = LastSound(parameters)
    steps = processes.steps(len(weights))
    order = list(range(len(steps)))
    optimizer = _optimizer(clips, loras, settings, sound.rate)
    while epoch < settings.epochs:
        if settings.shuffle:
            order = torch.randperm(len(steps), generator=generator).tolist()
        total = 0.0
        for step, number in enumerate(order):
            share = (epoch * len(steps) + step) / (settings.epochs * len(steps))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(settings.schedule, settings.warmup, share)
            optimizer.zero_grad(set_to_none=True)
            mean = torch.zeros((), device=parameters[0].device)
            for batch in steps[number]:
                loss = loss_of(batch) * (weights[batch] / processes.each)
                loss.backward()
                mean += loss.detach()
            processes.average([mean, *(p.grad for p in parameters if p.grad is not None)])
            value = float(mean)
            if not math.isfinite(value):
                wrong = f"the loss is {value}"
                layer = first_not_finite(layers, loss_of, steps[number])
                break
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            if not all_finite(parameters):
                wrong = "A, B or the clipping is not finite"
                layer = next(n for n, held in layers.items() if not all_finite(held.trained()))
                break
            total += value
        else:
            epoch += 1
            losses.append(total / len(steps))
            sound.keep()
            progress(epoch, losses[-1])
            continue
        of = in_layer(layer) if len(layers) > 1 else ""  # else `where` names it
        sound.restore(
            f"{where}: {wrong} in epoch {epoch + 1}, step {step + 1}{of}",
            "lower clip_lr and lora_lr, or set compute_dtype and cache_dtype to float32 if"
            " activations are too large for a narrower one",
        )
        optimizer = _optimizer(clips, loras, settings, sound.rate)
    for parameter in parameters:
        parameter.grad = None
    return losses


def _optimizer(
    clips: Sequence[Tensor], loras: Sequence[Tensor], settings: Calibration, rate: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {
                "params": list(parameters),
                "lr": rate * lr,
                "peak": rate * lr,
                "weight_decay": decay,
            }
            for parameters, lr, decay in (
                (clips, settings.clip_lr, settings.clip_weight_decay),
                (loras, settings.lora_lr, settings.lora_weight_decay),
            )
        ]
    )


def schedule(kind: str, warmup: float, share: float) -> float:
    """Give the share of the peak rate after a share of all steps; see `SCHEDULES` for the kinds."""
    if share < warmup:
        return share / warmup
    if kind == "constant":
        return 1.0
    done = (share - warmup) / (1 - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))
