"""How a calibration runs: the settings that a finished model no longer needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from apiq_peft.quantizer import CLIP_INIT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRANULARITIES = ("block", "layer")
LOSSES = ("mse", "relative")
SCHEDULES = ("constant", "cosine")
SHARED = ("samples", "layers")


@dataclass(frozen=True)
class Calibration:
    """Settings of `apiq_peft.quantize`; the defaults are the published script's.

    Raises:
        ValueError: a value that is not allowed.
    Source:
        The official code's script for Llama-2 (weight decay and rates included); samples are not
        drawn here but given by the caller, in the order they are used.
    """

    granularity: str = field(
        default="block",
        metadata={"help": "'block' matches the output of a block, 'layer' that of each layer."},
    )
    epochs: int = field(
        default=20, metadata={"help": "Passes over the samples; 0 leaves the initial values."}
    )
    batch_size: int = field(default=1, metadata={"help": "Samples of one batch."})
    step_batches: int | None = field(
        default=None,
        metadata={
            "help": "Batches of one step, over all processes; one for each process if not given. A"
            " calibration goes on with as many processes as divide it."
        },
    )
    shared: str = field(
        default="samples",
        metadata={
            "help": "What several processes share: 'samples', whose gradients they add at every"
            " step, or 'layers', where each works on other layers of one input (q, k, v; gate, up),"
            " on all samples, and only sends what it found: for nodes with a slow network, with"
            " granularity 'layer'."
        },
    )
    clip_lr: float = field(default=5e-3, metadata={"help": "Learning rate of the clipping."})
    clip_weight_decay: float = field(
        default=0.1, metadata={"help": "Weight decay of the clipping; it pulls to a tighter range."}
    )
    lora_lr: float = field(default=5e-4, metadata={"help": "Learning rate of A and B."})
    lora_weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of A and B."})
    clip_init: float = field(
        default=CLIP_INIT, metadata={"help": "Initial clip parameter, before the sigmoid."}
    )
    augment_loss: bool = field(
        default=True,
        metadata={
            "help": "Add the error against the full-precision block on the quantised input (not in"
            " the paper's objective, but in its script)."
        },
    )
    loss: str = field(
        default="mse",
        metadata={
            "help": "'mse', the mean squared error, or 'relative', where each token's is divided by"
            " the mean square of what it should be: no token outweighs all others."
        },
    )
    closed_form: str = field(
        default="none",
        metadata={
            "help": "Solve A and B of a layer in closed form: 'none', 'start' (then train from it),"
            " or 'refit' (after training, with the grid that was found; layer by layer)."
        },
    )
    schedule: str = field(
        default="constant", metadata={"help": "Of both learning rates: 'constant' or 'cosine'."}
    )
    warmup: float = field(default=0.0, metadata={"help": "Share of the steps that warm up."})
    shuffle: bool = field(
        default=False, metadata={"help": "Draw a new order of the batches in every epoch."}
    )
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip the gradient of a step; not at all if not given."}
    )
    final_epochs: int = field(
        default=0,
        metadata={
            "help": "Passes over the samples in which at last the A and B of the whole model learn"
            " its predictions in full precision; needs all of its activations in memory."
        },
    )
    final_lr: float = field(
        default=3e-4, metadata={"help": "Highest learning rate of these, on a cosine schedule."}
    )
    compute_dtype: str = field(
        default="float32", metadata={"help": "Of a block's arithmetic: " + ", ".join(DTYPES) + "."}
    )
    cache_dtype: str = field(
        default="float32", metadata={"help": "Of the activations between blocks."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Keep the activations in files there while it runs, not in memory."},
    )
    seed: int = field(default=2, metadata={"help": "Of A's initial values and of the order."})

    def __post_init__(self) -> None:
        for name, allowed in (
            ("granularity", GRANULARITIES),
            ("shared", SHARED),
            ("loss", LOSSES),
            ("schedule", SCHEDULES),
            ("closed_form", ("none", "start", "refit")),
            ("compute_dtype", DTYPES),
            ("cache_dtype", DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose from {', '.join(allowed)}"
                )
        for name, least in (
            ("epochs", 0),
            ("final_epochs", 0),
            ("batch_size", 1),
            ("step_batches", 1),
            ("clip_lr", 0),
            ("lora_lr", 0),
            ("final_lr", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.shared == "layers" and (self.granularity == "block" or self.final_epochs):
            raise ValueError(
                "shared is 'layers', but all layers of a block (granularity 'block') or of the"
                " model (final_epochs) learn together; share 'samples', or set granularity to"
                " 'layer' and final_epochs to 0"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of the steps, below 1")


PRESETS: dict[str, dict[str, Any]] = {
    # the paper's two algorithms, with the script's rates
    "apiq-bw": {},
    "apiq-lw": {"granularity": "layer", "lora_lr": 1e-3, "augment_loss": False},
    # the closed form alone: seconds a block
    "fast": {"granularity": "layer", "epochs": 0, "closed_form": "start"},
    # all that lowers the error with few samples: from the closed form on, no token above others,
    # and the whole model at last
    "best": {
        "closed_form": "start",
        "loss": "relative",
        "lora_lr": 1e-3,
        "clip_weight_decay": 0.0,
        "schedule": "cosine",
        "final_epochs": 3,
    },
}


def preset(name: str, **changes: Any) -> Calibration:
    """Give the settings of that name, with changes.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; choose from {', '.join(PRESETS)}")
    return replace(Calibration(**PRESETS[name]), **changes)
