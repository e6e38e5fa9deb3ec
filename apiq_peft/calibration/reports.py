"""What a calibration did: errors and losses, by block and layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apiq_peft.calibration.activations import Activations
from apiq_peft.calibration.block import Work
from apiq_peft.calibration.student import Grid, Solution


@dataclass(frozen=True)
class LayerReport:
    """What calibration did to one layer, measured on the first batch of every process.

    Errors are relative (Frobenius norm): of the layer's output against that of the full-precision
    model, each on its own input; `before` is rounding alone, on the same inputs.
    """

    layer: str
    bits: int
    group_size: int
    error_before: float
    error_after: float
    high_clip: float  # mean share of the range that is kept
    low_clip: float
    seconds: float | None = None  # none where all layers of a block were trained together


@dataclass
class BlockReport:
    """One block: its losses by epoch, how far its output is off, and what it took.

    With several processes losses and errors are of all of them together. `peak_bytes` is the most
    memory that this process had held when the block was done: of tensors on CUDA, resident
    otherwise; none where the system does not say.
    """

    block: str
    error_before: float
    error_after: float
    seconds: float
    losses: dict[str, list[float]] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    resumed: bool = False
    peak_bytes: int | None = None


def peak_bytes(device: torch.device) -> int | None:
    """Give the most memory held so far; see `BlockReport`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # not getrusage: its figure begins with that of the process this one was forked from
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return int(found[1]) * 1024 if found else None


@torch.no_grad()
def errors_of(work: Work, targets: Activations) -> dict[str, float]:
    """Give the relative error of each layer's output, and under "" that of the student's."""
    outputs: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, layer in work.layers.items():
        for full, module in ((True, work.teacher.get_submodule(name)), (False, layer)):

            def note(
                _: nn.Module, args: Any, y: Tensor, name: str = name, full: bool = full
            ) -> None:
                outputs[full][name] = y.float()
                if full:
                    inputs[name] = args[0]

            handles.append(module.register_forward_hook(note))
    try:
        work.teach(0)
        outputs[False][""] = work.answer(0).float()
    finally:
        for handle in handles:
            handle.remove()
    outputs[True][""] = inputs[""] = targets.get(0, work.device, torch.float32)
    squares = []
    for name in outputs[True]:
        real = work.real(0, inputs[name])
        weight = 1 if real is None else real.unsqueeze(-1)
        reference, y = outputs[True][name], outputs[False][name]
        squares.append(((y - reference) * weight).square().sum(dtype=torch.float64))
        squares.append((reference * weight).square().sum(dtype=torch.float64))
    work.processes.add(squares)
    pairs = zip(squares[::2], squares[1::2], strict=True)
    ratios = [float((off / whole.clamp(min=1e-300)).sqrt()) for off, whole in pairs]
    return dict(zip(outputs[True], ratios, strict=True))


def layer_reports(
    prefix: str,
    grids: Mapping[str, Grid],
    found: Mapping[str, Solution],
    before: Mapping[str, float],
    after: Mapping[str, float],
    seconds: Mapping[str, float],
) -> list[LayerReport]:
    """Give the report of every layer of a block, whose name and a dot are `prefix`."""
    return [
        LayerReport(
            prefix + n,
            grids[n].bits,
            grids[n].group_size,
            before[n],
            after[n],
            float(torch.sigmoid(solution.high_clip).mean()),
            float(torch.sigmoid(solution.low_clip).mean()),
            seconds.get(n),
        )
        for n, solution in found.items()
    ]
