"""The arms that are compared: what is trained, and through which masks.

An arm is written as its tuner and its masks, `road+ns`; without masks it is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from directions import Task
from lass import WeightGates
from masking import NeuronGates, Table
from peft import LoraConfig, get_peft_model
from translator import Active

from apiq_peft import ApiQConfig, preset, quantize
from recipes_peft.errors import UserError
from road_peft import RoadConfig

__all__ = ["MASKS", "TUNERS", "Tuned", "dense", "gated", "no_extra", "parse"]

# attention and feed-forward layers of both sides
LINEARS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
MASKS = ("dense", "ns", "random", "shuffled", "lass")


@dataclass(frozen=True)
class Tuned:
    """A model whose trained parameters have a gradient, and the adapter of each task, if any."""

    model: Any
    learning_rate: float
    adapters: Mapping[str, str]

    def extra(self, task: str, rows: int) -> dict[str, Any]:
        """Give what a forward pass of so many rows of a task takes besides."""
        return {"adapter_names": [self.adapters[task]] * rows} if self.adapters else {}


def full(model: Any, given: Any, tasks: Sequence[Task], samples: Any) -> Tuned:
    """Train all weights: the paper's method, and its dense baseline."""
    return Tuned(model, given.learning_rate, {})


def road(model: Any, given: Any, tasks: Sequence[Task], samples: Any) -> Tuned:
    """Train one RoAd that all tasks share; it starts as the identity."""
    return Tuned(get_peft_model(model, road_config(given)), given.road_learning_rate, {})


def road_pair(model: Any, given: Any, tasks: Sequence[Task], samples: Any) -> Tuned:
    """Train a RoAd for each direction: the baseline with an adapter for each language pair."""
    return each(model, given, {task.name: task.name for task in tasks})


def road_family(model: Any, given: Any, tasks: Sequence[Task], samples: Any) -> Tuned:
    """Train a RoAd for each family of languages, or language that has none named."""
    families = {language: family for family in given.families for language in family.split("-")}
    return each(model, given, {t.name: families.get(t.language, t.language) for t in tasks})


def each(model: Any, given: Any, adapters: Mapping[str, str]) -> Tuned:
    names = list(dict.fromkeys(adapters.values()))
    adapted: Any = get_peft_model(model, road_config(given), adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, road_config(given))
    adapted.base_model.set_adapter(names)  # all are trained; a batch names the one that it uses
    return Tuned(adapted, given.road_learning_rate, adapters)


def lora(model: Any, given: Any, tasks: Sequence[Task], samples: Any) -> Tuned:
    """Train one LoRA that all tasks share."""
    adapted = get_peft_model(model, LoraConfig(target_modules=LINEARS, **rank(given)))
    return Tuned(adapted, given.lora_learning_rate, {})


def apiq(model: Any, given: Any, tasks: Sequence[Task], samples: Any) -> Tuned:
    """Quantise the model with ApiQ, on samples of all tasks, and train the LoRA that it gives."""
    how = ApiQConfig(
        bits=given.bits, group_size=given.group_size, target_modules=LINEARS, **rank(given)
    )
    adapted, _ = quantize(model, samples, how, preset(given.preset), show_progress=False)
    return Tuned(adapted, given.lora_learning_rate, {})


def road_config(given: Any) -> RoadConfig:
    return RoadConfig(
        variant="road_1",
        group_size=given.group_size,
        target_modules=LINEARS,
        task_type="SEQ_2_SEQ_LM",
    )


def rank(given: Any) -> dict[str, Any]:
    return {"r": given.rank, "lora_alpha": 2 * given.rank, "task_type": "SEQ_2_SEQ_LM"}


TUNERS: dict[str, Callable[[Any, Any, Sequence[Task], Any], Tuned]] = {
    "full": full,
    "road": road,
    "road-pair": road_pair,
    "road-family": road_family,
    "lora": lora,
    "apiq": apiq,
}


def parse(arm: str) -> tuple[str, str]:
    """Give the tuner and the masks of an arm.

    Raises:
        UserError: there are none of these names, or they do not go together.
    """
    tuner, _, masks = arm.partition("+")
    masks = masks or "dense"
    if tuner not in TUNERS or masks not in MASKS or (masks == "lass" and tuner != "full"):
        raise UserError(
            f"there is no arm {arm!r}; give one of {', '.join(TUNERS)}, then perhaps + and one of"
            f" {', '.join(MASKS)} (lass with full only)"
        )
    return tuner, masks


def dense(task: str) -> Any:
    """Mask nothing."""
    return nullcontext()


def no_extra(task: str, rows: int) -> dict[str, Any]:
    """Give nothing to a forward pass besides its batch."""
    return {}


@contextmanager
def gated(
    model: Any, kind: str, keep: Table | None, weights: Any, seed: int, bias: str
) -> Iterator[Active]:
    """Give what masks the model for a task, by the kind of masks.

    `keep` is what the tasks keep of their neurons, `weights` what they keep for `lass`.
    """
    if kind == "lass":
        yield WeightGates(model, weights).active
        return
    if kind == "dense" or keep is None:
        yield dense
        return
    controls = {"ns": lambda: keep, "random": lambda: keep.random(seed)}
    masks = controls.get(kind, lambda: keep.shuffled(seed))()
    with NeuronGates(model, masks, bias) as gates:
        yield gates.active
