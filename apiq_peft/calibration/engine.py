"""The calibration of a model: block after block, each on the inputs that the last one makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from apiq_peft.calibration.activations import Activations
from apiq_peft.calibration.block import Work, calibrate_block
from apiq_peft.calibration.capture import Batch, Call, Given, Masks, capture
from apiq_peft.calibration.precision import in_dtype
from apiq_peft.calibration.processes import Processes
from apiq_peft.calibration.progress_files import BlockFiles, describe, step_batches_of
from apiq_peft.calibration.reports import BlockReport, errors_of, layer_reports
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

    `solutions` has those of all layers by name, and is empty if a store has taken the blocks;
    `final` is the last stack with its final states in the full-precision model; `processes` says
    how the batches were shared.
    """

    solutions: dict[str, Solution]
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
    would in one process with batches P times as large, or that takes P batches a step. The first
    one alone writes files. Another number of processes may go on from them.

    Raises:
        ValueError: a layer cannot be quantised or calibrated, or the batches cannot be shared;
            nothing was changed.
        CalibrationError: a loss is not finite; the blocks before are done.
        OSError: a file cannot be written; the blocks before are done.
    """
    processes = Processes.running()
    recorded = processes.from_first(lambda: step_batches_of(folder)) if folder else None
    processes = processes.stepping(settings.step_batches or recorded)
    own = processes.share(batches)
    names = target_names(model, config)
    stacks = find_stacks(model, names)
    grids = grids_of(model, names, config)
    files = None
    if folder is not None:
        run = describe(batches, config, settings, processes.together)
        files = processes.from_first(lambda: BlockFiles(folder, run))
    was_training, trained = model.training, {p for p in model.parameters() if p.requires_grad}
    model.eval().requires_grad_(False)
    if store is not None:
        store.begin(stacks)
    try:
        show = show_progress and processes.rank == 0
        with tqdm(total=_epochs(stacks, grids, settings), unit="epoch", disable=not show) as bar:
            return _Run(model, own, grids, settings, processes, files, bar, store).all(stacks)
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
        processes: Processes,
        files: BlockFiles | None,
        bar: Any,
        store: BlockStore | None,
    ) -> None:
        self.model, self.batches, self.grids = model, batches, grids
        self.settings, self.processes, self.files = settings, processes, files
        self.bar, self.store = bar, store
        self.device = next(model.parameters()).device if store is None else store.device
        self.solutions: dict[str, Solution] = {}
        self.reports: list[BlockReport] = []

    def all(self, stacks: Sequence[Stack]) -> Result:
        """Calibrate the stacks in the order they run."""
        given_full: list[Given] = []
        given_quantized: list[Given] = []
        for stack in stacks:
            full, quantized = self.stack(stack, given_full, given_quantized)
            given_full.append(full)
            given_quantized.append(quantized)
        return Result(self.solutions, self.reports, given_full[-1], self.processes)

    def stack(
        self, stack: Stack, given_full: Sequence[Given], given_quantized: Sequence[Given]
    ) -> tuple[Given, Given]:
        """Calibrate all blocks of a stack; give its final states in both models."""
        self._fetch(stack, 0)
        captured = capture(self.model, stack, self.batches, given_full, self.device)
        full_calls = quantized_calls = captured.calls
        if given_quantized:
            again = capture(self.model, stack, self.batches, given_quantized, self.device)
            quantized_calls = again.calls
        shapes = [s.shape for s in captured.states]
        with_augmented = self.settings.augment_loss and self.settings.granularity == "block"
        held = _Buffers(
            self._activations(stack, shapes, "full"),
            self._activations(stack, shapes, "target"),
            self._activations(stack, shapes, "quantized"),
            self._activations(stack, shapes, "augmented") if with_augmented else None,
        )
        for number, entered in enumerate(captured.states):
            held.full.put(number, entered)
            held.quantized.put(number, entered)
        captured.states.clear()
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

    def _activations(self, stack: Stack, shapes: Sequence[torch.Size], name: str) -> Activations:
        folder = Path(self.settings.cache_dir) if self.settings.cache_dir else None
        name = f"{stack.name}-{name}-{self.processes.rank}"
        return Activations(shapes, DTYPES[self.settings.cache_dtype], folder, name)

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
        )
        self.bar.set_description_str(name)
        with in_dtype((block, student), DTYPES[self.settings.compute_dtype]):
            for batch in range(len(self.batches)):
                held.target.put(batch, work.teach(batch))
                if held.augmented is not None:
                    held.augmented.put(batch, work.teach(batch, held.quantized))
            before = errors_of(work, held.target)
            found, losses, resumed = self._solve(work, held)
            after = errors_of(work, held.target)
            for batch in range(len(self.batches)):
                held.quantized.put(batch, work.answer(batch))
        for n, solution in found.items():
            self._install(block, n, solution, grids[n].bits)
            if self.store is None:
                self.solutions[prefix + n] = solution
        if self.store is not None:
            self.store.finish(name)
        seconds = time.monotonic() - started
        by_layer = layer_reports(prefix, grids, found, before, after)
        self.reports.append(
            BlockReport(name, before[""], after[""], seconds, losses, by_layer, resumed)
        )
        self.bar.update(1)
        self.bar.set_postfix_str(f"error {before['']:.3g} -> {after['']:.3g}")

    def _solve(
        self, work: Work, held: _Buffers
    ) -> tuple[dict[str, Solution], dict[str, list[float]], bool]:
        """Give the solutions of a block, which its students take, their losses, if it was done."""
        files, layers = self.files, work.layers
        if not layers:
            return {}, {}, False
        known = {n: layer.weight for n, layer in layers.items()}
        if files is not None:
            found = self.processes.from_first(lambda: files.load(work.name, known))
            if found is not None:
                for n, solution in found.items():
                    layers[n].take(solution)
                parts = len(layers) if self.settings.granularity == "layer" else 1
                self.bar.update(self.settings.epochs * parts)
                return found, {}, True
        losses = calibrate_block(work, held.target, held.augmented, self._progress)
        solved = {n: layer.solution() for n, layer in layers.items()}
        if files is not None:
            self.processes.from_first(lambda: files.save(work.name, solved, known))
        return solved, losses, False

    def _progress(self, layer: str, epoch: int, loss: float) -> None:
        self.bar.update(1)
        of = f"{layer} " if layer else ""
        self.bar.set_postfix_str(f"{of}epoch {epoch}/{self.settings.epochs} loss {loss:.4g}")

    def _install(self, block: nn.Module, name: str, solution: Solution, bits: int) -> None:
        """Put a packed layer into the block."""
        parent, _, child = name.rpartition(".")
        module: Any = block.get_submodule(name)
        packed = PackedLinear.from_codes(solution.codes, bits, module.bias, module.weight.dtype)
        setattr(block.get_submodule(parent), child, packed.to(self.device))
