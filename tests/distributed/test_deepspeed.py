"""DeepSpeed ZeRO-3: RoAd, and a LoRA on packed weights, train on two processes as on one.

Run by `make test-deepspeed`, since DeepSpeed is no dependency. The first time it compiles its
communication for CPUs, which takes a minute or more.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from road_peft import hotswap_adapter, merged_state_dict
from tests.distributed._two import (
    adam,
    assert_alike,
    facts,
    found,
    keep,
    llama,
    message,
    mine,
    moved,
    road,
    say,
    start,
    train,
    trained,
)
from tests.distributed.test_data_parallel import checkpointed
from tests.distributed.test_packed_base import BITS, packed
from tests.helpers import TOLERANCES

pytest.importorskip("deepspeed")

ZERO_3 = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # else all of so small a model stays whole
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def accelerated(from_start: bool = False) -> Accelerator:
    """Give an accelerator for DeepSpeed, which may split models as they are loaded."""
    AcceleratorState._reset_state(reset_partial_state=True)
    gloo = InitProcessGroupKwargs(backend="gloo")
    plugin = DeepSpeedPlugin(hf_ds_config=ZERO_3, zero3_init_flag=from_start)
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])


def prepared(model: Any) -> tuple[Accelerator, Any, Any]:
    """Give accelerate's engine for `model`, and its optimizer."""
    accelerator = accelerated()
    return accelerator, *accelerator.prepare(model, adam(model))


def with_road(rank: int, out: Path, said: dict[str, Any]) -> None:
    accelerator, engine, optimizer = prepared(checkpointed(road(llama())))
    bare = accelerator.unwrap_model(engine)
    run = {"backward": accelerator.backward, "adapted": bare}
    said["in parts"] = all(p.numel() == 0 < p.ds_numel for p in bare.parameters())
    keep(out, "road", rank, train(engine, optimizer, mine(rank), **run))
    bare.save_pretrained(out / f"adapter-{rank}")
    weights = accelerator.get_state_dict(engine)
    if rank == 0:
        bare.save_pretrained(out / "gathered", state_dict=weights)
    keep(out, f"merged-{rank}", rank, merged_state_dict(bare))
    said["merge"] = message(bare.merge_adapter)
    said["swap"] = message(lambda: hotswap_adapter(bare, out / f"adapter-{rank}"))
    accelerator.save_state(str(out / "state"))
    keep(out, "after", rank, train(engine, optimizer, mine(rank), steps=2, **run))
    accelerator.load_state(str(out / "state"))
    keep(out, "resumed", rank, train(engine, optimizer, mine(rank), steps=2, **run))


def split_from_the_start(rank: int, out: Path, said: dict[str, Any]) -> None:
    accelerator = accelerated(from_start=True)
    base = AutoModelForCausalLM.from_pretrained(out / "base", attn_implementation="eager")
    said["from the start"] = all(p.numel() == 0 < p.ds_numel for p in base.parameters())
    model = checkpointed(road(base))
    engine, optimizer = accelerator.prepare(model, adam(model))
    run = {"backward": accelerator.backward, "adapted": accelerator.unwrap_model(engine)}
    keep(out, "start", rank, train(engine, optimizer, mine(rank), **run))


def ours(rank: int, out: Path) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    said: dict[str, Any] = {}
    with_road(rank, out, said)
    split_from_the_start(rank, out, said)
    for bits in BITS:
        accelerator, engine, optimizer = prepared(packed(bits))
        bare = accelerator.unwrap_model(engine)
        run = {"backward": accelerator.backward, "adapted": bare}
        seen = train(engine, optimizer, mine(rank), **run)
        keep(out, f"packed-{bits}", rank, {k: t for k, t in seen.items() if k.endswith("loss")})
        said[f"codes {bits}"] = sorted({str(p.dtype) for p in bare.parameters() if not p.numel()})
        weights = accelerator.get_state_dict(engine)
        if rank == 0:
            bare.save_pretrained(out / f"packed-{bits}", state_dict=weights)
    say(out, rank, said)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deepspeed")
    llama().save_pretrained(out / "base")
    start(ours, out)
    return out


def clipped(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(trained(model), 1.0)


@pytest.mark.parametrize(("name", "fact"), [("road", "in parts"), ("start", "from the start")])
def test_every_step_equals_that_of_one_process(both: Path, name: str, fact: str) -> None:
    model = checkpointed(road(llama()))
    seen = found(both, name)
    assert facts(both)[fact]
    assert moved(seen)
    assert_alike(seen, train(model, adam(model), clip=clipped))


def test_every_process_saves_the_whole_adapter(both: Path) -> None:
    last = {k.removeprefix("2 "): t for k, t in found(both, "road").items()}
    for folder in ("adapter-0", "adapter-1", "gathered"):
        saved = load_file(both / folder / "adapter_model.safetensors")
        assert saved
        assert all(torch.equal(tensor, last[k]) for k, tensor in saved.items())


def test_it_goes_on_from_what_accelerate_saved(both: Path) -> None:
    after, resumed = found(both, "after"), found(both, "resumed")
    assert all(torch.equal(tensor, resumed[k]) for k, tensor in after.items())


def test_shards_are_merged_on_the_first_process(both: Path) -> None:
    model = PeftModel.from_pretrained(llama(), both / "adapter-0")
    wanted = model.merge_and_unload().state_dict()
    merged = load_file(both / "merged-0-0.safetensors")
    assert not load_file(both / "merged-1-1.safetensors")
    assert_alike(merged, dict(wanted), TOLERANCES[torch.float32])


def test_what_would_be_lost_is_refused(both: Path) -> None:
    assert "use road_peft.merged_state_dict(model) on every process" in facts(both)["merge"]
    assert "change adapters before the model is given to DeepSpeed" in facts(both)["swap"]


@pytest.mark.parametrize("bits", BITS)
def test_a_lora_on_packed_weights_trains_as_on_one_process(both: Path, bits: int) -> None:
    model = packed(bits)
    wanted = train(model, adam(model), clip=clipped)
    losses = found(both, f"packed-{bits}")
    assert_alike(losses, {k: t for k, t in wanted.items() if k.endswith("loss")})
    assert "torch.int32" in facts(both)[f"codes {bits}"]
    saved = load_file(both / f"packed-{bits}" / "adapter_model.safetensors")
    assert_alike(saved, {k[2:]: t for k, t in wanted.items() if k.startswith("2 base_model")})
