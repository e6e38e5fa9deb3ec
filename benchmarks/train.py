"""Measure a training step through adapted layers: time, what is kept for the backward, memory.

A step is a forward and a backward; inputs require a gradient, as inside a model. Compared are the
frozen base, RoAd of this library and of PEFT, LoRA and (IA)3, on one linear layer and on
transformer blocks with all seven linears adapted. Usage: `python -m benchmarks.train --quick`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._cases import SHAPES, TOLERANCE, TRAIN, LinearCase, StackCase, dtype_name
from benchmarks._command import Aim, Command, Fact, Point, Settings, Subject, main
from benchmarks._measure import Stages, memory_of, relative_error, saved_bytes
from benchmarks._models import OneLinear, Stack, output_bytes, random_inputs
from benchmarks._providers import BASE, LORA, OURS, STOCK, TRAINED, Provider, adapted_layers
from benchmarks._report import Panel

_CHECK_TOKENS, _PROBE_TOKENS = 8, 16

TOTALS = {"step": ("forward", "backward")}

AIMS = (
    Aim("keeps at most 1.0 output per layer", OURS, "step", "saved", 1.0),
    Aim("a step takes at most 1.10 of the frozen base", OURS, "step", "time", 1.10, BASE),
    Aim("1.5 times faster than PEFT's RoAd", OURS, "step", "time", 1.5, STOCK, at_least=True),
    Aim("not slower than LoRA r=8", OURS, "step", "time", 1.0, LORA),
)


def points(settings: Settings) -> Iterator[Point]:
    """Yield every case of the size asked for, at every number of tokens."""
    for case in TRAIN[settings.size]:
        for dtype in case.dtypes:
            if isinstance(case, LinearCase):
                name = f"linear {case.shape} {case.layer} {dtype_name(dtype)}"
            else:
                name = f"{case.blocks} blocks {case.shape} {dtype_name(dtype)}"
            if settings.only.search(name):
                yield from _case_points(name, case, dtype, settings.device)


def _case_points(
    name: str, case: LinearCase | StackCase, dtype: torch.dtype, device: torch.device
) -> Iterator[Point]:
    base: OneLinear | Stack
    if isinstance(case, LinearCase):
        base = OneLinear(*SHAPES[case.shape].linear(case.layer))
        batch, lengths = 1, case.tokens
    else:
        base, batch, lengths = Stack(case), case.batch, case.lengths
    base.to(device, dtype)
    models = {n: provider.build(base, base.targets) for n, provider in TRAINED.items()}
    errors = {n: gradient_error(base, model, TRAINED[n]) for n, model in models.items()}
    kept = {n: kept_per_token(base, model) for n, model in models.items()}
    for length in lengths:
        x = random_inputs(base, batch, length)
        subjects = {}
        for n, model in models.items():
            stages = training_step(model, x)
            saved = (kept[n] - kept[BASE]) / output_bytes(base)
            subjects[n] = Subject(stages, errors[n], partial(_facts, model, x, stages, saved))
        yield Point(name, batch * length, TOLERANCE[dtype], BASE, subjects, TOTALS)


def training_step(model: nn.Module, x: Tensor) -> Stages:
    """Give the stages of one step: a forward, and a backward to the adapter and to `x`."""
    held: dict[str, Tensor] = {}
    cotangent = torch.randn_like(model(x))

    def forward() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        held["y"] = model(x)

    def backward() -> None:
        held.pop("y").backward(cotangent)

    return {"forward": forward, "backward": backward}


def _facts(model: nn.Module, x: Tensor, stages: Stages, saved: float) -> Iterator[Fact]:
    def clear() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None

    def step(_: None) -> None:
        for run in stages.values():
            run()

    yield "step", "saved", "outputs", saved
    yield "step", "kept", "MiB", _kept(model, x) / 2**20
    yield "step", "peak", "MiB", memory_of(clear, {"step": step}, x.device)["step"].peak / 2**20
    clear()


def kept_per_token(base: OneLinear | Stack, model: nn.Module) -> float:
    """Give how many bytes more `model` keeps for the backward when there is one token more.

    What is kept but does not grow with the tokens (coefficient vectors) drops out.
    """
    some, more = (
        _kept(model, random_inputs(base, 1, tokens))
        for tokens in (_PROBE_TOKENS, 2 * _PROBE_TOKENS)
    )
    return (more - some) / _PROBE_TOKENS


def _kept(model: nn.Module, x: Tensor) -> int:
    return saved_bytes(lambda: model(x), [*model.parameters(), *model.buffers(), x])


def gradient_error(base: OneLinear | Stack, model: nn.Module, provider: Provider) -> float:
    """Give the largest relative error among the output and all gradients, against float64.

    The reference is `base` in float64 with the adapter's dense weights in place.
    """
    x = random_inputs(base, 1, _CHECK_TOKENS)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    cotangent = torch.randn_like(y)
    actual = [y, *torch.autograd.grad(y, [x, *trained.values()], cotangent)]

    exact = copy.deepcopy(base).double().requires_grad_(False)
    leaves = {n: p.detach().double().requires_grad_() for n, p in trained.items()}
    weights = {}
    for name in adapted_layers(model):
        own = {n.partition(f"{name}.")[2]: leaf for n, leaf in leaves.items() if f"{name}." in n}
        parameters = {n.partition(".")[0]: leaf for n, leaf in own.items()}
        weights[f"{name}.weight"] = provider.dense(
            exact.get_parameter(f"{name}.weight"), parameters
        )
    x_exact = x.detach().double().requires_grad_()
    y_exact = torch.func.functional_call(exact, weights, (x_exact,))
    gradients = torch.autograd.grad(y_exact, [x_exact, *leaves.values()], cotangent.double())
    return relative_error(actual, [y_exact, *gradients])


COMMAND = Command("train", __doc__ or "", points, panels=(Panel(("step",)),), aims=AIMS)

if __name__ == "__main__":
    raise SystemExit(main(COMMAND))
