"""What was promised before the run, as functions of the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXACT", "about_changes", "about_heads"]

EXACT = "adapters leave the embeddings as they were"

Array = NDArray[np.float64]


def about_changes(
    means: Mapping[str, Array],
    correlations: Mapping[str, Sequence[float]],
    gained: Mapping[str, float],
) -> dict[str, bool]:
    """Check what section 3.1 and appendix B.1 of the paper report of full finetuning and LoRA.

    Of RoAd's changes the paper reports nothing, and nothing is promised of them.

    Shapes:
        means: for each method (seeds, layers + 1, 3): dM, 1 - dD and length's share of the squared
        move, means over examples; the embeddings come first. correlations: of dM and 1 - dD over
        examples, for each seed. gained: score above that of a constant answer.
    """
    kept = {
        f"{method} learns the task (10 points above a constant answer)": points >= 0.1
        for method, points in gained.items()
    }
    for method, found in means.items():
        magnitude, rotation, share = found.mean(0).T
        if method != "full":
            untouched = np.abs(found[:, 0, :2]).max() < 1e-9
            kept[EXACT] = kept.get(EXACT, True) and bool(untouched)
        if method not in ("full", "lora"):
            continue
        low, high = np.split(np.arange(1, len(rotation)), [len(rotation) // 2])
        kept |= {
            f"{method}: second-last block, 1 - dD above dM": rotation[-2] > magnitude[-2],
            f"{method}: second-last block, less than half of the move is length": share[-2] < 0.5,
            f"{method}: larger dM goes with more rotation": np.mean(correlations[method]) > 0,
            f"{method}: upper blocks rotate more than lower ones": rotation[high].mean()
            > rotation[low].mean(),
            f"{method}: the last block changes more in length than lower ones": magnitude[-1]
            > magnitude[low].mean(),
        }
    if {"full", "lora"} <= set(means):
        full, lora = (means[m].mean(0)[-2] for m in ("full", "lora"))
        kept["LoRA changes length less than full finetuning"] = lora[0] < full[0]
        kept["LoRA rotates less than full finetuning"] = lora[1] < full[1]
    return {promise: bool(met) for promise, met in kept.items()}


def about_heads(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, bool]:
    """Check what the paper reports of the heads: for each task the test scores of each seed."""
    kept = {}
    for task, found in scores.items():
        mean = {kind: float(np.mean(values)) for kind, values in found.items()}
        kept[f"{task}: angle within 5 points of standard"] = (
            mean["angle"] >= mean["standard"] - 0.05
        )
        kept[f"{task}: magnitude at least 5 points below angle"] = (
            mean["magnitude"] <= mean["angle"] - 0.05
        )
        kept[f"{task}: magnitude below a random encoder"] = mean["magnitude"] < mean["random"]
    return kept
