"""The calibration of a model: block after block, each on the inputs that the last one makes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from tqdm import tqdm

from apiq_peft.calibration.activations import Activations
from apiq_peft.calibration.block import Work, calibrate_block
from apiq_peft.calibration.capture import Batch, Call, capture
from apiq_peft.calibration.progress_files import BlockFiles, digest
from apiq_peft.calibration.settings import DTYPES, Calibration
from apiq_peft.calibration.stacks import Stack, find_stacks
from apiq_peft.calibration.student import Grid, Solution, StudentLinear, make_student
from apiq_peft.config import ApiQConfig
from apiq_peft.layer import weight_of
from apiq_peft.packed import PackedLinear

_NUMBERED = re.compile(r"\.\d+\.")  # inside a block


@dataclass(frozen=True)
class LayerReport:
    """What calibration did to one layer, measured on the first batch.

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


@dataclass
class BlockReport:
    """One block: its losses by epoch, how far its output is off, and what it took."""

    block: str
    error_before: float
    error_after: float
    seconds: float
    losses: dict[str, list[float]] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    resumed: bool = False


@dataclass
class Result:
    """The solutions of all layers by name, and the reports of all blocks."""

    solutions: dict[str, Solution]
    reports: list[BlockReport]


def target_names(model: nn.Module, config: ApiQConfig) -> list[str]:
    """Give the modules that `config` targets, as PEFT finds them.

    Raises:
        ValueError: there is none, or one is no linear layer.
    """
    wildcard = config.target_modules == "all-linear"
    config = _maybe_include_all_linear_layers(config, model)
    names = [n for n, _ in model.named_modules() if n and check_target_module_exists(config, n)]
    if wildcard:  # poolers and heads, which only single tokens reach, have no block
        names = [n for n in names if _NUMBERED.search(n)]
    if not names:
        raise ValueError(f"target_modules {config.target_modules!r} match no module of the model")
    for name in names:
        if weight_of(model.get_submodule(name)) is None:
            kind = type(model.get_submodule(name)).__name__
            raise ValueError(f"{name} is a {kind}, which ApiQ cannot quantise; leave it out")
    return names


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    config: ApiQConfig,
    settings: Calibration,
    folder: Path | None = None,
    show_progress: bool = True,
) -> Result:
    """Quantise every targeted layer of `model` in place and find its A and B.

    Afterwards the layers are `PackedLinear`. With `folder`, every finished block is kept there, and
    a second call with the same arguments goes on where the first was interrupted.

    Raises:
        ValueError: a layer cannot be quantised or calibrated; nothing was changed.
        CalibrationError: a loss is not finite; the blocks before are done.
    """
    names = target_names(model, config)
    stacks = find_stacks(model, names)
    grids = {name: _grid(config, name) for name in names}
    for name, grid in grids.items():
        _check_sizes(name, model.get_submodule(name), grid)
    files = BlockFiles(folder, _describe(batches, config, settings)) if folder else None
    was_training, trained = model.training, {p for p in model.parameters() if p.requires_grad}
    model.eval().requires_grad_(False)
    total = sum(len(stack.blocks) for stack in stacks)
    result = Result({}, [])
    try:
        with tqdm(total=total, unit="block", disable=not show_progress) as bar:
            run = _Run(model, batches, grids, settings, files, bar, result)
            given_full: dict[str, Callable[[int], Tensor]] = {}
            given_quantized: dict[str, Callable[[int], Tensor]] = {}
            for stack in stacks:
                full, quantized = run.stack(stack, stacks, given_full, given_quantized)
                given_full[stack.name] = run.getter(full)
                given_quantized[stack.name] = run.getter(quantized)
    finally:
        model.train(was_training)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
    return result


