"""What `accelerate launch` runs in its test: RoAd is trained, and a model quantised by ApiQ."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from apiq_peft import ApiQConfig, preset, quantize
from tests.apiq_peft._models import tiny, tokens
from tests.distributed._two import adam, keep, llama, mine, road, train

QUANTIZED = (ApiQConfig(bits=2, group_size=32, r=4), preset("fast", step_batches=2))


def solved() -> dict[str, torch.Tensor]:
    """Give the factors of a model that is quantised in closed form."""
    model, _ = quantize(tiny(), tokens(4), *QUANTIZED, show_progress=False)
    return {n: t.detach() for n, t in model.state_dict().items() if ".lora_" in n}


def main(out: Path) -> None:
    accelerator = Accelerator()
    rank = accelerator.process_index
    model = road(llama())
    wrapped, optimizer = accelerator.prepare(model, adam(model))
    backward = accelerator.backward
    keep(out, "road", rank, train(wrapped, optimizer, mine(rank), backward=backward, adapted=model))
    keep(out, "apiq", rank, solved())
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
