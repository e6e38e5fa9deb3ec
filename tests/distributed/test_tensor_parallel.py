"""RoAd under transformers' tensor-parallel plan: two processes share every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from road_peft import RoadBank, RoadConfig, hotswap_adapter, merged_state_dict
from tests.distributed._two import (
    IDS,
    adam,
    adapter_of,
    assert_alike,
    facts,
    found,
    keep,
    llama,
    message,
    moved,
    road,
    say,
    start,
    train,
    trained,
)

VARIANTS = ("road_1", "road_2", "road_4")


def shared(out: Path, **plan: str) -> Any:
    """Load the base onto both processes, each with half of every layer."""
    config = DistributedConfig(tp_size=2, tp_plan=plan or None)
    return LlamaForCausalLM.from_pretrained(out / "base", distributed_config=config).eval()


def ours(rank: int, out: Path) -> None:
    for variant in VARIANTS:
        start_of = out / f"start-{variant}"
        model = PeftModel.from_pretrained(shared(out), start_of, is_trainable=True)
        seen = train(model, adam(model), clip=lambda m: nn.utils.clip_grad_norm_(trained(m), 1.0))
        keep(out, f"steps-{variant}", rank, seen)
    said: dict[str, Any] = {}
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn")
    placed = {n: getattr(layer, f"{n}_proj").road_theta["default"] for n in "qo"}
    assert all(isinstance(p, DTensor) for p in placed.values())
    said["placed"] = [
        placed["q"].placements == (Shard(0),),
        placed["o"].placements == (Replicate(),),
    ]
    model.save_pretrained(out / f"adapter-{rank}")
    said["merge"] = message(model.merge_adapter)
    merged = merged_state_dict(model)
    keep(out, "merged", 0, merged) if rank == 0 else None
    said["merged"] = "on the first" if bool(merged) == (rank == 0) else "elsewhere"

    again = PeftModel.from_pretrained(shared(out), out / "adapter-0")
    keep(out, "again", rank, adapter_of(again))
    again.load_adapter(out / "other", adapter_name="other")
    with torch.no_grad():
        plain = again(input_ids=IDS).logits
        mixed = again(input_ids=IDS, adapter_names=["default", "other", "__base__", "default"])
        again.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
        again.set_adapter("both")
        both = again(input_ids=IDS).logits
        again.set_adapter("other")
        hotswap_adapter(again, out / "adapter-0", adapter_name="other")
        swapped = again(input_ids=IDS).logits
    keep(
        out, "outputs", rank, {"plain": plain, "mixed": mixed.logits, "both": both, "swap": swapped}
    )

    # a random start must be the same everywhere
    torch.manual_seed(rank)
    fresh = get_peft_model(shared(out), RoadConfig(group_size=4, init_weights=False))
    keep(out, "fresh", rank, adapter_of(fresh))

    said["group"] = message(lambda: road(shared(out), group_size=16))
    said["lora"] = message(lambda: road(shared(out), lora_rank=2))
    packed = {"model.layers.*.mlp.gate_proj": "packed_colwise"}
    said["plan"] = message(lambda: road(shared(out, **packed)))
    said["bank"] = message(lambda: RoadBank(shared(out), slots=2))
    say(out, rank, said)


def prepare(out: Path) -> None:
    llama().save_pretrained(out / "base")
    for variant in VARIANTS:
        road(llama(), variant=variant).save_pretrained(out / f"start-{variant}")
    other = road(llama(), variant="road_4")
    with torch.no_grad():
        for parameter in trained(other):
            parameter.mul_(0.9)
    other.save_pretrained(out / "other")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tensor_parallel")
    prepare(out)
    start(ours, out)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_equals_that_of_one_process(both: Path, variant: str) -> None:
    model = road(llama(), variant=variant)
    wanted = train(model, adam(model), clip=lambda m: nn.utils.clip_grad_norm_(trained(m), 1.0))
    seen = found(both, f"steps-{variant}")
    assert moved(seen)
    assert_alike(seen, wanted)


def test_the_adapter_is_split_with_the_outputs(both: Path) -> None:
    assert facts(both)["placed"] == [True, True]


def test_every_process_saves_the_whole_adapter(both: Path) -> None:
    last = {
        k.removeprefix("2 "): t
        for k, t in found(both, "steps-road_4").items()
        if k.startswith("2 base")
    }
    for rank in range(2):
        saved = load_file(both / f"adapter-{rank}" / "adapter_model.safetensors")
        assert_alike(saved, last, 0)
    assert_alike(found(both, "again"), last, 0)


def test_outputs_equal_those_of_one_process(both: Path) -> None:
    alone = PeftModel.from_pretrained(llama(), both / "adapter-0")
    alone.load_adapter(both / "other", adapter_name="other")
    with torch.no_grad():
        wanted = {"plain": alone(input_ids=IDS).logits}
        wanted["swap"] = wanted["plain"]
        names = ["default", "other", "__base__", "default"]
        wanted["mixed"] = alone(input_ids=IDS, adapter_names=names).logits
        alone.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
        alone.set_adapter("both")
        wanted["both"] = alone(input_ids=IDS).logits
    assert_alike(found(both, "outputs"), wanted)


def test_a_random_start_is_that_of_the_first_process(both: Path) -> None:
    torch.manual_seed(0)
    alone = get_peft_model(llama(), RoadConfig(group_size=4, init_weights=False))
    assert found(both, "fresh").keys() == adapter_of(alone).keys()  # and equal on both


def test_merging_gathers_layer_by_layer(both: Path) -> None:
    said = facts(both)
    assert "its weight lies on several processes" in said["merge"]
    assert said["merged"] == "on the first"
    merged = llama()
    merged.load_state_dict(load_file(both / "merged-0.safetensors"))
    alone = PeftModel.from_pretrained(llama(), both / "adapter-0").merge_and_unload()
    assert_alike(dict(merged.named_parameters()), dict(alone.named_parameters()))


def test_what_cannot_be_followed_is_refused(both: Path) -> None:
    said = facts(both)
    assert (
        "16 outputs lie on 2 processes, 8 each, which is not a multiple of group_size (16)"
        in (said["group"])
    )
    assert "model.layers.0.self_attn.q_proj" in said["group"]
    assert "lora_rank is 2" in said["lora"]
    assert "'packed_colwise'" in said["plan"]
    assert "a bank cannot follow" in said["bank"]
