"""Measure products with packed weights against the library's linear layer and other packages.

`cold` runs without autograd and with weights that no cache holds, a `step` is a forward and a
backward. `floor` is the least time by this machine's own bandwidth and matrix product, for the
packed codes with their LoRA. A last section times rounding to a grid and back, as calibration does
it; there x is the width. `--bits 2 3` leaves out other widths.
Usage: `python -m benchmarks.kernels --quick`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks._cases import (
    KERNELS,
    SHAPES,
    TOLERANCE,
    GridCase,
    KernelCase,
    dtype_name,
)
from benchmarks._command import Aim, Command, Fact, Point, Settings, Subject, Work, main
from benchmarks._kernel_floor import Machine, cold_copies
from benchmarks._kernel_grid import FLOOR, TOTALS, grid_points
from benchmarks._kernel_layers import (
    LAYERS,
    LINEAR,
    LORA,
    PACKED,
    Layer,
    Weight,
    chosen,
    exact,
    label,
)
from benchmarks._measure import Stages, graphed, memory_of, relative_error
from benchmarks._quantizer_peers import missing
from benchmarks._report import Panel
from kernels_peft.packing import FORMATS

LIMITS = {1: 1.0, 4: 1.0, 16: 1.0, 64: 1.0, 2048: 1.15, 4096: 1.15}  # by rows
_CHECKED_ROWS = 64
_LONG_ROWS, _LONG_ROUNDS = 1024, 3  # from so many rows on, so many rounds on a CPU


def _aims() -> Iterator[Aim]:
    """Yield what is to be reached on a GPU: replayed from a graph, as a decode step runs."""
    on_gpu = partial(Aim, metric="time", cases="linear", device="cuda")
    for rows in (1, 4, 16):
        yield on_gpu(
            f"2 bits with LoRA: 70 % of the floor at {rows} rows",
            label(LORA, 2),
            "graph",
            limit=1 / 0.7,
            against=label(FLOOR, 2),
            x=rows,
        )
    three, four = (label(PACKED, bits) for bits in (3, 4))
    yield on_gpu("3 bits: not slower than 4", three, "graph", limit=1.0, against=four)
    for bits in FORMATS:
        for rows, limit in LIMITS.items():
            yield on_gpu(
                f"{bits} bits: at most {limit} of the library's linear at {rows} rows",
                label(PACKED, bits),
                "graph",
                limit=limit,
                against=LINEAR,
                x=rows,
            )
    others = {name: provider for name, provider in LAYERS.items() if provider.needs}
    for name, provider in others.items():
        for bits, mode in itertools.product({2, 3} & set(provider.bits), ("graph", "cold")):
            yield on_gpu(
                f"{bits} bits: not slower than {name} ({mode})",
                label(PACKED, bits),
                mode,
                limit=1.0,
                against=label(name, bits),
            )


def points(settings: Settings, bits: Sequence[int] = tuple(FORMATS)) -> Iterator[Point]:
    """Yield every layer of the size asked for at every number of rows, then the grids."""
    machines: dict[torch.dtype, Machine] = {}
    for case in KERNELS[settings.size]:
        in_features, out_features = SHAPES[case.shape].linear(case.layer)
        for dtype in case.dtypes:
            kind = "grid" if isinstance(case, GridCase) else "linear"
            name = f"{kind} {case.shape} {case.layer} {out_features}x{in_features}"
            name = f"{name} {dtype_name(dtype)}"
            if not settings.only.search(name):
                continue
            weight = Weight(in_features, out_features, dtype, settings.device)
            if isinstance(case, GridCase):
                yield from grid_points(name, weight, bits)
                continue
            if dtype not in machines:
                machines[dtype] = Machine.measure(settings.device, dtype)
            yield from _layer_points(name, case, weight, machines[dtype], bits)


def _layer_points(
    name: str, case: KernelCase, weight: Weight, machine: Machine, bits: Sequence[int]
) -> Iterator[Point]:
    layers = {}
    for key, provider, width in chosen(bits, weight.dtype, weight.device):
        if missing(provider.needs):
            _say(f"not measured: {key}, which needs {provider.needs}; it is not installed")
            continue
        try:
            layers[key] = provider.build(weight, width)
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            if not provider.needs:
                raise
            _say(f"not measured: {key}, whose package failed: {error}")
            continue
    cold = {key: _cold(layer, weight.device) for key, layer in layers.items()}
    first = torch.zeros(1, weight.linear.in_features, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():  # what a layer makes when it is first used is not timed
        for module in itertools.chain.from_iterable(cold.values()):
            module(first)
    for rows in case.rows:
        x = torch.randn(rows, weight.linear.in_features, device=weight.device).to(weight.dtype)
        cotangent = torch.randn(rows, weight.linear.out_features, device=weight.device).to(x.dtype)
        subjects = {}
        for width in bits:
            layer = layers[label(LORA, width)]
            subjects[label(FLOOR, width)] = _floor(machine, layer, x, cotangent)
        for key, layer in layers.items():
            step = layer.differentiable and rows in case.steps
            subjects[key] = _subject(layer, cold[key], x, cotangent, machine, step)
        rounds = _LONG_ROUNDS if rows >= _LONG_ROWS and weight.device.type == "cpu" else None
        yield Point(name, rows, TOLERANCE[x.dtype], LINEAR, subjects, TOTALS, rounds)


def _cold(layer: Layer, device: torch.device) -> list[nn.Module]:
    """Give what `cold` goes through; copies on a CPU, where bitsandbytes changes what it infers."""
    if device.type == "cuda":
        return [layer.module]
    return [copy.deepcopy(layer.module) for _ in range(cold_copies(layer.stored))]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _work(layer: Layer, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Give the bytes that a forward has to move and the operations it has to do."""
    operations = 2 * y.numel() * x.shape[1]
    for factor in layer.trained(layer.module):  # A or B, which meet every row once
        operations += 2 * len(x) * factor.numel()
    return layer.stored + x.nbytes + y.nbytes, operations


