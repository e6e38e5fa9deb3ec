"""DDP and FSDP2: RoAd trains on two processes as on one, and saves, resumes and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from road_peft import merged_state_dict, replicate_adapters
from road_peft.shards import whole
from tests.distributed._two import (
    IDS,
    STEPPED,
    adam,
    adapter_of,
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
from tests.helpers import TOLERANCES

REPLICATED = ".*road_(theta|alpha)"  # names of the modules that hold a RoAd adapter
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def sharded(model: Any, **options: Any) -> Any:
    """Shard block by block, as FSDP2 is meant to be used."""
    for block in model.get_base_model().model.layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def dtype_in_forward(model: Any) -> str:
    """Give the dtype in which the layers see their angles in a forward."""
    seen = set()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    hook = layer.register_forward_pre_hook(
        lambda module, _: seen.add(str(module.road_theta["default"].dtype))
    )
    model(input_ids=IDS)
    hook.remove()
    return " ".join(sorted(seen))


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model.train()


def accelerated(rank: int, fsdp: bool, mixed_precision: str = "no") -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    if fsdp:
        # accelerate turns FSDP on for accelerators alone; this is what it sets there
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
            plugin.ignored_modules = REPLICATED
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def by_accelerate(rank: int, out: Path, name: str, fsdp: bool) -> None:
    accelerator = accelerated(rank, fsdp)
    model = checkpointed(road(llama()))
    model, optimizer = accelerator.prepare(model, adam(model))
    bare = accelerator.unwrap_model(model)
    run = {
        "backward": accelerator.backward,
        "adapted": bare,
        "clip": lambda m: accelerator.clip_grad_norm_(m.parameters(), 1.0),
    }
    keep(out, name, rank, train(model, optimizer, mine(rank), **run))
    accelerator.save_state(str(out / f"{name}-state"))
    after = train(model, optimizer, mine(rank), steps=2, **run)
    keep(out, f"{name}-after", rank, after)
    accelerator.load_state(str(out / f"{name}-state"))
    again = train(model, optimizer, mine(rank), steps=2, **run)
    keep(out, f"{name}-resumed", rank, again)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        bare.save_pretrained(out / f"{name}-adapter", state_dict=weights)


def by_torch(rank: int, out: Path, said: dict[str, Any]) -> None:
    model = sharded(checkpointed(road(llama())))
    said["sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = adam(model)
    keep(out, "fsdp", rank, train(model, optimizer, mine(rank)))
    model.save_pretrained(out / f"fsdp-adapter-{rank}")
    states = get_optimizer_state_dict(model, optimizer)
    kept: Any = {k: dict(v) if isinstance(v, dict) else v for k, v in states.items()}
    kept["state"] = {k: {n: _copy(t) for n, t in v.items()} for k, v in states["state"].items()}
    keep(out, "fsdp-after", rank, train(model, optimizer, mine(rank), steps=2))
    said["merge"] = message(model.merge_adapter)
    said["unload"] = message(model.merge_and_unload)
    keep(out, f"fsdp-merged-{rank}", rank, merged_state_dict(model))
    keep(out, "fsdp-unmerged", rank, {"logits": model(input_ids=IDS).logits.detach()})

    again = PeftModel.from_pretrained(llama(), out / f"fsdp-adapter-{rank}", is_trainable=True)
    again = sharded(checkpointed(again))
    resumed = adam(again)
    set_optimizer_state_dict(again, resumed, kept)
    keep(out, "fsdp-resumed", rank, train(again, resumed, mine(rank), steps=2))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def replicated(rank: int, out: Path, said: dict[str, Any]) -> None:
    model = road(llama())
    if rank:  # the first process's values hold
        for parameter in trained(model):
            parameter.data.zero_()
    kept = replicate_adapters(model)
    model = sharded(model, ignored_params=kept)
    said["replicated"] = sum(isinstance(p, DTensor) for p in trained(model))
    keep(out, "replicated", rank, train(model, adam(model), mine(rank)))

    model = road(llama())
    model = sharded(model, ignored_params=replicate_adapters(model), mp_policy=HALF)
    said["replicated dtype"] = dtype_in_forward(model)
    keep(out, "half", rank, train(model, adam(model), mine(rank), steps=2))
    said["sharded dtype"] = dtype_in_forward(sharded(road(llama()), mp_policy=HALF))
    # a base that is stored in half precision needs no policy, and the adapter keeps its own dtype
    model = sharded(road(llama(torch.bfloat16)))
    said["stored dtype"] = dtype_in_forward(model)
    keep(out, "stored", rank, train(model, adam(model), mine(rank), steps=2))
    said["twice"] = message(lambda: replicate_adapters(model))


def ours(rank: int, out: Path) -> None:
    said: dict[str, Any] = {}
    by_torch(rank, out, said)
    replicated(rank, out, said)
    by_accelerate(rank, out, "accelerate-ddp", fsdp=False)
    by_accelerate(rank, out, "accelerate-fsdp", fsdp=True)
    for name, fsdp in (("autocast-ddp", False), ("autocast-fsdp", True)):
        accelerator = accelerated(rank, fsdp, "bf16")
        model = road(llama())
        replicate_adapters(model) if fsdp else None
        model, optimizer = accelerator.prepare(model, adam(model))
        seen = train(
            *(model, optimizer, mine(rank)),
            steps=2,
            backward=accelerator.backward,
            adapted=accelerator.unwrap_model(model),
        )
        keep(out, name, rank, seen)
    say(out, rank, said)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data_parallel")
    start(ours, out)
    return out


def alone(steps: int = 3, clip: bool = False, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    model = road(llama(**settings))
    norm = (lambda m: nn.utils.clip_grad_norm_(trained(m), 1.0)) if clip else None
    return model, train(model, adam(model), steps=steps, clip=norm)


@pytest.mark.parametrize(
    ("name", "clip"),
    [("fsdp", False), ("replicated", False), ("accelerate-ddp", True), ("accelerate-fsdp", True)],
)
def test_every_step_equals_that_of_one_process(both: Path, name: str, clip: bool) -> None:
    seen = found(both, name)
    assert moved(seen)
    assert_alike(seen, alone(clip=clip)[1])


@pytest.mark.parametrize("name", ["fsdp", "accelerate-ddp", "accelerate-fsdp"])
def test_training_resumes_where_it_was(both: Path, name: str) -> None:
    resumed, after = found(both, f"{name}-resumed"), found(both, f"{name}-after")
    assert moved(resumed)
    assert_alike(resumed, after, STEPPED)


def test_the_base_is_sharded_and_the_adapter_too_unless_it_is_replicated(both: Path) -> None:
    said = facts(both)
    assert said["sharded"] is True
    assert said["replicated"] == 0
    assert "sharded already" in said["twice"]


@pytest.mark.parametrize("name", ["half", "stored", "autocast-ddp", "autocast-fsdp"])
def test_half_precision_follows_full_precision(both: Path, name: str) -> None:
    seen = found(both, name)
    assert moved(seen)
    wanted = alone(2, dtype=torch.bfloat16)[1] if name == "stored" else alone(2)[1]
    losses = {k: t for k, t in seen.items() if k.endswith("loss")}
    bound = 4 * TOLERANCES[torch.bfloat16]
    assert_alike(losses, {k: wanted[k] for k in losses}, bound)


def test_a_policy_in_half_precision_rounds_adapters_that_are_sharded(both: Path) -> None:
    said = facts(both)
    assert said["sharded dtype"] == "torch.bfloat16"
    assert said["replicated dtype"] == said["stored dtype"] == "torch.float32"


@pytest.mark.parametrize("name", ["fsdp-adapter-0", "fsdp-adapter-1", "accelerate-fsdp-adapter"])
def test_what_is_saved_is_the_whole_adapter(both: Path, name: str) -> None:
    saved = load_file(both / name / "adapter_model.safetensors")
    own = name.startswith("fsdp")
    seen = found(both, "fsdp" if own else "accelerate-fsdp-resumed")
    last = max(k.split()[0] for k in seen)
    assert_alike(saved, {k: seen[f"{last} {k}"] for k in saved}, 0)
    model = PeftModel.from_pretrained(llama(), both / name)
    assert adapter_of(model).keys() == saved.keys()


def test_merging_from_shards(both: Path) -> None:
    said = facts(both)
    for refused in (said["merge"], said["unload"]):
        assert "model.layers.0.self_attn.q_proj: its weight lies on several processes" in refused
    merged, model = llama(), road(llama())
    last = {k[2:]: t for k, t in found(both, "fsdp-after").items() if k.startswith("1 base")}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(last[key.removesuffix(".default")])
    merged.load_state_dict(load_file(both / "fsdp-merged-0-0.safetensors"))
    assert load_file(both / "fsdp-merged-1-1.safetensors") == {}
    with torch.no_grad():
        assert_alike(found(both, "fsdp-unmerged"), {"logits": model(input_ids=IDS).logits})
    wanted = model.merge_and_unload()
    assert_alike(dict(merged.named_parameters()), dict(wanted.named_parameters()))


def test_one_process_has_everything_at_hand() -> None:
    model = road(llama())
    assert "no process group" in message(lambda: replicate_adapters(model))
    merged = merged_state_dict(model)
    plain = llama()
    plain.load_state_dict(merged)
    assert_alike(dict(plain.state_dict()), dict(model.merge_and_unload().state_dict()))
    assert torch.equal(whole(IDS), IDS)
