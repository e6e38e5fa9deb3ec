"""Measure a pretrained model: loss at all lengths, outliers, 8 bits, and a made outlier."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import attention
import blimp
import outlier_metrics
import torch
import w8a8
from attention import swapped, variant_of
from pretrain import FAMILIES, Text, batches, loss, matching
from torch import nn

__all__ = ["blocks", "decoding", "evaluate", "inject", "rounded_loss"]


def evaluate(given: Any, family: str, arm: str, folder: Path, text: Text, device: Any) -> Any:
    """Give all that is measured of a pretrained model."""
    model = attention.restore(folder, FAMILIES[family].auto_class).to(device)
    found: dict[str, Any] = {
        "loss": loss(model, batches(given, family, text, given.length)),
        "lengths": at_lengths(given, family, text, model),
        "outliers": asdict(
            outlier_metrics.measure(
                model, batches(given, family, text, given.length, given.outlier_windows)
            )
        ),
        "w8a8": rounded_loss(given, family, text, model),
    }
    if arm in ("cs", "ncs"):  # the same weights with the other of the two
        other = matching(given, family) if arm == "cs" else _clipped_of(given, family, model)
        with swapped(model, other):
            found["swapped"] = at_lengths(given, family, text, model)
    if given.blimp:
        pairs = blimp.read(Path(given.blimp), given.blimp_pairs, text, given.length)
        found["blimp"] = blimp.accuracy(model, pairs, text)
    if family == "opt":
        found["decoding"] = decoding(model, text.windows("held_out", given.length)[0])
        if arm == "vanilla":
            found["injected"] = {
                factor: rounded_loss(given, family, text, inject(model, int(factor)), True)
                for factor in ["1", *given.injected]
            }
    return found


def at_lengths(given: Any, family: str, text: Text, model: Any) -> dict[str, float]:
    """Give the loss on windows of other lengths than the pretraining's, and on it."""
    return {
        length: loss(model, batches(given, family, text, int(length))) for length in given.lengths
    }


def _clipped_of(given: Any, family: str, model: Any) -> Any:
    before = variant_of(model.config)
    return type(before)("clipped", before.zeta, gamma=getattr(given, f"{family}_gamma"))


def rounded_loss(
    given: Any,
    family: str,
    text: Text,
    model: Any,
    linears_only: bool = False,
    rounded_weights: bool = True,
) -> float:
    """Give the loss with 8-bit activations, and weights unless they are of low bits already."""
    how = w8a8.PROTOCOLS[family]
    count = how.batches * given.micro_batch_size
    calibration = batches(given, family, text, given.length, count, "train")
    with ExitStack() as stack:
        if rounded_weights:
            stack.enter_context(w8a8.weights(model, linears_only))
        stack.enter_context(w8a8.activations(model, calibration, how.percentile, linears_only))
        return loss(model, batches(given, family, text, given.length))


@torch.no_grad()
def inject(model: Any, factor: float) -> Any:
    """Give a copy of an OPT in which one channel is `factor` times larger, to no effect.

    Row and bias of a channel of the first `fc1`, the one of the largest row, are multiplied, its
    column of `fc2` is divided: ReLU in between keeps the function.
    """
    changed = copy.deepcopy(model)
    block = blocks(changed)[0]
    channel = block.fc1.weight.norm(dim=1).argmax()
    block.fc1.weight[channel] *= factor
    block.fc1.bias[channel] *= factor
    block.fc2.weight[:, channel] /= factor
    return changed


def blocks(model: Any) -> nn.ModuleList:
    """Give the list of blocks of an OPT."""
    return model.model.decoder.layers


@torch.no_grad()
def decoding(model: Any, ids: list[int]) -> float:
    """Give how far decoding with a cache is from a full forward pass, of the largest logit."""
    tokens = torch.tensor([ids], device=model.device)
    with _evaluated(model):
        whole = model(input_ids=tokens).logits
        cache, steps = None, []
        for t in range(tokens.shape[1]):
            out = model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    apart = (torch.cat(steps, 1) - whole).abs().max() / whole.abs().max()
    return apart.item()


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
