"""What holds without any training on text: sums of rows at all lengths, and a head that does none.

A head that wants to do nothing must push softmax towards a token of no value for ever, for zeros
are never reached; clipped probabilities reach them with finite logits, and its gradient stops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from softmax_variants import Variant

__all__ = ["LENGTHS", "NO_OP", "POINTS", "RANDOM", "no_op_head", "promised", "row_statistics"]

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
# the settings at random logits: those of BERT-base's clipped softmax, and its normalised form
RANDOM = {
    "cs": Variant("clipped", 1.0, gamma=-0.025),
    "ncs": Variant("normalized", 1.0, beta=-2.175),
    "ncs-a": Variant("normalized", 1.03, beta=1.0),
}
POINTS = (500, 1500, 3000, 6000)  # steps
NO_OP = {
    "softmax": Variant(),
    "ncs-half": Variant("normalized", 1.0, beta=0.5),
}


def row_statistics(
    variant: Variant, length: int, rows: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Give the mean sum after clipping and the share of zeros, over rows of logits N(0, 1.5^2)."""
    draw = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(rows, length, generator=draw)
    probs = variant(scores, torch.full((rows, 1), length), None)
    return probs.sum(-1).mean().item(), (probs == 0).float().mean().item()


def no_op_head(
    variant: Variant, steps: Sequence[int] = POINTS, length: int = 64, seed: int = 0
) -> list[tuple[float, float]]:
    """Train the logits of a head to give nothing; gives gap and loss after these steps.

    The first token has no value, the others' are N(0, 1/d), d = 2 T. The loss is |sum_j p_j v_j|^2,
    the gap that of the first logit to the largest other; Adam, 0.02.
    """
    draw = torch.Generator().manual_seed(seed)
    width = 2 * length
    values = torch.randn(length, width, generator=draw) / width**0.5
    values[0] = 0
    logits = torch.zeros(length, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.02)
    visible, found = torch.tensor([length]), []
    for step in range(1, max(steps) + 1):
        error = (variant(logits, visible, None) @ values).square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if step in steps:
            gap = (logits[0] - logits[1:].max()).item()
            with torch.no_grad():
                error = (variant(logits, visible, None) @ values).square().sum()
            found.append((gap, error.item()))
    return found


def promised(
    sums: dict[str, list[float]], heads: dict[str, list[tuple[float, float]]]
) -> dict[str, bool]:
    """Say which promises about the toys were kept."""
    spread = {name: max(values) / min(values) for name, values in sums.items()}
    soft, half = heads["softmax"], heads["ncs-half"]
    return {
        "row sums of ncs and ncs-a differ 1.2 times at most over lengths": all(
            spread[name] <= 1.2 for name in ("ncs", "ncs-a")
        ),
        "row sums of cs differ 5 times or more": spread["cs"] >= 5,
        "a no-op head: the gap of softmax grows by 1 or more": soft[3][0] - soft[1][0] >= 1,
        "a no-op head: that of ncs-half stands still, and its loss is 0": (
            abs(half[3][0] - half[1][0]) < 0.01 and half[3][1] == 0
        ),
    }
