"""From the subspaces of a configuration to blocks and channels of a module's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from road_peft.interventions.config import RoadInterventionConfig, Subspace


def blocks_of(config: RoadInterventionConfig, features: int, where: str) -> dict[str, list[int]]:
    """Give the numbers of the blocks of every subspace, for an output of `features`.

    Raises:
        ValueError: an end between two groups, a block that there is not, or a block in two
            subspaces that the configuration does not allow; the message begins with `where`.
    """
    if features % config.group_size:
        raise ValueError(
            f"{where} gives {features} features, which are no whole groups of"
            f" {config.group_size}; choose another group_size"
        )
    try:
        found = {
            name: _blocks(name, value, features, config.group_size)
            for name, value in config.subspaces.items()
        }
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    owners: dict[int, str] = {}
    for name, blocks in found.items():
        for block in blocks:
            other = owners.setdefault(block, name)
            if other != name and not config.allow_overlap:
                raise ValueError(
                    f"{where}: subspaces {other!r} and {name!r} share block {block}; separate them,"
                    " or set allow_overlap=True to train what they share as one"
                )
    return found


def _blocks(name: str, value: Subspace, features: int, group_size: int) -> list[int]:
    if isinstance(value, list):
        if value[-1] >= features // 2:
            raise ValueError(
                f"subspace {name!r} has block {value[-1]}, but {features} features make"
                f" {features // 2} blocks, from 0 on"
            )
        return value
    ends = [share * features / group_size for share in value]
    groups = [round(end) for end in ends]
    if any(
        abs(end - group) > 1e-6 * max(1, group) for end, group in zip(ends, groups, strict=True)
    ):
        raise ValueError(
            f"subspace {name!r} is {value}, which cuts a group: its ends are at groups"
            f" {ends[0]:g} and {ends[1]:g} of {features // group_size} (group_size {group_size})."
            " Choose ends between groups, or a list of blocks"
        )
    half = group_size // 2
    return list(range(groups[0] * half, groups[1] * half))


def atoms_of(blocks: Mapping[str, Sequence[int]]) -> dict[tuple[str, ...], list[int]]:
    """Split the blocks into the parts that belong to the same subspaces: who shares what.

    Without overlap these are the subspaces themselves. Each part has parameters of its own, so that
    an optimizer leaves alone the parts that a batch does not use: they have no gradient.
    """
    owners: dict[int, tuple[str, ...]] = {}
    for name, numbers in blocks.items():
        for block in numbers:
            owners[block] = (*owners.get(block, ()), name)
    atoms: dict[tuple[str, ...], list[int]] = {}
    for block in sorted(owners):
        atoms.setdefault(owners[block], []).append(block)
    return atoms


def channels_of(blocks: Sequence[int], group_size: int) -> Tensor:
    """Give the features of the blocks, low and high of each in turn.

    Shapes:
        Returns (2 * len(blocks),), integer.
    """
    half = group_size // 2
    numbers = torch.tensor(blocks, dtype=torch.int64)
    low = numbers // half * group_size + numbers % half
    return torch.stack((low, low + half), 1).flatten()