class _Run:
    """One calibration under way."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        grids: Mapping[str, Grid],
        settings: Calibration,
        files: BlockFiles | None,
        bar: Any,
        result: Result,
    ) -> None:
        self.model, self.batches, self.grids = model, batches, grids
        self.settings, self.files, self.bar, self.result = settings, files, bar, result
        self.device = next(model.parameters()).device
        self.cache_dtype = DTYPES[settings.cache_dtype]
        self.cache_dir = Path(settings.cache_dir) if settings.cache_dir else None

    def getter(self, states: Activations) -> Callable[[int], Tensor]:
        """Give a function from the number of a batch to its states."""
        return lambda batch: states.get(batch, self.device, self.cache_dtype)

    def stack(
        self,
        stack: Stack,
        stacks: Sequence[Stack],
        given_full: Mapping[str, Callable[[int], Tensor]],
        given_quantized: Mapping[str, Callable[[int], Tensor]],
    ) -> tuple[Activations, Activations]:
        """Calibrate all blocks of a stack; give its final states in both models."""
        states, full_calls = capture(self.model, stack, self.batches, given_full, stacks)
        quantized_calls = full_calls
        if given_quantized:
            _, quantized_calls = capture(self.model, stack, self.batches, given_quantized, stacks)
        shapes = [s.shape for s in states]
        full, target, quantized = (
            Activations(shapes, self.cache_dtype, self.cache_dir, f"{stack.name}-{name}")
            for name in ("full", "target", "quantized")
        )
        augmented = None
        if self.settings.augment_loss and self.settings.granularity == "block":
            augmented = Activations(
                shapes, self.cache_dtype, self.cache_dir, f"{stack.name}-augmented"
            )
        for number, entered in enumerate(states):
            full.put(number, entered)
            quantized.put(number, entered)
        for index in range(len(stack.blocks)):
            buffers = (full, target, quantized, augmented)
            self._block(stack, index, full_calls[index], quantized_calls[index], *buffers)
            full, target = target, full
        return full, quantized

    def _block(
        self,
        stack: Stack,
        index: int,
        full_calls: Sequence[Call],
        quantized_calls: Sequence[Call],
        full: Activations,
        target: Activations,
        quantized: Activations,
        augmented: Activations | None,
    ) -> None:
        name, block = stack.block_name(index), stack.blocks[index]
        prefix = name + "."
        grids = {n.removeprefix(prefix): g for n, g in self.grids.items() if n.startswith(prefix)}
        weights = {n: weight_of(block.get_submodule(n)) for n in grids}
        started = time.monotonic()
        generator = torch.Generator().manual_seed(
            self.settings.seed * 100_003 + len(self.result.reports)
        )
        dtype = DTYPES[self.settings.compute_dtype]
        student, layers = make_student(block, grids, self.settings.clip_init, generator)
        work = Work(
            name,
            block,
            student,
            layers,
            full,
            quantized,
            full_calls,
            quantized_calls,
            self.settings,
            self.device,
            generator,
        )
        with _in_dtype((block, student), dtype):
            for batch in range(len(full_calls)):
                target.put(batch, work.teach(batch))
                if augmented is not None:
                    augmented.put(batch, work.teach(batch, quantized))
            before = _errors(work, target)
            known: dict[str, Any] = {n: w for n, w in weights.items() if w is not None}
            found = self.files.load(name, known) if self.files else None
            losses: dict[str, list[float]] = {}
            if found is None and grids:
                losses = calibrate_block(work, target, augmented, self._progress(name))
                found = {n: layer.solution() for n, layer in layers.items()}
                if self.files:
                    self.files.save(name, found, known)
            for n, solution in (found or {}).items():
                layers[n].take(solution)
            after = _errors(work, target)
            for batch in range(len(full_calls)):
                quantized.put(batch, work.answer(batch))
        self._install(prefix, block, found or {}, grids)
        self.result.reports.append(
            BlockReport(
                name,
                before[""],
                after[""],
                time.monotonic() - started,
                losses,
                _layer_reports(prefix, grids, found or {}, before, after),
                resumed=bool(found) and not losses,
            )
        )
        self.bar.update()
        self.bar.set_postfix_str(f"error {before['']:.3g} -> {after['']:.3g}")

    def _progress(self, block: str) -> Callable[[str, int, float], None]:
        def show(layer: str, epoch: int, loss: float) -> None:
            place = f"{block}.{layer}" if layer else block
            self.bar.set_postfix_str(
                f"{place} epoch {epoch}/{self.settings.epochs} loss {loss:.4g}"
            )

        return show

    def _install(
        self,
        prefix: str,
        block: nn.Module,
        found: Mapping[str, Solution],
        grids: Mapping[str, Grid],
    ) -> None:
        """Put the packed layers into the block."""
        for n, solution in found.items():
            parent, _, child = n.rpartition(".")
            bias = block.get_submodule(n).bias
            dtype = block.get_submodule(n).weight.dtype
            packed = PackedLinear.from_codes(solution.codes, grids[n].bits, bias, dtype)  # type: ignore[arg-type]
            setattr(block.get_submodule(parent), child, packed.to(self.device))
            self.result.solutions[prefix + n] = solution


@torch.no_grad()
def _errors(work: Work, targets: Activations) -> dict[str, float]:
    """Give the relative error of the student's output on the first batch, and of each layer's."""
    outputs: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
    handles = []
    for name, layer in work.layers.items():
        for full, module in ((True, work.teacher.get_submodule(name)), (False, layer)):

            def note(_: nn.Module, __: Any, y: Tensor, name: str = name, full: bool = full) -> None:
                outputs[full][name] = y.float()

            handles.append(module.register_forward_hook(note))
    try:
        work.teach(0)
        output = work.answer(0).float()
    finally:
        for handle in handles:
            handle.remove()
    wanted = targets.get(0, work.device, torch.float32)
    errors = {"": float((output - wanted).norm() / wanted.norm())}
    for name, y in outputs[False].items():
        reference = outputs[True][name]
        errors[name] = float((y - reference).norm() / reference.norm())
    return errors


def _layer_reports(
    prefix: str,
    grids: Mapping[str, Grid],
    found: Mapping[str, Solution],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> list[LayerReport]:
    return [
        LayerReport(
            prefix + n,
            grids[n].bits,
            grids[n].group_size,
            before[n],
            after[n],
            float(torch.sigmoid(solution.high_clip).mean()),
            float(torch.sigmoid(solution.low_clip).mean()),
        )
        for n, solution in found.items()
    ]


class _in_dtype:  # noqa: N801  # a context manager, used as one
    """Run blocks in a dtype and give them their own tensors back."""

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.blocks, self.dtype = blocks, dtype
        self.held: list[tuple[nn.Parameter, Tensor]] = []

    def __enter__(self) -> None:
        students = {
            id(p)
            for block in self.blocks
            for m in block.modules()
            if isinstance(m, StudentLinear)
            for p in m.parameters()
        }
        for block in self.blocks:
            for parameter in block.parameters():
                if id(parameter) not in students and parameter.dtype != self.dtype:
                    self.held.append((parameter, parameter.data))
                    parameter.data = parameter.data.to(self.dtype)

    def __exit__(self, *exception: object) -> None:
        for parameter, data in reversed(self.held):
            parameter.data = data


def _grid(config: ApiQConfig, name: str) -> Grid:
    bits, group_size = config.grid_of(name)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    scale = alpha / rank**0.5 if config.use_rslora else alpha / rank
    return Grid(bits, group_size, config.scheme, rank, scale)


def _check_sizes(name: str, module: nn.Module, grid: Grid) -> None:
    weight = weight_of(module)
    assert weight is not None
    try:
        PackedLinear(weight.shape[1], weight.shape[0], grid.bits, grid.group_size, device="meta")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _describe(
    batches: Sequence[Batch], config: ApiQConfig, settings: Calibration
) -> dict[str, Any]:
    """Say what a calibration depends on, so that another is not mistaken for it."""
    samples = [digest(batch[name]) for batch in batches for name in sorted(batch)]
    adapter = {k: v for k, v in config.to_dict().items() if k != "base_model_name_or_path"}
    return {
        "adapter": {k: sorted(v) if isinstance(v, set) else v for k, v in adapter.items()},
        "settings": {k: v for k, v in asdict(settings).items() if k != "cache_dir"},
        "samples": samples,
    }
