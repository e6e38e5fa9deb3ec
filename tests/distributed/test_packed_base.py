"""A LoRA on an ApiQ-packed base under DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from apiq_peft import ApiQConfig
from apiq_peft.packed import PackedLinear
from tests.apiq_peft._models import tiny
from tests.distributed._two import (
    adam,
    assert_alike,
    facts,
    found,
    keep,
    message,
    mine,
    moved,
    say,
    start,
    train,
    trained,
)

BITS = (2, 3, 4)


def packed(bits: int) -> Any:
    """Give a packed model whose LoRA is not zero."""
    torch.manual_seed(0)
    config = ApiQConfig(bits=bits, group_size=32, r=4, lora_alpha=8, task_type="CAUSAL_LM")
    model = get_peft_model(tiny(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(0, 0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert layers
    return {
        f"{n}.{k}": whole(getattr(m, k)).clone()
        for n, m in layers.items()
        for k in ("qweight", "qzeros", "scales")
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _is_shard(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) and 2 * parameter.to_local().numel() <= (
        parameter.numel() + parameter.shape[-1]
    )


def ours(rank: int, out: Path) -> None:
    said: dict[str, Any] = {}
    for bits in BITS:
        model = packed(bits)
        run = DistributedDataParallel(model)
        keep(out, f"ddp-{bits}", rank, train(run, adam(model), mine(rank), adapted=model))

        model = packed(bits)
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
        keep(out, f"fsdp-{bits}", rank, train(model, adam(model), mine(rank)))
        keep(out, f"codes-{bits}", rank, codes(model))
        shards = {n.rpartition(".")[2] for n, p in model.named_parameters() if _is_shard(p)}
        said[f"sharded {bits}"] = {"qweight", "qzeros"} <= shards and all(
            isinstance(p, DTensor) for p in model.parameters()
        )
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        weights = get_model_state_dict(model, options=options)
        model.save_pretrained(out / f"adapter-{bits}-{rank}", state_dict=weights)
    said["tp"] = message(
        lambda: AutoModelForCausalLM.from_pretrained(
            out / "base", distributed_config=DistributedConfig(tp_size=2)
        )
    )
    say(out, rank, said)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    packed(2).unload().save_pretrained(out / "base")
    start(ours, out)
    return out


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_every_step_equals_that_of_one_process(both: Path, engine: str, bits: int) -> None:
    model = packed(bits)
    wanted = train(model, adam(model))
    seen = found(both, f"{engine}-{bits}")
    assert moved(seen)
    assert_alike(seen, wanted)


@pytest.mark.parametrize("bits", BITS)
def test_fsdp_shards_the_codes_and_changes_none(both: Path, bits: int) -> None:
    assert facts(both)[f"sharded {bits}"] is True
    wanted, seen = codes(packed(bits)), found(both, f"codes-{bits}")
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[k], t) for k, t in wanted.items())


@pytest.mark.parametrize("bits", BITS)
def test_the_whole_adapter_is_saved(both: Path, bits: int) -> None:
    saved = load_file(both / f"adapter-{bits}-0" / "adapter_model.safetensors")
    seen = found(both, f"fsdp-{bits}")
    assert_alike(saved, {k: seen[f"2 {k}"] for k in saved}, 0)
    assert len(saved) == sum(k.startswith("2 base") for k in seen)


def test_a_tensor_parallel_plan_is_refused(both: Path) -> None:
    assert "packed layers cannot be split" in facts(both)["tp"]
