"""Simulate 8-bit weights and activations by static quantisation after training, per tensor.

Weights are symmetric, by their largest value. Activations are asymmetric, in a range whose ends are
averaged over calibration batches (new = 0.1 batch + 0.9 old), of all values or of a percentile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from attention import Gate, attentions
from torch import Tensor, nn

from recipes_peft import loop

__all__ = ["PROTOCOLS", "Observer", "Protocol", "activations", "symmetric", "weights"]

MOMENTUM = 0.9
# stay in full precision: the language model's head, BERT's whole masked head, a classifier
HEADS = ("lm_head", "cls", "score", "classifier", "pooler")
FUNCTIONS = ("intermediate_act_fn", "activation_fn")
POINTS = ("scores", "probs", "context")  # of an attention, which have no module of their own


@dataclass(frozen=True)
class Protocol:
    """How many batches calibrate, and which percentile of each is its range; None for all."""

    batches: int
    percentile: float | None


PROTOCOLS = {"bert": Protocol(16, None), "opt": Protocol(4, 99.999)}


def symmetric(weight: Tensor, bits: int = 8) -> Tensor:
    """Round a tensor to a symmetric grid between its largest absolute value and its negative."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny) / top
    return (weight / scale).round().clamp(-top - 1, top) * scale


class Observer:
    """The range of one activation: seen while calibrating, then what values are rounded in."""

    def __init__(self, bits: int = 8, percentile: float | None = None) -> None:
        self.top, self.percentile = 2**bits - 1, percentile
        self.low, self.high = 0.0, 0.0
        self.seen = self.frozen = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.frozen:
            return self.rounded(x)
        self.see(x)
        return x

    def see(self, x: Tensor) -> None:
        """Move the range towards that of a batch; the first one sets it."""
        if self.percentile is None:
            low, high = x.min().item(), x.max().item()
        else:
            ends = (100 - self.percentile, self.percentile)
            low, high = np.percentile(x.detach().float().cpu().numpy(), ends).tolist()
        if self.seen:
            low = MOMENTUM * self.low + (1 - MOMENTUM) * low
            high = MOMENTUM * self.high + (1 - MOMENTUM) * high
        self.low, self.high, self.seen = low, high, True

    def rounded(self, x: Tensor) -> Tensor:
        """Round to the grid, on which zero lies exactly.

        Raises:
            RuntimeError: nothing was seen in calibration.
        """
        if not self.seen:
            raise RuntimeError("an activation was never seen in calibration; give more batches")
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = max((high - low) / self.top, torch.finfo(torch.float32).tiny)
        zero = round(-low / scale)
        codes = ((x / scale).round() + zero).clamp(0, self.top)
        return ((codes - zero) * scale).to(x.dtype)


@contextmanager
def weights(model: nn.Module, linears_only: bool = False) -> Iterator[None]:
    """Round the weights of linear layers, embeddings, norms and gates, for a while.

    An embedding that is tied to a head is rounded for itself: the head keeps its precision.
    """
    kinds = (nn.Linear,) if linears_only else (nn.Linear, nn.Embedding, nn.LayerNorm)
    modules = [m for _, m in _outside_heads(model)]
    kept = [(m, "weight", m.weight) for m in modules if isinstance(m, kinds)]
    if not linears_only:
        gates = [m.weights for m in modules if isinstance(m, Gate)]
        kept += [(gate, name, weight) for gate in gates for name, weight in gate.named_parameters()]
    try:
        for module, name, weight in kept:
            setattr(module, name, nn.Parameter(symmetric(weight.detach()), requires_grad=False))
        yield
    finally:
        for module, name, weight in kept:
            setattr(module, name, weight)


@contextmanager
def activations(
    model: Any,
    batches: Iterable[dict[str, Any]],
    percentile: float | None,
    linears_only: bool = False,
) -> Iterator[Sequence[Observer]]:
    """Calibrate on batches, then round activations in every forward pass without gradients.

    Rounded are outputs of linear layers, embeddings, norms, activation functions and gates, sums
    of residuals, and scores, probabilities and contexts of attention. Gives the quantisers.
    """
    observers: list[Observer] = []

    def new() -> Observer:
        observers.append(Observer(percentile=percentile))
        return observers[-1]

    def rounded(observer: Observer) -> Any:
        return lambda module, args, output: observer(output)

    def summed(observer: Observer) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            # In place, for the next residual branch reads the same sum as the norm.
            args[0].copy_(observer(args[0]))

        return hook

    with ExitStack() as stack, torch.no_grad():
        for module in _points(model, linears_only):
            stack.callback(module.register_forward_hook(rounded(new())).remove)
            if isinstance(module, nn.LayerNorm):
                stack.callback(module.register_forward_pre_hook(summed(new())).remove)
        for module in () if linears_only else attentions(model):
            module.activation_quantizers = {point: new() for point in POINTS}  # type: ignore[assignment]
            stack.callback(delattr, module, "activation_quantizers")
        for batch in batches:
            model.eval()(**loop.to(batch, model.device))
        for observer in observers:
            observer.frozen = True
        yield observers


def _points(model: nn.Module, linears_only: bool) -> Iterator[nn.Module]:
    """Give the modules whose outputs are rounded; what wraps a linear layer stands for it."""
    inside = ""
    for name, module in _outside_heads(model):
        if inside and name.startswith(inside):
            continue
        if hasattr(module, "out_features"):
            inside = f"{name}."
            yield module
        elif not linears_only and (
            isinstance(module, nn.Embedding | nn.LayerNorm | Gate) or name.endswith(FUNCTIONS)
        ):
            yield module


def _outside_heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if not set(HEADS) & set(name.split(".")):
            yield name, module
