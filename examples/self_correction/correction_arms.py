"""What is compared: losses, parts of the data, and how the model is tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from correction import CrossEntropy, ErrorNormTruncation, SelfCorrectionLoss, TruncationLoss
from peft import get_peft_model

from apiq_peft import ApiQConfig, preset, quantize
from recipes_peft.errors import UserError
from road_peft import RoadConfig

__all__ = ["ARMS", "TUNERS", "Arm", "Run", "plan"]


@dataclass(frozen=True)
class Arm:
    """A loss made from the settings, and the part of the training pairs it sees."""

    loss: Callable[[Any], Any]
    part: str = "all"  # clean: those without noise; filtered: those that a filter keeps
    teacher: bool = False


def _correction(**changes: Any) -> Callable[[Any], Any]:
    def make(given: Any) -> SelfCorrectionLoss:
        own = {"tau": given.tau, "B": given.steepness, "beta": given.beta}
        return SelfCorrectionLoss(**own | {"label_smoothing": given.label_smoothing} | changes)

    return make


def _ce(given: Any) -> CrossEntropy:
    return CrossEntropy(given.label_smoothing)


def _truncation(given: Any) -> TruncationLoss:
    return TruncationLoss(given.truncated, given.truncation_start, given.label_smoothing)


def _error_norm(given: Any) -> ErrorNormTruncation:
    return ErrorNormTruncation(given.norm_threshold, given.truncation_start, given.label_smoothing)


ARMS = {
    "ce": Arm(_ce),
    "self": Arm(_correction()),
    "tau1": Arm(_correction(tau=1.0, certainty=False)),  # a falling learning rate, no correction
    "uncertain": Arm(_correction(certainty=False)),
    "early": Arm(_correction(beta=0.3)),
    "truncation": Arm(_truncation),
    "error-norm": Arm(_error_norm),
    "filtered": Arm(_ce, part="filtered"),
    "clean": Arm(_ce, part="clean"),
    "distilled": Arm(_correction(), teacher=True),  # another method: believes the base model
}
PROMISED = ("ce", "self", "tau1")  # by the promises, so for every seed


def full(model: Any, samples: torch.Tensor, given: Any, folder: Path | None) -> Any:
    return model.requires_grad_(True)


def road(model: Any, samples: torch.Tensor, given: Any, folder: Path | None) -> Any:
    return get_peft_model(
        model,
        RoadConfig(variant=given.variant, group_size=given.road_group_size, task_type="CAUSAL_LM"),
    )


def apiq(model: Any, samples: torch.Tensor, given: Any, folder: Path | None) -> Any:
    config = ApiQConfig(
        bits=given.bits,
        group_size=given.apiq_group_size,
        r=given.rank,
        lora_alpha=given.rank,
        task_type="CAUSAL_LM",
    )
    blocks = folder and folder / "quantized"
    return quantize(model, samples, config, preset(given.preset), folder=blocks)[0]


# of a model, samples to calibrate on, the settings, and a folder for what is not finished, if any
TUNERS: dict[str, Callable[[Any, torch.Tensor, Any, Path | None], Any]] = {
    "road": road,
    "full": full,
    "apiq": apiq,
}


@dataclass(frozen=True)
class Run:
    """One training: how, on how much noise, with which loss, and a seed."""

    tuner: str
    rate: float
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.tuner}-{self.rate:g}-{self.arm}-{self.seed}"


def plan(given: Any) -> list[Run]:
    """List the runs, those that the promises need first.

    The first tuner at the first rate gets every arm: those of the promises with all seeds, others
    with `side_seeds`. Other rates and tuners get `ce` and `self` only.

    Raises:
        UserError: an arm needs noise that is known, or a share to drop, and the first rate is 0.
    """
    tuners, rates = given.tuners, [float(rate) for rate in given.rates]
    both = [arm for arm in given.arms if arm in ("ce", "self")]
    promised = [arm for arm in given.arms if arm in PROMISED]
    others = [arm for arm in given.arms if arm not in PROMISED]
    main, side = range(given.seeds), range(min(given.seeds, given.side_seeds))
    runs = [Run(tuners[0], rates[0], arm, seed) for seed in main for arm in promised]
    runs += [Run(tuners[0], rate, arm, s) for rate in rates[1:] for s in main for arm in both]
    runs += [Run(tuners[0], rates[0], arm, seed) for seed in side for arm in others]
    runs += [Run(tuner, rates[0], arm, s) for tuner in tuners[1:] for s in side for arm in both]
    parts = {ARMS[run.arm].part for run in runs if not run.rate}
    if "clean" in parts:
        raise UserError(
            "the arm clean is trained without the noisy pairs, and at a rate of 0 none is known to"
            " be noisy; leave it out of --arms, or begin --rates with a share above 0"
        )
    if "filtered" in parts and given.filtered_share is None:
        raise UserError(
            "the arm filtered drops as many pairs as are noisy, which a rate of 0 does not say;"
            " give --filtered-share, or leave it out of --arms"
        )
    return runs
