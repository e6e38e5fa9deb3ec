"""Measure merging RoAd into a weight and taking it out again: time, accuracy, memory.

Compared are PEFT's RoAd (dense rotation, dense inverse), this library's (blockwise, the original
kept) and this library's without a kept original (blockwise inverse). `floor` rounds the exact
result to the weight's dtype and does nothing else. Usage: `python -m benchmarks.merge --quick`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._cases import MERGE, SHAPES, TOLERANCE, dtype_name
from benchmarks._command import Aim, Command, Fact, Point, Settings, Subject, main
from benchmarks._measure import memory_of, relative_error
from benchmarks._models import OneLinear
from benchmarks._providers import MERGED, OURS, STOCK, Provider, adapted_layers
from benchmarks._report import Panel

FLOOR = "floor"
_WEIGHT_STD = 0.02

TOTALS = {"cycle": ("merge", "unmerge")}

AIMS = (
    Aim("50 times faster than PEFT's RoAd", OURS, "cycle", "time", 50, STOCK, at_least=True),
    Aim(
        "merge error at the rounding floor in bf16",
        OURS,
        "merge",
        "error",
        1.01,
        FLOOR,
        cases="bfloat16",
    ),
    Aim("merging and unmerging changes no entry", OURS, "cycle", "changed", 0.0),
)


def points(settings: Settings) -> Iterator[Point]:
    """Yield every weight of the size asked for. A provider's accuracy and memory come first."""
    for case in MERGE[settings.size]:
        in_features, out_features = SHAPES[case.shape].linear(case.layer)
        for dtype in case.dtypes:
            name = f"{case.shape} {case.layer} {out_features}x{in_features} {dtype_name(dtype)}"
            if not settings.only.search(name):
                continue
            base = OneLinear(in_features, out_features)
            nn.init.normal_(base.linear.weight, std=_WEIGHT_STD)
            base.to(settings.device, dtype)
            exact = exact_merge(base.linear.weight, MERGED[OURS])
            floor = relative_error([exact.to(dtype)], [exact])
            subjects = {FLOOR: Subject({}, floor, partial(list, [_error("merge", floor)]))}
            for provider_name, provider in MERGED.items():
                if case.dense or provider_name != STOCK:
                    subjects[provider_name] = _subject(base, provider, exact)
            yield Point(name, out_features, TOLERANCE[dtype], STOCK, subjects, TOTALS)


def exact_merge(weight: Tensor, provider: Provider) -> Tensor:
    """Give the merged weight in float64, for the parameters that `Provider.build` draws."""
    base = OneLinear(weight.shape[1], weight.shape[0]).to(weight)
    base.linear.weight.data = weight.data
    layer = adapted_layers(provider.build(base, base.targets))["linear"]
    parameters = {n.partition(".")[0]: p.double() for n, p in layer.named_parameters()}
    return provider.dense(weight.detach().double(), parameters)


def _subject(base: OneLinear, provider: Provider, exact: Tensor) -> Subject:
    original = base.linear.weight.detach()
    kept: list[Any] = []  # the layer, then its errors

    def build() -> Any:
        kept.extend(adapted_layers(provider.build(base, base.targets)).values())
        return kept[0]

    def compare(layer: Any) -> None:
        kept.append(relative_error([layer.get_base_layer().weight], [exact]))

    memory = memory_of(
        build,
        {"merge": lambda y: y.merge(), "compare": compare, "unmerge": lambda y: y.unmerge()},
        original.device,
    )
    layer, error = kept
    restored = layer.get_base_layer().weight.detach()
    facts: list[Fact] = [
        _error("merge", error),
        ("merge", "peak", "MiB", memory["merge"].peak / 2**20),
        ("merge", "held", "MiB", memory["merge"].held / 2**20),
        ("unmerge", "peak", "MiB", memory["unmerge"].peak / 2**20),
        _error("cycle", relative_error([restored], [original])),
        ("cycle", "changed", "share", (restored != original).double().mean().item()),
    ]
    return Subject({"merge": layer.merge, "unmerge": layer.unmerge}, error, lambda: facts)


def _error(mode: str, value: float) -> Fact:
    return mode, "error", "relative", value


COMMAND = Command(
    "merge",
    __doc__ or "",
    points,
    panels=tuple(Panel((mode,), x="rows of the weight") for mode in ("merge", "unmerge")),
    aims=AIMS,
    rounds={"tiny": 3, "quick": 5, "full": 7, "gpu": 20},
)

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    raise SystemExit(main(COMMAND))
