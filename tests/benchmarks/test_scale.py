"""The cost model: its formulas against the bytes that two processes hold and send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from apiq_peft import ApiQConfig
from apiq_peft.packed import PackedLinear
from benchmarks import scale
from benchmarks._scale import ENGINES, FULL, HALF, SCALE, Method, Shape, packed_bits, tp_sent
from road_peft import RoadConfig
from tests.distributed._two import IDS, facts, llama, mine, say, start, trained
from tests.road_peft._models import VOCABULARY

SHAPE = Shape("tiny", hidden=16, kv=16, intermediate=32, blocks=2, vocabulary=VOCABULARY)
# packed rows and groups are of 32
WIDE = Shape("wide", hidden=64, kv=64, intermediate=128, blocks=2, vocabulary=VOCABULARY)
PACKED = Method("apiq", rank=2, bits=packed_bits(2, 32), whole_bits=SCALE / 32)
METHODS = (Method("full"), Method("lora", rank=2), Method("road", per_pair=1), PACKED)
GATHERED = {"_allgather_base_": 0, "_reduce_scatter_base_": 1}  # the place of the large tensor
QUIET = ("wait_tensor", "broadcast_", "_wrap_tensor_autograd")


class Sent(TorchDispatchMode):
    """Adds up what a ring sends for each collective that is called, of two processes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again with the tensors inside
        space, _, name = func._schema.name.partition("::")
        if "c10d" in space and name not in QUIET:
            self.total += self._bytes(name, args)
        return func(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> float:
        if name == "allreduce_":
            return float(sum(t.nbytes for t in args[0]))  # 2 (n - 1) / n is 1
        if name in ("all_reduce", "all_reduce_"):
            return float(args[0].nbytes)
        if name in GATHERED:
            return args[GATHERED[name]].nbytes / 2
        if name == "all_gather_into_tensor":
            return float(args[0].nbytes)  # of one process: half of the result
        raise AssertionError(f"the cost model does not know {name}")


def base(method: Method) -> Any:
    dtype = torch.float32 if method.full else torch.bfloat16
    shape = shape_of(method)
    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate}
    return llama(dtype, attention_bias=False, mlp_bias=False, **sizes)


def shape_of(method: Method) -> Shape:
    return WIDE if method.packed else SHAPE


def adapted(model: Any, method: Method) -> Any:
    if method.full:
        return model
    linears = [f"{name}_proj" for name, _, _ in SHAPE.linears()]
    if method.packed:
        return get_peft_model(model, ApiQConfig(bits=2, group_size=32, r=2, target_modules=linears))
    if method.rank:
        return get_peft_model(model, LoraConfig(r=method.rank, target_modules=linears))
    return get_peft_model(model, RoadConfig(group_size=4, target_modules=linears))


def local(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def counted(model: Any, bare: nn.Module, rows: torch.Tensor) -> list[float]:
    """Give the bytes of weights, of gradients and moments, and those sent in a step."""
    optimizer = torch.optim.Adam(trained(model), foreach=False)
    with Sent() as sent:
        # an engine may prepare in its first step; the second is like all others
        for step in range(2):
            sent.total = 0 if step else sent.total
            model(input_ids=rows, labels=rows).loss.backward()
            if step == 0:
                optimizer.zero_grad()
    gradients = local(p.grad for p in trained(model))
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    return [local(bare.state_dict().values()), gradients + local(moments), sent.total]


def ours(rank: int, out: Path) -> None:
    said: dict[str, Any] = {}
    for method in METHODS:
        model = adapted(base(method), method)
        said[f"{method.name} DDP"] = counted(DistributedDataParallel(model), model, IDS[mine(rank)])
        model = adapted(base(method), method)
        for block in (model if method.full else model.get_base_model()).model.layers:
            fully_shard(block)
        fully_shard(model)
        said[f"{method.name} FSDP2"] = counted(model, model, IDS[mine(rank)])
        if method.rank:
            continue
        whole = LlamaForCausalLM.from_pretrained(
            out / method.name, distributed_config=DistributedConfig(tp_size=2)
        )
        model = adapted(whole, method)
        said[f"{method.name} TP"] = counted(model, model, IDS)
    say(out, rank, said)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scale")
    for method in METHODS:
        base(method).save_pretrained(out / method.name)
    start(ours, out)
    return out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_formulas_say_what_two_processes_hold_and_send(
    both: Path, method: Method, engine: str
) -> None:
    if engine == "TP" and method.rank:
        pytest.skip(
            "packed layers are not split; PEFT's LoRA has wrong in_features in row-parallel layers"
        )
    weights, gradients, sent = facts(both)[f"{method.name} {engine}"]
    tokens = IDS.numel() // (1 if engine == "TP" else 2)
    step = ENGINES[engine](shape_of(method), method, 2, tokens)
    assert (weights, gradients) == (step.weights, step.trained)
    if engine == "TP":
        wanted = tp_sent(SHAPE, method, 2, tokens, width=FULL if method.full else HALF)
    else:
        wanted = step.sent
    assert sent == wanted


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_layers_store_what_the_formula_says(bits: int) -> None:
    assert PackedLinear(128, 64, bits, 64).bits_per_weight == packed_bits(bits)


def test_the_command_prints_a_table_and_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(["--devices", "8", "--tokens", "4096"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert {r["engine"] for r in rows} == set(ENGINES)
    full = next(r for r in rows if (r["model"], r["method"], r["engine"]) == ("8B", "full", "DDP"))
    assert full["weights"] == 4 * 8030261248  # the published number of weights
    with pytest.raises(SystemExit):
        scale.main(["--devices", "0"])
