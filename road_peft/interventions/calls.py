"""What one call of a model does at every site: which tokens, which subspaces, whose activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels_peft import rotate_by_slot
from road_peft.interventions.inputs import Inputs, length_of_cache, shape_of
from road_peft.interventions.positions import Positions, select
from road_peft.interventions.site import Site
from road_peft.routing import Routing


class Rows:
    """The subspaces of every row of a batch; each different choice of them is a slot."""

    def __init__(self, names: Sequence[Sequence[str]]) -> None:
        chosen = [frozenset(row) for row in names]
        self.choices = [choice for choice in dict.fromkeys(chosen) if choice]
        places = {choice: slot for slot, choice in enumerate(self.choices)}
        self.slots = torch.tensor([places.get(choice, -1) for choice in chosen])
        self._tables: dict[Site, Tensor] = {}

    def __len__(self) -> int:
        return len(self.slots)

    def table(self, site: Site, like: Tensor) -> Tensor:
        """Give the coefficients of all slots at a site; kept, unless gradients are wanted."""
        if torch.is_grad_enabled():
            return site.table(self.choices, like)
        if site not in self._tables:
            self._tables[site] = site.table(self.choices, like)
        return self._tables[site]

    def group_sizes(self, site: Site, like: Tensor) -> Tensor:
        """Give the group size of every slot."""
        return torch.full((len(self.choices),), site.group_size, device=like.device)


@dataclass(frozen=True)
class Source:
    """Activations of another input, by the name of the site.

    `order[r, t]` is the number, in them, of what goes to token t of row r.
    """

    states: Mapping[str, Tensor]
    order: Tensor


class Intervention:
    """A call that rotates the chosen tokens, or interchanges them with those of a source.

    Tokens that are not chosen, and rows without subspaces, come back bit for bit.
    """

    def __init__(self, rows: Rows, chosen: Tensor, source: Source | None = None) -> None:
        slots = rows.slots.repeat_interleave(len(chosen) // len(rows))[:, None]
        self.rows, self.source = rows, source
        self.slots = torch.where(chosen.cpu(), slots, -1)
        self.idle = not bool((self.slots >= 0).any())

    def apply(self, site: Site, output: Tensor) -> Tensor:
        """Give the output to go on with; the same object if nothing changes."""
        if self.idle:
            return output
        slots = _as_rows_of(site, output, self.slots).to(output.device)
        if self.source is None:
            sizes = self.rows.group_sizes(site, output)
            return rotate_by_slot(output, self.rows.table(site, output), sizes, slots)
        return self._interchange(site, output, slots, self.source)

    def _interchange(self, site: Site, output: Tensor, slots: Tensor, source: Source) -> Tensor:
        chosen = slots >= 0
        order = _as_rows_of(site, output, source.order).to(output.device)[chosen]
        wide = torch.promote_types(output.dtype, torch.float32)
        base = output[chosen].to(wide)
        given = source.states[site.name].to(output.device, wide)[order]
        sizes = self.rows.group_sizes(site, output)
        ours, rest = site.interchange_tables(self.rows.choices, output)
        mixed = rotate_by_slot(given, ours, sizes, slots[chosen])
        mixed = mixed + rotate_by_slot(base, rest, sizes, slots[chosen])
        return output.index_put((chosen,), mixed.to(output.dtype))


class Collection:
    """A call that changes nothing and keeps the states of the chosen tokens of every site."""

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen
        self.states: dict[str, Tensor] = {}

    def apply(self, site: Site, output: Tensor) -> Tensor:
        """Keep what is chosen."""
        chosen = _as_rows_of(site, output, self.chosen).to(output.device)
        self.states[site.name] = output[chosen].detach()
        return output


class Generation:
    """The calls of one generation: each finds the place of its tokens by the length of the cache.

    So a prompt may be computed in one call, in chunks, or again in every step if there is no cache;
    `generate` may repeat the rows, for beams or more sequences.
    """

    def __init__(
        self,
        rows: Rows,
        prompt: Tensor,
        positions: Positions,
        prefill_only: bool,
        source: Source | None,
    ) -> None:
        """`prompt` is the attention mask of the prompts, on the host."""
        self.rows, self.positions, self.prefill_only = rows, positions, prefill_only
        self.mask, self.source = prompt, source
        self.chosen = select(positions, prompt)
        self._call = Intervention(rows, self.chosen[:, :0])

    def begin(self, args: tuple[Any, ...], inputs: Inputs) -> None:
        """Find out which tokens the model computes when it is called like this."""
        (count, length), past = shape_of(inputs, args), length_of_cache(inputs)
        copies, rest = divmod(count, len(self.rows))
        if rest:
            raise ValueError(f"{count} rows cannot come of {len(self.rows)} prompts")
        columns = slice(past, past + length)
        chosen = self._chosen_until(past + length)[:, columns].repeat_interleave(copies, 0)
        source = self.source
        if source is not None:  # tokens after the prompt are not chosen then
            order = F.pad(source.order, (0, past + length))[:, columns]
            source = Source(source.states, order.repeat_interleave(copies, 0))
        self._call = Intervention(self.rows, chosen, source)

    def _chosen_until(self, end: int) -> Tensor:
        more = end - self.chosen.shape[1]
        if more > 0 and self.prefill_only:
            self.chosen = F.pad(self.chosen, (0, more))
        while self.chosen.shape[1] < end:
            self.mask = F.pad(self.mask, (0, 1), value=True)
            last = select(self.positions, self.mask)[:, -1:]
            self.chosen = torch.cat((self.chosen, last), 1)
        return self.chosen

    def apply(self, site: Site, output: Tensor) -> Tensor:
        """Do what the call in progress does."""
        return self._call.apply(site, output)


class StepHook:
    """Pre-hook of a model: tells the generation in force in this thread of each of its calls."""

    def __init__(self, calls: Routing) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: Any = self.calls.current
        if isinstance(call, Generation):
            call.begin(args, kwargs)


def _as_rows_of(site: Site, output: Tensor, tokens: Tensor) -> Tensor:
    """Lay (rows, tokens) out as `output` does, which may have them flattened."""
    if output.shape[:-1] == tokens.shape:
        return tokens
    if output.dim() == 2 and len(output) == tokens.numel():
        return tokens.flatten()
    raise ValueError(
        f"{site.name} gave {tuple(output.shape)} for {tuple(tokens.shape)} rows and tokens; choose"
        " a module whose output has one state for each token"
    )
