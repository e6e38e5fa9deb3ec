"""One module whose output is intervened on: its parameters, and the hook that rotates."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from road_peft.interventions.subspaces import atoms_of, channels_of
from road_peft.routing import Routing
from road_peft.variants import VARIANTS, Coefficients, block_entries
from road_peft.weights import SINGULAR


class Call(Protocol):
    """What one call of the model does to the output of a site."""

    def apply(self, site: Site, output: Tensor) -> Tensor:
        """Give the output to go on with; the same object if nothing changes."""
        ...


class Site(nn.Module):
    """The rotations of one module's output, each subspace with parameters of its own.

    Blocks that several subspaces share are one parameter. A parameter takes part in a batch only if
    a subspace in it does, so an idle one has no gradient: an optimizer does not move it, nor does
    the momentum of former steps, as long as gradients are set to None between steps (the default).
    """

    instances: ClassVar[weakref.WeakSet[Site]] = weakref.WeakSet()

    def __init__(
        self,
        name: str,
        features: int,
        blocks: Mapping[str, Sequence[int]],
        *,
        variant: str = "road_1",
        group_size: int = 2,
        interchange: str = "low",
    ) -> None:
        super().__init__()
        self.name, self.features = name, features
        self.blocks = {subspace: list(numbers) for subspace, numbers in blocks.items()}
        self.variant, self.group_size, self.interchange = variant, group_size, interchange
        self.calls = Routing()  # the model that owns this site puts its own here
        atoms = atoms_of(self.blocks)
        self.owners, self._atoms = list(atoms), list(atoms.values())
        sizes = [VARIANTS[variant].size(2 * len(numbers)) for numbers in self._atoms]
        self.theta = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
        self.alpha = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in sizes])
        self.instances.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # copies and pickles
        super().__setstate__(state)
        self.instances.add(self)

    # ---- values of a subspace -----------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Copy theta and alpha of every subspace, in the order of its blocks.

        Shapes:
            Vectors of as many values for each block as the variant has, those of a pair together.
        """
        return {
            f"{self.name}.{vector}.{subspace}": self._gather(parameters, subspace)
            for subspace in self.blocks
            for vector, parameters in self._vectors()
        }

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what `tensors` gave, here or for another model.

        Raises:
            ValueError: the values are not as many as a subspace has, not finite, or not the same
                where subspaces share blocks.
        """
        for subspace, numbers in self.blocks.items():
            places = {block: i for i, block in enumerate(numbers)}
            size = len(places) * VARIANTS[self.variant].per_pair
            for vector, parameters in self._vectors():
                given = tensors[f"{self.name}.{vector}.{subspace}"]
                if given.shape != (size,) or not torch.isfinite(given).all():
                    raise ValueError(
                        f"{self.name}: {vector} of subspace {subspace!r} has shape"
                        f" {tuple(given.shape)}; it must hold {size} finite values"
                    )
                for part in self._parts(subspace):
                    index = torch.tensor([places[block] for block in self._atoms[part]])
                    parameters[part].copy_(given.view(len(places), -1)[index].flatten())
        for name, held in self.tensors().items():
            if not torch.equal(held, tensors[name].cpu().to(held.dtype)):
                raise ValueError(
                    f"{name} differs from another subspace in the blocks that both have; compose"
                    " disjoint ones"
                )

    def _vectors(self) -> tuple[tuple[str, nn.ParameterList], ...]:
        return ("theta", self.theta), ("alpha", self.alpha)

    def _gather(self, parameters: nn.ParameterList, subspace: str) -> Tensor:
        parts = self._parts(subspace)
        order = torch.tensor([block for part in parts for block in self._atoms[part]]).argsort()
        values = [parameters[i].detach().cpu().view(len(self._atoms[i]), -1) for i in parts]
        return torch.cat(values)[order].flatten()

    def _parts(self, *subspaces: str) -> list[int]:
        wanted = set(subspaces)
        return [i for i, owners in enumerate(self.owners) if wanted & set(owners)]

    # ---- coefficients -------------------------------------------------------------------------

    def coefficients(self, subspaces: Iterable[str], dtype: torch.dtype) -> Coefficients:
        """Give the vectors (first, second) of the rotation by these subspaces, differentiable.

        Shapes:
            Two of (features,), of `dtype`: 1 and 0 outside of the subspaces.
        """
        device = self.theta[0].device
        first = torch.ones(self.features, dtype=dtype, device=device)
        second = torch.zeros_like(first)
        parts = self._parts(*subspaces)
        if not parts:
            return first, second
        found = [self._part(part, dtype) for part in parts]
        channels = self._channels(parts)
        firsts, seconds = (torch.cat(vectors) for vectors in zip(*found, strict=True))
        return first.index_copy(0, channels, firsts), second.index_copy(0, channels, seconds)

    def table(self, choices: Sequence[frozenset[str]], like: Tensor) -> Tensor:
        """Stack the coefficients of several choices of subspaces, for `rotate_by_slot`.

        Shapes:
            Returns (len(choices), 2, features).
        """
        first, second = self.coefficients(frozenset().union(*choices), _compute_dtype(like))
        masks = self._masks(choices)
        one, zero = first.new_ones(()), first.new_zeros(())
        return torch.stack(
            (torch.where(masks, first, one), torch.where(masks, second, zero)), dim=1
        )

    def interchange_tables(
        self, choices: Sequence[frozenset[str]], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stack the coefficients of P and of I - P, where P s + (I - P) b interchanges.

        P = M^-1 E M inside the subspaces and 0 outside; M is the rotation, E keeps the low or the
        high coordinate of each pair, or both.

        Shapes:
            Returns two of (len(choices), 2, features).
        Raises:
            ValueError: a block of the rotation is singular.
        """
        rotation = self.coefficients(frozenset().union(*choices), _compute_dtype(like))
        first, second = self._projection(*rotation)
        masks = self._masks(choices)
        one, zero = first.new_ones(()), first.new_zeros(())
        ours = torch.where(masks, first, zero), torch.where(masks, second, zero)
        rest = torch.where(masks, 1 - first, one), torch.where(masks, -second, zero)
        return torch.stack(ours, 1), torch.stack(rest, 1)

    def _projection(self, first: Tensor, second: Tensor) -> Coefficients:
        if self.interchange == "both":
            return torch.ones_like(first), torch.zeros_like(second)
        a, b, c, d = block_entries(first, second, self.group_size)
        det = a * d + b * c
        squares = a.square() + b.square() + c.square() + d.square()
        if not bool((det.abs() > SINGULAR * squares).all()):
            raise ValueError(
                f"{self.name}: the rotation has a singular block, which has no coordinates to"
                " interchange; train from the identity on, or set interchange='both'"
            )
        low, high = a * d / det, b * c / det
        if self.interchange == "low":  # [[ad, -bd], [-ac, bc]] / det
            pairs = ((low, high), (b * d / det, -a * c / det))
        else:  # the identity less that
            pairs = ((high, low), (-b * d / det, a * c / det))
        return torch.stack(pairs[0], 1).flatten(), torch.stack(pairs[1], 1).flatten()

    def _part(self, part: int, dtype: torch.dtype) -> Coefficients:
        theta, alpha = (vectors[part].to(dtype) for vectors in (self.theta, self.alpha))
        return VARIANTS[self.variant].coefficients(theta, alpha, 2)  # low and high lie together

    def _channels(self, parts: Sequence[int]) -> Tensor:
        channels = [channels_of(self._atoms[part], self.group_size) for part in parts]
        return torch.cat(channels).to(self.theta[0].device)

    def _masks(self, choices: Sequence[frozenset[str]]) -> Tensor:
        masks = torch.zeros(len(choices), self.features, dtype=torch.bool)
        for mask, choice in zip(masks, choices, strict=True):
            for part in self._parts(*choice):
                mask[channels_of(self._atoms[part], self.group_size)] = True
        return masks.to(self.theta[0].device)

    # ---- the hook -----------------------------------------------------------------------------

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the module: do to its output what the call in force says."""
        call: Any = self.calls.current
        if call is None:
            return None
        state = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(state, Tensor) or state.shape[-1] != self.features:
            given = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ValueError(
                f"{self.name} gave {given} instead of states of {self.features} features; choose"
                " another module as component"
            )
        changed = call.apply(self, state)
        if changed is state:
            return None
        if isinstance(output, tuple | list):
            return type(output)((changed, *output[1:]))
        return changed


def _compute_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
