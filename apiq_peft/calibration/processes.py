"""Several processes that calibrate one model: the only place where they talk to each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among `count`, of which each has the whole model and its share of the batches.

    A step of a training takes `each` batches on every process. With one process and one batch a
    step every method gives back what it was given.
    """

    rank: int = 0
    count: int = 1
    each: int = 1

    @classmethod
    def running(cls) -> Processes:
        """Join those that `accelerate launch` or `torchrun` started; a plain program is alone."""
        started = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if started and not (dist.is_available() and dist.is_initialized()):
            PartialState()
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def together(self) -> int:
        """Batches of a step, over all processes."""
        return self.each * self.count

    def stepping(self, batches: int | None) -> Processes:
        """Give the same processes with so many batches of a step together, by default one each.

        Raises:
            ValueError: the processes cannot share them evenly.
        """
        each, left = divmod(batches or self.count, self.count)
        if left:
            raise ValueError(
                f"the {batches} batches of a step cannot be shared evenly by {self.count}"
                " processes; start a number of processes that divides them"
            )
        return replace(self, each=each)

    def share(self, items: Sequence[T]) -> list[T]:
        """Give the items of this process: of every `count` in a row, one.

        Raises:
            ValueError: some process would get one less, and the others would wait for it; or some
                step would be smaller.
        """
        if len(items) % self.together:
            by = f"in steps of {self.together} " if self.each > 1 else ""
            raise ValueError(
                f"{len(items)} batches cannot be shared evenly {by}by {self.count} processes; give"
                " a multiple, by other samples or another batch_size"
            )
        return list(items[self.rank :: self.count])

    def steps(self, items: int) -> list[list[int]]:
        """Give the numbers of this process's batches, of which it has so many, step by step."""
        return torch.arange(items).view(-1, self.each).tolist()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Put the sums over all processes into tensors of one dtype, by one exchange."""
        if self.count == 1:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the means over all processes into tensors of one dtype."""
        self.add(tensors)
        if self.count > 1:
            for tensor in tensors:
                tensor.detach().div_(self.count)

    def some(self, found: bool, device: torch.device) -> bool:
        """Tell all processes whether `found` is true on one of them."""
        count = torch.tensor([float(found)], device=device)
        self.add([count])
        return bool(count > 0)

    def copy_from(self, rank: int, tensors: Sequence[Tensor]) -> None:
        """Put the values of one process into the tensors of all."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), rank)

    def gather(self, item: T) -> list[T]:
        """Give what every process gave, in their order, to all of them."""
        if self.count == 1:
            return [item]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, item)
        return found

    def relative(self, amounts: Sequence[float], device: torch.device) -> list[float]:
        """Give the tokens of every batch relative to the mean of those of the same step.

        The mean over a step's batches of their mean loss times this is the mean over all tokens.
        """
        if self.together == 1:
            return [1.0] * len(amounts)
        own = torch.tensor(amounts, dtype=torch.float64, device=device)
        mean = own.view(-1, self.each).mean(1, keepdim=True)
        self.average([mean])
        return (own.view(-1, self.each) / mean.clamp(min=1e-30)).flatten().tolist()

    def from_first(self, action: Callable[[], T]) -> T:
        """Run `action` on the first process alone, and give its result to all.

        Raises:
            RuntimeError: on the others, if it failed on the first.
        """
        if self.count == 1:
            return action()
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = action()
            except Exception as error:
                dist.broadcast_object_list([None, str(error)], 0)
                raise
        dist.broadcast_object_list(said, 0)
        if said[1] is not None:
            raise RuntimeError(f"the first process failed: {said[1]}")
        return said[0]
