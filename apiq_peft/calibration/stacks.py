"""Where the blocks of a model are, and which of their layers see the same input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Stack:
    """A list of blocks that run one after the other, by its name in the model."""

    name: str
    blocks: nn.ModuleList

    def block_name(self, index: int) -> str:
        """Give the name of a block in the model."""
        return f"{self.name}.{index}"


def find_stacks(model: nn.Module, targets: list[str]) -> list[Stack]:
    """Give the outermost lists of blocks that hold `targets`, in the order they run.

    An encoder runs before its decoder, which is also the order of registration in transformers.

    Raises:
        ValueError: a target lies outside of every list of blocks, or in experts.
    """
    stacks: list[Stack] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(stack.name + ".") for stack in stacks)
        holds = any(target.startswith(name + ".") for target in targets)
        if isinstance(module, nn.ModuleList) and holds and not inside:
            stacks.append(Stack(name, module))
    for target in targets:
        stack = next((s for s in stacks if target.startswith(s.name + ".")), None)
        if stack is None:
            raise ValueError(
                f"{target} lies outside of the blocks of the model, so it has no block to be"
                " calibrated in; leave it out of target_modules"
            )
        if ".experts." in target:
            raise ValueError(
                f"{target} is an expert: it sees only the tokens that a router sends it, which"
                " calibration samples cover too thinly; leave experts out of target_modules"
            )
    return stacks


def groups_of(
    block: nn.Module, targets: dict[str, nn.Module], run: Callable[[], Any]
) -> list[list[str]]:
    """Give the targets of a block in the order of the data: lists of those with one input.

    `run` runs the block once. For a Llama block: q, k, v; then o; then gate, up; then down.

    Raises:
        ValueError: a target does not run, or runs twice.
    """
    order: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(name in names for _, names in order):
                raise ValueError(f"{name} runs twice in its block, which cannot be calibrated")
            if order and order[-1][0] is args[0]:
                order[-1][1].append(name)
            else:
                order.append((args[0], [name]))

        return hook

    handles = [m.register_forward_pre_hook(note(name)) for name, m in targets.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found = [names for _, names in order]
    missing = sorted(set(targets) - {name for names in found for name in names})
    if missing:
        raise ValueError(
            f"{', '.join(missing[:3])} did not run in the block; leave it out of target_modules"
        )
    return found
