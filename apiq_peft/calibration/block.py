"""Calibrating one block: by its output, layer by layer, or in closed form."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq_peft.calibration.activations import Activations, Cache
from apiq_peft.calibration.capture import Call, Masks
from apiq_peft.calibration.closed_form import Moments
from apiq_peft.calibration.finite import CalibrationError, all_finite
from apiq_peft.calibration.fitting import fit
from apiq_peft.calibration.processes import Processes
from apiq_peft.calibration.settings import DTYPES, Calibration
from apiq_peft.calibration.stacks import groups_of
from apiq_peft.calibration.student import StudentLinear


@dataclass
class Work:
    """One block and all that is known about its inputs.

    `full` and `quantized` are the states that enter it in the full-precision and the quantised
    model; `teacher` is the block itself, `student` its copy, `layers` the students' layers. All is
    of the batches of this process, one of `processes` that share them; `spread` are those that
    share the layers of one input.
    """

    name: str
    teacher: nn.Module
    student: nn.Module
    layers: dict[str, StudentLinear]
    full: Activations
    quantized: Activations
    full_calls: Sequence[Call]
    quantized_calls: Sequence[Call]
    masks: Sequence[Masks]
    settings: Calibration
    device: torch.device
    generator: torch.Generator
    processes: Processes
    spread: Processes
    cache: Cache

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the block's arithmetic."""
        return DTYPES[self.settings.compute_dtype]

    def teach(self, batch: int, states: Activations | None = None) -> Tensor:
        """Give the output of the full-precision block, on its own input or on other states."""
        own = states is None or states is self.full
        calls = self.full_calls if own else self.quantized_calls
        held = self.full if states is None else states
        with torch.no_grad():
            return calls[batch].run(self.teacher, held.get(batch, self.device, self.dtype))

    def learn(self, batch: int) -> Tensor:
        """Give the output of the student on the quantised input."""
        states = self.quantized.get(batch, self.device, self.dtype)
        return self.quantized_calls[batch].run(self.student, states)

    @torch.no_grad()
    def answer(self, batch: int) -> Tensor:
        """Give the same without gradients."""
        return self.learn(batch)

    def real(self, batch: int, x: Tensor) -> Tensor | None:
        """Give 1 for the rows of `x` (..., K) that are of real tokens, 0 for padding.

        None if all rows are real, or if they are no tokens. `x` is an input or output of the
        full-precision block or of one of its layers.
        """
        own, encoder = self.masks[batch]
        mask = own
        if encoder is not None or own is not None:
            call = self.full_calls[batch]
            given = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)]
            if any(v.shape == x.shape and torch.equal(v.to(x), x) for v in given):
                mask = encoder  # what cross-attention looks at
        if mask is None or mask.numel() != x.shape[:-1].numel():
            return None
        return (mask != 0).view(x.shape[:-1]).to(self.device, torch.float32)


