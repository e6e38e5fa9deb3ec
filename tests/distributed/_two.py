"""Two processes for a test file, the model they train, and what one process finds."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist

from road_peft import RoadConfig
from road_peft.shards import whole
from tests.helpers import TOLERANCES
from tests.road_peft._models import VOCABULARY, randomize, tiny

COUNT, STEPS = 2, 3
# Sums over two halves of a batch round in another order than over all of it, in every step anew.
STEPPED = 20 * TOLERANCES[torch.float32]
IDS = torch.arange(4 * 6).view(4, 6) * 7 % VOCABULARY

Worker = Callable[[int, Path], None]


def start(worker: Worker, out: Path) -> None:
    """Run `worker(rank, out)` on two processes of one gloo group; fail if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # which imports the libraries once
    context.set_forkserver_preload([__name__, worker.__module__])
    started = [context.Process(target=_one, args=(r, port, worker, out)) for r in range(COUNT)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(timeout=300)
    finally:
        for process in started:
            process.kill()
    failures = "".join(path.read_text() for path in sorted(out.glob("failure-*.txt")))
    assert [process.exitcode for process in started] == [0] * COUNT, failures


def _one(rank: int, port: int, worker: Worker, out: Path) -> None:
    os.environ |= {  # as a launcher sets them
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(COUNT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        worker(rank, out)
        dist.barrier()  # the store lives in the first process, and the other may still need it
    except BaseException:
        (out / f"failure-{rank}.txt").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """Build a small Llama with biases everywhere, which two processes can share by heads."""
    torch.manual_seed(0)
    settings = {
        **{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        **{"intermediate_size": 32, "num_key_value_heads": 2, **settings},
    }
    return tiny("llama", dtype=dtype, **settings)


def road(base: nn.Module, **settings: Any) -> Any:
    """Give `base` a random RoAd adapter on every linear layer of its blocks."""
    config = RoadConfig(**{"group_size": 4, "variant": "road_2", **settings}, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return randomize(get_peft_model(base, config))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    # the large eps keeps a gradient of rounding errors from becoming a step of its sign
    return torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0, eps=1e-3)


def adapter_of(model: Any) -> dict[str, Tensor]:
    """Give a copy of the adapter, gathered from all processes."""
    return {k: whole(t).detach().clone() for k, t in get_peft_model_state_dict(model).items()}


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    share: slice = slice(None),
    *,
    steps: int = STEPS,
    backward: Callable[[Tensor], None] = Tensor.backward,
    adapted: Any = None,
    clip: Callable[[Any], Any] | None = None,
) -> dict[str, Tensor]:
    """Train on the rows `share` of the batch; give loss and adapter after every step."""
    seen: dict[str, Tensor] = {}
    for step in range(steps):
        rows = IDS.roll(step, 0)[share]
        loss = model(input_ids=rows, labels=rows).loss
        backward(loss)
        if clip is not None:
            clip(model)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().float().clone()
        if share != slice(None):
            dist.all_reduce(mean)
            mean /= COUNT
        seen[f"{step} loss"] = mean
        values = adapter_of(model if adapted is None else adapted)
        seen |= {f"{step} {k}": t for k, t in values.items()}
    return seen


def mine(rank: int) -> slice:
    """Give the rows of the batch that a process takes."""
    return slice(rank, None, COUNT)


def keep(out: Path, name: str, rank: int, tensors: dict[str, Tensor]) -> None:
    save_file({k: t.contiguous() for k, t in tensors.items()}, out / f"{name}-{rank}.safetensors")


def say(out: Path, rank: int, facts: dict[str, Any]) -> None:
    (out / f"facts-{rank}.json").write_text(json.dumps(facts))


def facts(out: Path) -> dict[str, Any]:
    """Give what the processes said, which must be the same."""
    first, second = (json.loads((out / f"facts-{rank}.json").read_text()) for rank in range(COUNT))
    assert first == second
    return first


def message(action: Callable[[], Any]) -> str:
    """Give the message of the ValueError that `action` must raise."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def found(out: Path, name: str) -> dict[str, Tensor]:
    """Give what the processes kept under `name`, which must be the same bit for bit."""
    first, second = (load_file(out / f"{name}-{rank}.safetensors") for rank in range(COUNT))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[k]) for k, tensor in first.items())
    return first


def assert_alike(
    actual: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = STEPPED
) -> None:
    """Compare tensor by tensor, relative to the largest value of each."""
    assert actual.keys() == wanted.keys()
    for key, reference in wanted.items():
        error = (actual[key].double() - reference.double()).abs().max()
        limit = bound * reference.double().abs().max()
        assert error <= limit, f"{key} is off by {error:.3g}; {limit:.3g} is allowed"


def moved(seen: dict[str, Tensor]) -> bool:
    """Tell whether every adapter tensor was trained between the first step and the last."""
    names = [k.removeprefix("0 ") for k in seen if k.startswith("0 base_model")]
    last = max(int(k.split()[0]) for k in seen)
    return bool(names) and all(
        not torch.equal(seen[f"0 {name}"], seen[f"{last} {name}"]) for name in names
    )
