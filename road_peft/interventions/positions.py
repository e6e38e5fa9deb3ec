"""Which tokens of a batch are meant, whatever the side of the padding."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

Positions = str | Callable[[Tensor], Tensor]

_TERM = re.compile(r"([fl])([1-9]\d*)")


def check_positions(positions: str) -> None:
    """Refuse a text that names no tokens.

    Raises:
        ValueError: it is neither 'all' nor terms like 'f2' and 'l1', joined by '+'.
    """
    if positions != "all" and not all(_TERM.fullmatch(t) for t in positions.split("+")):
        raise ValueError(
            f"positions is {positions!r}; give 'all', or 'f' or 'l' and a number for the first or"
            " last tokens, such as 'l1' or 'f2+l1', or a function of the attention mask"
        )


def select(positions: Positions, mask: Tensor) -> Tensor:
    """Give the tokens that `positions` name among those of `mask`.

    A row that has fewer tokens than asked for gives all it has.

    Shapes:
        mask: (rows, tokens), bool. Returns such a mask.
    Raises:
        ValueError: a function gave something else than such a mask.
    """
    if not isinstance(positions, str):
        chosen = positions(mask)
        if not isinstance(chosen, Tensor) or chosen.shape != mask.shape:
            given = tuple(chosen.shape) if isinstance(chosen, Tensor) else repr(chosen)
            raise ValueError(
                f"the function of positions gave {given} for an attention mask of"
                f" {tuple(mask.shape)}; it must give a mask of that shape"
            )
        return chosen.to(mask.device, torch.bool) & mask
    if positions == "all":
        return mask
    count = mask.long().cumsum(1)  # of real tokens, this one included
    chosen = torch.zeros_like(mask)
    for term in positions.split("+"):
        number = int(term[1:])
        chosen |= count <= number if term[0] == "f" else count > count[:, -1:] - number
    return chosen & mask


def select_in_sequence(
    positions: Positions, mask: Tensor, prompt: Tensor, prefill_only: bool
) -> Tensor:
    """Give the tokens of `prompt` that `positions` name, and those after it if these count.

    A token after the prompt is meant if `positions` name it in the sequence that ends with it, so
    that a decoder, which computes one at a time, and one pass over all of them agree.

    Shapes:
        mask, prompt: (rows, tokens), bool, `prompt` within `mask`. Returns such a mask.
    """
    chosen = select(positions, prompt)
    if prefill_only:
        return chosen
    chosen, after = chosen.clone(), mask & ~prompt
    for column in torch.nonzero(after.any(0)).flatten().tolist():
        last = select(positions, mask[:, : column + 1])[:, column]
        chosen[:, column] |= last & after[:, column]
    return chosen