@dataclass
class Training:
    """How the calibration of a block went: losses by what was trained, one for each epoch.

    `seconds` has the time of every layer where each is worked on by itself: its own training, and
    an even share of what was done for the layers of one input together.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class _SeenError(Exception):
    """Raised to leave a block once the input of a layer was seen."""


def calibrate_block(
    work: Work,
    targets: Activations,
    augmented: Activations | None,
    progress: Callable[[str, int, float], None],
) -> Training:
    """Find clipping, A and B of every layer of a block.

    `targets` holds the output of the full-precision block for every batch; `augmented`, if there is
    that term in the loss, its output on the quantised input.

    Raises:
        CalibrationError: what was found is not finite.
    """
    groups = groups_of(work.student, dict(work.layers), lambda: work.answer(0))
    done = Training()
    if work.settings.granularity == "layer":
        done.seconds = dict.fromkeys(work.layers, 0.0)
    if work.settings.closed_form == "start":
        _solve_groups(work, groups, done)
    if work.settings.epochs and work.settings.granularity == "block":
        loss_of, amounts = _block_loss(work, targets, augmented)
        done.losses["block"] = fit(
            work.name,
            work.layers,
            loss_of,
            work.processes.relative(amounts, work.device),
            work.settings,
            work.generator,
            lambda epoch, loss: progress("", epoch, loss),
            work.processes,
        )
    elif work.settings.epochs:
        for group in groups:
            _fit_group(work, group, done, progress)
    for layer in work.layers.values():
        layer.settle()
    if work.settings.closed_form == "refit":
        _solve_groups(work, groups, done)
    for name, layer in work.layers.items():
        assert layer.codes is not None
        if not all_finite((*layer.trained(), layer.codes.scales)):
            raise CalibrationError(
                f"{work.name}: what was found for layer {name} is not finite; see whether the"
                " weights of the model are, and set compute_dtype and cache_dtype to float32"
            )
    return done


def _block_loss(
    work: Work, targets: Activations, augmented: Activations | None
) -> tuple[Callable[[int], Tensor], list[float]]:
    """Give the loss of a batch, and how many tokens each batch has."""
    reals = [
        work.real(batch, targets.get(batch, work.device, torch.float32))
        for batch in range(len(targets))
    ]

    def loss_of(batch: int) -> Tensor:
        output, real = work.learn(batch).float(), reals[batch]
        wanted = targets.get(batch, work.device, torch.float32)
        loss = _distance(output, wanted, real, work.settings.loss)
        if augmented is not None:
            other = augmented.get(batch, work.device, torch.float32)
            loss = loss + _distance(output, other, real, work.settings.loss)
        return loss

    rows = [targets.shape(batch)[:-1].numel() for batch in range(len(targets))]
    return loss_of, _tokens(reals, rows)


def _distance(y: Tensor, wanted: Tensor, real: Tensor | None, loss: str) -> Tensor:
    """Give the mean squared difference over the features of real tokens."""
    squares = (y - wanted).square().mean(-1)
    if loss == "relative":
        squares = squares / wanted.square().mean(-1).clamp(min=1e-12)
    if real is None:
        return squares.mean()
    return (squares * real).sum() / real.sum().clamp(min=1)


def _tokens(reals: Sequence[Tensor | None], rows: Sequence[int]) -> list[float]:
    return [float(n if real is None else real.sum()) for real, n in zip(reals, rows, strict=True)]


def _fit_group(
    work: Work,
    group: list[str],
    done: Training,
    progress: Callable[[str, int, float], None],
) -> None:
    """Train the layers of one input one after the other, then round them for good."""
    orders = {name: _generator(work.generator) for name in group}
    _spread(work, group, done, progress, lambda own: _fit_own(work, own, orders, done, progress))
    for name in group:
        work.layers[name].settle()


def _generator(parent: torch.Generator) -> torch.Generator:
    seed = torch.randint(2**62, (), generator=parent)
    return torch.Generator().manual_seed(int(seed))


def _spread(
    work: Work,
    group: list[str],
    done: Training,
    progress: Callable[[str, int, float], None],
    solve: Callable[[list[str]], dict[str, list[float]]],
) -> None:
    """Let every process solve some layers of one input; then all have all of them.

    `solve` gives the losses of the layers whose names it is given.

    Raises:
        CalibrationError: on all processes, if one of them failed.
    """
    own, alone = group[work.spread.rank :: work.spread.count], work.spread.count == 1
    losses, failure = dict[str, list[float]](), None
    try:
        losses = solve(own) if own else {}
    except CalibrationError as error:
        if alone:
            raise
        failure = str(error)
    seconds = {name: done.seconds[name] for name in own if name in done.seconds}
    for failed, of, took in work.spread.gather((failure, losses, seconds)):
        if failed is not None:
            raise CalibrationError(failed)
        losses |= of
        done.seconds |= took
    for number, name in enumerate(group):
        work.spread.copy_from(number % work.spread.count, work.layers[name].trained())
        if name in losses:
            done.losses[name] = losses[name]
        for epoch, loss in enumerate(losses.get(name, ()) if name not in own else ()):
            progress(name, epoch + 1, loss)


def _fit_own(
    work: Work,
    group: list[str],
    orders: dict[str, torch.Generator],
    done: Training,
    progress: Callable[[str, int, float], None],
) -> dict[str, list[float]]:
    """Train some layers of one input; give their losses."""
    started = time.monotonic()
    losses = {}
    full, quantized = Activations(work.cache, name="x"), Activations(work.cache, name="z")
    reals = []
    for batch in range(len(work.full_calls)):
        x, z = _inputs_of(work, group[0], batch)
        full.append(x)
        quantized.append(z)
        reals.append(work.real(batch, x))
    rows = [full.shape(batch)[:-1].numel() for batch in range(len(full))]
    weights = work.processes.relative(_tokens(reals, rows), work.device)
    _share_time(done, group, started)
    for name in group:
        started = time.monotonic()
        layer = work.layers[name]

        def loss_of(batch: int, layer: StudentLinear = layer) -> Tensor:
            x = full.get(batch, work.device, torch.float32)
            y = _without_bias(layer, quantized.get(batch, work.device, torch.float32))
            wanted = F.linear(x, layer.weight.float())
            return _distance(y, wanted, reals[batch], work.settings.loss)

        losses[name] = fit(
            f"{work.name}.{name}",
            {name: layer},
            loss_of,
            weights,
            work.settings,
            orders[name],
            lambda epoch, loss, name=name: progress(name, epoch, loss),  # type: ignore[misc]
            work.processes,
        )
        _share_time(done, [name], started)
    return losses


def _share_time(done: Training, group: list[str], started: float) -> None:
    for name in group:
        if name in done.seconds:
            done.seconds[name] += (time.monotonic() - started) / len(group)


def _without_bias(layer: StudentLinear, z: Tensor) -> Tensor:
    y = F.linear(z, layer.rounded())
    return y + layer.grid.scale * F.linear(F.linear(z, layer.lora_A), layer.lora_B)


@torch.no_grad()
def _solve_groups(work: Work, groups: list[list[str]], done: Training) -> None:
    """Solve A and B of every layer in closed form, on the inputs that those before make.

    Raises:
        CalibrationError: the inputs of a layer are not finite, or what it gives for them.
    """
    with _rounded_once(work.layers.values()):
        for group in groups:
            _spread(work, group, done, lambda *_: None, lambda own: _solve_own(work, own, done))


def _solve_own(work: Work, group: list[str], done: Training) -> dict[str, list[float]]:
    """Solve some layers of one input, which has no losses."""
    started = time.monotonic()
    layers = {name: work.layers[name] for name in group}
    first = layers[group[0]]
    sizes = {name: layer.weight.shape[0] for name, layer in layers.items()}
    moments = Moments(first.weight.shape[1], sizes, work.device)
    for batch in range(len(work.full_calls)):
        x, z = _inputs_of(work, group[0], batch)
        real = work.real(batch, x)
        x, z = x.float(), z.float()
        errors = {
            name: F.linear(x, layer.weight.float()) - F.linear(z, layer.rounded())
            for name, layer in layers.items()
        }
        moments.add(z, errors, real)
    moments.join(work.processes)
    broken = moments.not_finite()
    if broken is not None:
        raise CalibrationError(
            f"{work.name}: the activations of layer {broken} are not finite, so it cannot"
            f" be solved in closed form; set compute_dtype ({work.settings.compute_dtype})"
            " to float32 if they are too large for a narrower one"
        )
    ranks = {name: layer.grid.rank for name, layer in layers.items()}
    for name, (a, b) in moments.solve(ranks).items():
        layer = layers[name]
        layer.lora_A.zero_()[: len(a)] = a  # fewer rows than asked for in a narrow layer
        layer.lora_B.zero_()[:, : len(a)] = b / layer.grid.scale
        work.processes.copy_from(0, (layer.lora_A, layer.lora_B))
    _share_time(done, group, started)
    return {}


@contextmanager
def _rounded_once(layers: Iterable[StudentLinear]) -> Iterator[None]:
    """Keep the rounded weights of layers whose clipping does not change meanwhile."""
    open_ones = [layer for layer in layers if layer.settled is None]
    try:
        for layer in open_ones:
            layer.settled = layer.rounded()
        yield
    finally:
        for layer in open_ones:
            layer.settled = None


def _inputs_of(work: Work, name: str, batch: int) -> tuple[Tensor, Tensor]:
    """Give what enters a layer in the full-precision block and in the student."""
    with torch.no_grad():
        with _seen(work.teacher.get_submodule(name)) as full:
            work.teach(batch)
        with _seen(work.layers[name]) as quantized:
            work.learn(batch)
    return full[0], quantized[0]


@contextmanager
def _seen(module: nn.Module) -> Iterator[list[Any]]:
    """Note the input of `module`, and leave the block there."""
    inputs: list[Any] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        raise _SeenError

    handle = module.register_forward_pre_hook(hook)
    try:
        yield inputs
    except _SeenError:
        pass
    finally:
        handle.remove()
