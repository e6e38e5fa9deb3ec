"""The calibration of a model: block after block, each on the inputs that the last one makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from apiq_peft.calibration.activations import Activations, Cache
from apiq_peft.calibration.block import Training, Work, calibrate_block
from apiq_peft.calibration.capture import Batch, Call, Captured, Given, Masks, capture
from apiq_peft.calibration.finite import CalibrationError, all_finite, first_not_finite, in_layer
from apiq_peft.calibration.precision import in_dtype
from apiq_peft.calibration.processes import Processes
from apiq_peft.calibration.progress_files import BlockFiles, describe, step_batches_of
from apiq_peft.calibration.reports import BlockReport, errors_of, layer_reports, peak_bytes
from apiq_peft.calibration.settings import DTYPES, Calibration
from apiq_peft.calibration.stacks import Stack, find_stacks
from apiq_peft.calibration.student import Grid, Solution, make_student
from apiq_peft.calibration.targets import grids_of, target_names
from apiq_peft.config import ApiQConfig
from apiq_peft.packed import PackedLinear


class BlockStore(Protocol):
    """Where the blocks of a model are while they are not calibrated."""

    device: torch.device

    def begin(self, stacks: Sequence[Stack]) -> None:
        """Give weights to all of the model but the blocks of `stacks`."""

    def fetch(self, block: str) -> None:
        """Give a block its weights, which are frozen."""

    def finish(self, block: str) -> None:
        """Take a block that is packed."""


@dataclass
class Result:
    """What a calibration found.

    `factors` has A and B of all layers by name, and is empty if a store has taken the blocks;
    `final` is the last stack with its final states in the full-precision model; `processes` are
    those that share the batches.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    reports: list[BlockReport]
    final: Given
    processes: Processes


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    config: ApiQConfig,
    settings: Calibration,
    folder: Path | None = None,
    show_progress: bool = True,
    store: BlockStore | None = None,
) -> Result:
    """Quantise every targeted layer of `model` in place and find its A and B.

    Afterwards the layers are `PackedLinear`. With `folder`, every finished block is kept there, and
    a second call with the same arguments goes on where the first was interrupted. With `store` the
    blocks are on the meta device, but for the one that is calibrated.

    Several processes give all the same batches and share them: with P of them a step covers what it
    would in one process with batches P times as large, or that takes P batches a step. Or they
    share the layers, and find what one process finds (`settings.shared`). The first one alone
    writes files. Another number of processes may go on from them.

    Raises:
        ValueError: a layer cannot be quantised or calibrated, or the batches cannot be shared;
            nothing was changed.
        CalibrationError: a loss, a parameter or an activation is not finite; the blocks before are
            done.
        OSError: a file cannot be written; the blocks before are done.
    """
    everyone = Processes.running()
    recorded = everyone.from_first(lambda: step_batches_of(folder)) if folder else None
    processes = everyone if settings.shared == "samples" else Processes()
    processes = processes.stepping(settings.step_batches or recorded)
    own = processes.share(batches)
    names = target_names(model, config)
    stacks = find_stacks(model, names)
    grids = grids_of(model, names, config)
    files = None
    if folder is not None:
        run = describe(batches, config, settings, processes.together)
        files = everyone.from_first(lambda: BlockFiles(folder, run))
    was_training, trained = model.training, {p for p in model.parameters() if p.requires_grad}
    model.eval().requires_grad_(False)
    if store is not None:
        store.begin(stacks)
    try:
        show = show_progress and everyone.rank == 0
        with tqdm(total=_epochs(stacks, grids, settings), unit="epoch", disable=not show) as bar:
            calibration = (model, own, grids, settings, everyone, processes, files, bar, store)
            return _Run(*calibration).all(stacks)
    finally:
        model.train(was_training)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)


def _epochs(stacks: Sequence[Stack], grids: Mapping[str, Grid], settings: Calibration) -> int:
    """Give how far a progress bar goes: one for each block and for each epoch of a training."""
    blocks = sum(len(stack.blocks) for stack in stacks)
    parts = len(grids) if settings.granularity == "layer" else blocks
    return blocks + settings.epochs * parts


