"""What is compared: a row for each way to quantise a model and to start its LoRA."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from apiq_peft import ApiQConfig, Calibration, preset, quantize
from apiq_peft.calibration.stacks import find_stacks
from apiq_peft.calibration.targets import target_names
from apiq_peft.quantizer import Codes
from benchmarks import _quantizer_peers as peers
from benchmarks._quantizer_peers import Found
from benchmarks._quantizer_walk import assemble, walk, weights_of
from kernels_peft.packing import FORMATS

FULL_PRECISION, FULL_BITS = "full precision", 16  # counted as it is stored
LOFTQ, BLOCKWISE, BEST = "loftq", "apiq-bw", "best"


def targets(model: Any, blocks: int | None = None) -> list[str]:
    """Give the names of the layers to quantise: the linear ones of all or the first blocks."""
    names = target_names(model, ApiQConfig())
    if blocks is None:
        return names
    inside = tuple(
        f"{stack.block_name(index)}."
        for stack in find_stacks(model, names)
        for index in range(blocks)
    )
    return [name for name in names if name.startswith(inside)]


@dataclass(frozen=True)
class Task:
    """A full-precision model, which may be changed, and what its layers `names` are to become.

    Shapes:
        samples: (samples, length), token ids for methods that look at data.
    """

    model: Any
    names: list[str]
    samples: Tensor
    bits: int
    group_size: int
    rank: int
    settings: Calibration | None = None

    @property
    def config(self) -> ApiQConfig:
        """A LoRA that is added with a factor of 1, beside a grid of this width."""
        return ApiQConfig(
            bits=self.bits,
            group_size=self.group_size,
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=list(self.names),
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.bits, self.group_size


@dataclass(frozen=True)
class Made:
    """A model with a LoRA on those layers. `bits` per weight, where layers are not packed."""

    model: PeftModel
    bits: float | None = None


@dataclass(frozen=True)
class Method:
    """A way to quantise.

    `adapter` says whether the LoRA is a part of what the method makes; other methods get one that
    adds nothing yet, for the finetuning. `needs` is a package that has to be installed. `preset`
    names the settings of methods that calibrate, `changes` what differs from them.
    """

    make: Callable[[Task], Made]
    adapter: bool = False
    widths: tuple[int, ...] = tuple(FORMATS)
    needs: str = ""
    preset: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, epochs: int | None) -> Calibration | None:
        """Give the settings of a calibration; `epochs` replaces the preset's unless it is 0."""
        if not self.preset:
            return None
        found = preset(self.preset, **self.changes)
        return replace(found, epochs=epochs) if epochs and found.epochs else found


def _full(task: Task) -> Made:
    return Made(_plain_lora(task), FULL_BITS)


def _plain_lora(task: Task) -> PeftModel:
    config = LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=list(task.names))
    return get_peft_model(task.model, config)


@torch.no_grad()
def _by_weight(solve: Callable[[Tensor, Task], Found], task: Task) -> Made:
    """Solve every layer by its weight alone."""
    weights = weights_of(task.model, task.names)
    found = {name: solve(weight, task) for name, weight in weights.items()}
    return Made(assemble(task.model, found, task.config))


@torch.no_grad()
def _hqq(task: Task) -> Made:
    for weight in weights_of(task.model, task.names).values():
        weight.copy_(peers.hqq(weight, *task.grid))
    return Made(_plain_lora(task), peers.hqq_bits(*task.grid))


def _by_inputs(round_group: Callable[..., dict[str, Codes]], corrected: bool, task: Task) -> Made:
    """Solve layers on the inputs that those before them make, with a closed form or without."""

    def solve(
        weights: dict[str, Tensor], full: list[Tensor], quantized: list[Tensor]
    ) -> Mapping[str, Found]:
        codes = round_group(weights, quantized, task)
        if corrected:
            return peers.closed_form(weights, codes, full, quantized, task.rank)
        return {name: Found(found) for name, found in codes.items()}

    found = walk(task.model, task.samples, task.names, solve)
    return Made(assemble(task.model, found, task.config))


def _gptq(weights: dict[str, Tensor], inputs: list[Tensor], task: Task) -> dict[str, Codes]:
    flat = [z.flatten(0, -2).float() for z in inputs]
    second = sum((z.t() @ z for z in flat[1:]), flat[0].t() @ flat[0])
    return {name: peers.gptq(weight, second, *task.grid) for name, weight in weights.items()}


def _gptqmodel(weights: dict[str, Tensor], inputs: list[Tensor], task: Task) -> dict[str, Codes]:
    return {name: peers.gptqmodel(weight, inputs, *task.grid) for name, weight in weights.items()}


def _calibrated(task: Task) -> Made:
    return Made(
        quantize(
            task.model,
            task.samples,
            task.config,
            task.settings,
            show_progress=sys.stderr.isatty(),
        )[0]
    )


_rtn = partial(_by_weight, lambda weight, task: Found(peers.rtn(weight, *task.grid)))
_loftq = partial(
    _by_weight, lambda weight, task: peers.loftq(weight, task.bits, task.group_size, task.rank)
)

METHODS: dict[str, Method] = {
    FULL_PRECISION: Method(_full, widths=(FULL_BITS,)),
    "rtn": Method(_rtn),
    "hqq": Method(_hqq, needs="hqq"),
    "gptq": Method(partial(_by_inputs, _gptq, False)),
    "gptqmodel": Method(partial(_by_inputs, _gptqmodel, False), needs="gptqmodel"),
    # OmniQuant's part of it: the clipping is trained, and the LoRA stays at nothing
    "clip only": Method(_calibrated, preset="apiq-bw", changes={"lora_lr": 0.0}),
    LOFTQ: Method(_loftq, adapter=True),
    "rtn + closed form": Method(
        _calibrated, adapter=True, preset="fast", changes={"clip_init": peers.WHOLE_RANGE}
    ),
    "gptq + closed form": Method(partial(_by_inputs, _gptq, True), adapter=True),
    **{
        name: Method(_calibrated, adapter=True, preset=name)
        for name in ("fast", "apiq-lw", BLOCKWISE, BEST)
    },
}
