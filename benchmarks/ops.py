"""Measure the rotation operators alone against the time of moving their data.

`floor` reads and writes a tensor of the same size once (a copy; in the backward it adds two
tensors). `op` is what the tuner calls: Triton on CUDA, blocks of rows on a CPU. `peft` is the
function of PEFT's RoAd, which computes its coefficients from angles in every call. Inference runs
without autograd, a step is forward and backward with it. A rotation bank takes the coefficients of
every row from a table; see `_bank.py`. Usage: `python -m benchmarks.ops --quick`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import peft.tuners.road.layer as stock
import torch
from torch import Tensor

from benchmarks._bank import COMPILED, FLOOR, OP, bank_points
from benchmarks._cases import ROTATION, TOLERANCE, dtype_name
from benchmarks._command import Aim, Command, Point, Settings, Subject, main
from benchmarks._measure import Stages, relative_error
from benchmarks._report import Panel
from kernels_peft import rotate, rotate_reference
from road_peft.variants import VARIANTS

_VARIANT: Literal["road_2"] = "road_2"

TOTALS = {"step": ("forward", "backward")}

_ONE = "rotation d"  # in the names of the cases with one adapter for all rows

AIMS = (
    Aim("inference within 1.3 of a copy", OP, "inference", "time", 1.3, FLOOR, cases=_ONE),
    Aim("a step within 1.5 of a copy and an addition", OP, "step", "time", 1.5, FLOOR),
    Aim("inference not slower than compiled", OP, "inference", "time", 1.0, COMPILED, cases=_ONE),
    Aim("a step not slower than compiled", OP, "step", "time", 1.0, COMPILED),
    Aim("a step 1.5 times faster than PEFT", OP, "step", "time", 1.5, "peft", at_least=True),
)

Rotate = Callable[..., Tensor]


@dataclass(frozen=True)
class Implementation:
    """A function of (x, two vectors, group_size): coefficients, or angles and scales."""

    run: Rotate
    from_angles: bool = False


def _peft(x: Tensor, theta: Tensor, alpha: Tensor, group_size: int) -> Tensor:
    return stock._apply_road(_VARIANT, group_size, theta, alpha, x.to(theta.dtype)).to(x.dtype)


def _exact(x: Tensor, theta: Tensor, alpha: Tensor, group_size: int) -> Tensor:
    first, second = VARIANTS[_VARIANT].coefficients(theta, alpha, group_size)
    return rotate_reference(x, first, second, group_size)


def implementations(compiled: bool) -> dict[str, Implementation]:
    """Give the providers by name; compiling takes long, so it is left out unless asked for."""
    table = {
        OP: Implementation(rotate),
        "op recompute": Implementation(partial(rotate, recompute=True)),
        "reference": Implementation(rotate_reference),
        "peft": Implementation(_peft, from_angles=True),
    }
    if compiled:
        torch.compiler.reset()  # every case starts with an empty cache: no limit is met
        run = torch.compile(rotate_reference, fullgraph=True, dynamic=False)
        table[COMPILED] = Implementation(run)
    return table


def points(settings: Settings) -> Iterator[Point]:
    """Yield every size of the operators."""
    for case in ROTATION[settings.size]:
        for group_size in case.group_sizes:
            for dtype in case.dtypes:
                name = f"rotation d={case.features} g={group_size} {dtype_name(dtype)}"
                if not settings.only.search(name):
                    continue
                for tokens in case.tokens:
                    x = torch.randn(tokens, case.features, device=settings.device).to(dtype)
                    subjects = {FLOOR: Subject(_floor(x), 0.0)}
                    for provider, implementation in implementations(case.compiled).items():
                        subjects[provider] = _subject(implementation, x, group_size)
                    yield Point(name, tokens, TOLERANCE[dtype], FLOOR, subjects, TOTALS)
    yield from bank_points(settings)


def _floor(x: Tensor) -> Stages:
    other = torch.randn_like(x)
    return {
        "inference": x.clone,
        "forward": x.clone,
        "backward": lambda: torch.add(x, other),
    }


def _subject(implementation: Implementation, x: Tensor, group_size: int) -> Subject:
    theta = torch.randn(x.shape[-1], device=x.device) * 0.3
    alpha = torch.randn_like(theta) * 0.1 + 1
    vectors = (theta, alpha)
    if not implementation.from_angles:
        vectors = VARIANTS[_VARIANT].coefficients(theta, alpha, group_size)
    cotangent = torch.randn_like(x)
    inputs = [t.detach().requires_grad_() for t in (x, *vectors)]
    held: dict[str, Tensor] = {}

    @torch.no_grad()
    def inference() -> None:
        implementation.run(*inputs, group_size)

    def forward() -> None:
        for tensor in inputs:
            tensor.grad = None
        held["y"] = implementation.run(*inputs, group_size)

    def backward() -> None:
        held.pop("y").backward(cotangent)

    actual = _with_gradients(implementation.run, inputs, cotangent, group_size)
    exact_run: Rotate = _exact if implementation.from_angles else rotate_reference
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = _with_gradients(exact_run, exact, cotangent.double(), group_size)
    error = relative_error(actual, expected)
    return Subject({"inference": inference, "forward": forward, "backward": backward}, error)


def _with_gradients(
    run: Rotate, inputs: list[Tensor], cotangent: Tensor, group_size: int
) -> list[Tensor]:
    y = run(*inputs, group_size)
    return [y, *torch.autograd.grad(y, inputs, cotangent)]


COMMAND = Command(
    "ops",
    __doc__ or "",
    points,
    panels=tuple(Panel((mode,), x="rows") for mode in ("inference", "forward", "backward")),
    aims=AIMS,
)

if __name__ == "__main__":
    raise SystemExit(main(COMMAND))