def _floor(machine: Machine, layer: Layer, x: Tensor, y: Tensor) -> Subject:
    """Give the least time of a forward; it is never run."""
    floor = machine.floor_ms(*_work(layer, x, y))
    modes = ("cold", "graph") if x.device.type == "cuda" else ("cold",)
    facts: list[Fact] = [(mode, "time", "ms", floor) for mode in modes]
    return Subject({}, 0.0, lambda: facts)


def _subject(
    layer: Layer,
    cold: Sequence[nn.Module],
    x: Tensor,
    cotangent: Tensor,
    machine: Machine,
    step: bool,
) -> Subject:
    error = _error(layer, x, cotangent, step)
    turns = itertools.cycle(cold)

    @torch.no_grad()
    def once() -> None:
        next(turns)(x)

    stages: dict[str, Callable[[], object]] = {"cold": once}
    if x.device.type == "cuda" and error <= TOLERANCE[x.dtype]:
        try:
            stages["graph"] = graphed(once, x.device)
        except RuntimeError as reason:  # it waits for the host, or allocates outside of torch
            _say(f"not replayed from a graph: {type(layer.module).__name__}: {reason}")
    if step:
        stages |= _step(layer, x, cotangent)
    floor_s = machine.floor_ms(*_work(layer, x, cotangent)) / 1e3
    # a rate whose amount is the seconds of the floor is the share of it that is reached
    work = dict.fromkeys(("cold", "graph"), Work("floor", "share", floor_s))

    def facts() -> Iterator[Fact]:
        yield "cold", "stored", "MiB", layer.stored / 2**20
        yield "cold", "peak", "MiB", _peak({"cold": once}, x.device)
        if step:
            yield "step", "peak", "MiB", _peak(_step(layer, x, cotangent), x.device)

    return Subject(stages, error, facts, work)


def _step(layer: Layer, x: Tensor, cotangent: Tensor) -> Stages:
    """Give a forward and a backward to x and, if there is one, to the LoRA."""
    x = x.detach().requires_grad_()
    held: dict[str, Tensor] = {}

    def forward() -> None:
        x.grad = None
        layer.module.zero_grad(set_to_none=True)
        held["y"] = layer.module(x)

    def backward() -> None:
        held.pop("y").backward(cotangent)

    return {"forward": forward, "backward": backward}


def _peak(stages: Stages, device: torch.device) -> float:
    def run(_: None) -> None:
        for stage in stages.values():
            stage()

    return memory_of(lambda: None, {"all": run}, device)["all"].peak / 2**20


def _error(layer: Layer, x: Tensor, cotangent: Tensor, step: bool) -> float:
    """Give the largest relative error of output and gradients on some rows of the whole product.

    No other row has a gradient, so that the gradients of a LoRA are those of the rows, too.
    """
    rows = torch.linspace(0, len(x) - 1, min(len(x), _CHECKED_ROWS), device=x.device).long()
    some = cotangent[rows]
    expected = exact(layer, layer.module, x[rows], some)
    if not step:
        with torch.no_grad():
            return relative_error([layer.module(x)[rows]], expected[:1])
    x = x.detach().requires_grad_()
    y = layer.module(x)
    leaves = [x, *layer.trained(layer.module)]
    sparse = torch.zeros_like(cotangent).index_copy_(0, rows, some)
    d_x, *others = torch.autograd.grad(y, leaves, sparse)
    return relative_error([y[rows], d_x[rows], *others], expected)


COMMAND = Command(
    "kernels",
    __doc__ or "",
    points,
    panels=(
        Panel(("cold",), "time", "linear", "rows"),
        Panel(("graph",), "time", "linear", "rows"),
        Panel(("step",), "ratio", "linear", "rows"),
        Panel(("forward",), "ratio", "grid", "bits"),
        Panel(("backward",), "ratio", "grid", "bits"),
    ),
    aims=tuple(_aims()),
    rounds={"tiny": 2, "quick": 5, "full": 7, "gpu": 50},
)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command; `--bits` is its own, all other options are those of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bits", type=int, nargs="+", choices=FORMATS, default=list(FORMATS))
    own, others = parser.parse_known_args(argv)
    return main(replace(COMMAND, points=partial(points, bits=tuple(own.bits))), others)


if __name__ == "__main__":
    raise SystemExit(run())