@dataclass
class _Buffers:
    """The states of all batches around the block that is calibrated."""

    full: Activations
    target: Activations
    quantized: Activations
    augmented: Activations | None


class _Run:
    """One calibration under way."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        grids: Mapping[str, Grid],
        settings: Calibration,
        everyone: Processes,
        processes: Processes,
        files: BlockFiles | None,
        bar: Any,
        store: BlockStore | None,
    ) -> None:
        self.model, self.batches, self.grids = model, batches, grids
        self.settings, self.files = settings, files
        self.everyone, self.processes = everyone, processes
        self.bar, self.store = bar, store
        self.device = next(model.parameters()).device if store is None else store.device
        self.cache = Cache(Path(settings.cache_dir) if settings.cache_dir else None)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.reports: list[BlockReport] = []

    def all(self, stacks: Sequence[Stack]) -> Result:
        """Calibrate the stacks in the order they run."""
        given_full: list[Given] = []
        given_quantized: list[Given] = []
        for stack in stacks:
            full, quantized = self.stack(stack, given_full, given_quantized)
            given_full.append(full)
            given_quantized.append(quantized)
        return Result(self.factors, self.reports, given_full[-1], self.processes)

    def stack(
        self, stack: Stack, given_full: Sequence[Given], given_quantized: Sequence[Given]
    ) -> tuple[Given, Given]:
        """Calibrate all blocks of a stack; give its final states in both models."""
        self._fetch(stack, 0)
        full, quantized = (self._activations(f"{stack.name}-{n}") for n in ("full", "quantized"))

        def enter(states: Tensor) -> None:
            full.append(states)
            quantized.append(states)

        captured = self._capture(stack, given_full, enter)
        full_calls = quantized_calls = captured.calls
        if given_quantized:
            quantized_calls = self._capture(stack, given_quantized, lambda states: None).calls
        with_augmented = self.settings.augment_loss and self.settings.granularity == "block"
        held = _Buffers(
            full,
            full.like(f"{stack.name}-target"),
            quantized,
            full.like(f"{stack.name}-augmented") if with_augmented else None,
        )
        for index in range(len(stack.blocks)):
            if index:
                self._fetch(stack, index)
            calls = full_calls[index], quantized_calls[index]
            self._block(stack, index, calls, captured.masks, held)
            held.full, held.target = held.target, held.full
        return (
            Given(stack, self._getter(held.full), captured.beside),
            Given(stack, self._getter(held.quantized), captured.beside),
        )

    def _fetch(self, stack: Stack, index: int) -> None:
        if self.store is not None:
            self.store.fetch(stack.block_name(index))

    def _capture(
        self, stack: Stack, given: Sequence[Given], enter: Callable[[Tensor], None]
    ) -> Captured:
        run = (self.model, stack, self.batches, given, self.device, self.cache)
        return capture(*run, enter)

    def _activations(self, name: str) -> Activations:
        return Activations(self.cache, DTYPES[self.settings.cache_dtype], name)

    def _getter(self, states: Activations) -> Callable[[int], Tensor]:
        dtype = DTYPES[self.settings.cache_dtype]
        return lambda batch: states.get(batch, self.device, dtype)

    def _block(
        self,
        stack: Stack,
        index: int,
        calls: tuple[Sequence[Call], Sequence[Call]],
        masks: Sequence[Masks],
        held: _Buffers,
    ) -> None:
        name, block = stack.block_name(index), stack.blocks[index]
        prefix = name + "."
        grids = {n.removeprefix(prefix): g for n, g in self.grids.items() if n.startswith(prefix)}
        started = time.monotonic()
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + len(self.reports))
        student, layers = make_student(block, grids, self.settings.clip_init, generator)
        work = Work(
            name,
            block,
            student,
            layers,
            held.full,
            held.quantized,
            *calls,
            masks,
            self.settings,
            self.device,
            generator,
            self.processes,
            self.everyone if self.settings.shared == "layers" else Processes(),
            self.cache,
        )
        self.bar.set_description_str(name)
        with in_dtype((block, student), DTYPES[self.settings.compute_dtype]):
            teachers = {n: block.get_submodule(n) for n in layers}
            self._keep(work, held.target, work.teach, teachers)
            if held.augmented is not None:
                self._keep(
                    work, held.augmented, partial(work.teach, states=held.quantized), teachers
                )
            before = errors_of(work, held.target)
            found, training, resumed = self._solve(work, held)
            after = errors_of(work, held.target)
            self._keep(work, held.quantized, work.answer, layers)
        for n, solution in found.items():
            self._install(block, n, solution, grids[n].bits)
            if self.store is None:
                self.factors[prefix + n] = solution.lora_A, solution.lora_B
        if self.store is not None:
            self.store.finish(name)
        seconds = time.monotonic() - started
        by_layer = layer_reports(prefix, grids, found, before, after, training.seconds)
        self.reports.append(
            BlockReport(
                name,
                before[""],
                after[""],
                seconds,
                training.losses,
                by_layer,
                resumed,
                peak_bytes(self.device),
            )
        )
        self.bar.update(1)
        self.bar.set_postfix_str(f"error {before['']:.3g} -> {after['']:.3g}")

    def _keep(
        self,
        work: Work,
        kept: Activations,
        run: Callable[[int], Tensor],
        layers: Mapping[str, nn.Module],
    ) -> None:
        """Keep what `run` gives for every batch; `layers` are those that it runs.

        Raises:
            CalibrationError: it is not finite, as it is kept.
        """
        dtype, where = DTYPES[self.settings.cache_dtype], None
        for batch in range(len(self.batches)):
            states = run(batch)
            if where is None and not all_finite([states.to(dtype)]):
                where = f" for batch {batch + 1}{in_layer(first_not_finite(layers, run, [batch]))}"
            kept.put(batch, states)
        if self.everyone.some(where is not None, self.device):
            raise CalibrationError(
                f"{work.name} gives values that are not finite{where or ''}; see whether the"
                f" weights of the model are, and set compute_dtype ({self.settings.compute_dtype})"
                f" and cache_dtype ({self.settings.cache_dtype}) to float32"
            )

    def _solve(self, work: Work, held: _Buffers) -> tuple[dict[str, Solution], Training, bool]:
        """Give the solutions of a block, which its students take, how it went, if it was done."""
        files, layers = self.files, work.layers
        if not layers:
            return {}, Training(), False
        known = {n: layer.weight for n, layer in layers.items()}
        if files is not None:
            found = self.everyone.from_first(lambda: files.load(work.name, known))
            if found is not None:
                for n, solution in found.items():
                    layers[n].take(solution)
                parts = len(layers) if self.settings.granularity == "layer" else 1
                self.bar.update(self.settings.epochs * parts)
                return found, Training(), True
        training = calibrate_block(work, held.target, held.augmented, self._progress)
        solved = {n: layer.solution() for n, layer in layers.items()}
        if files is not None:
            self.everyone.from_first(lambda: files.save(work.name, solved, known))
        return solved, training, False

    def _progress(self, layer: str, epoch: int, loss: float) -> None:
        self.bar.update(1)
        of = f"{layer} " if layer else ""
        self.bar.set_postfix_str(f"{of}epoch {epoch}/{self.settings.epochs} loss {loss:.4g}")

    def _install(self, block: nn.Module, name: str, solution: Solution, bits: int) -> None:
        """Put a packed layer into the block."""
        parent, _, child = name.rpartition(".")
        module: Any = block.get_submodule(name)
        packed = PackedLinear.from_codes(
            solution.codes, bits, module.bias, module.weight.dtype, isinstance(module, Conv1D)
        )
        setattr(block.get_submodule(parent), child, packed.to(self.device))
