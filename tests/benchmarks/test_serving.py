"""Providers of the serving benchmark are right, workloads are as their names say."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks._cases import BF16, FP32, SERVE, TOLERANCE
from benchmarks._decoding import Context, Session
from benchmarks._models import language_model
from benchmarks._providers import BASE, OURS, STOCK
from benchmarks._serving import BMM, GROUPED, SERVED, SINGLE, active_lora, bmm_lora, serving_error
from benchmarks._workloads import WORKLOADS, names_of_rows

CASE = SERVE["tiny"][0]
NAMES = ["a0", "a1", "a2", "a3"]
MIXING = [name for name, served in SERVED.items() if served.mixed]
EVERY = {**SINGLE, **SERVED, "lora active": active_lora(2), "bmm lora": bmm_lora(2)}


def _base(dtype: torch.dtype = FP32) -> Any:
    return language_model(CASE, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", list(EVERY))
def test_every_provider_serves_what_each_row_gets_alone(name: str, dtype: torch.dtype) -> None:
    base = _base(dtype)
    served = EVERY[name]
    server = served.build(base, NAMES)
    names = NAMES if served.mixed else NAMES[:1]
    assert serving_error(base, server, names) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", MIXING)
def test_rows_with_adapters_of_others_are_seen(name: str, dtype: torch.dtype) -> None:
    base = _base(dtype)
    server = SERVED[name].build(base, NAMES)

    @contextmanager
    def shifted(names: Any) -> Any:
        with server.rows([NAMES[(NAMES.index(name) + 1) % len(NAMES)] for name in names]):
            yield

    crossed = replace(server, rows=shifted)
    assert serving_error(base, crossed, NAMES) > TOLERANCE[dtype]


@pytest.mark.parametrize("name", [BMM, GROUPED, OURS])
def test_generation_gives_every_row_its_own_adapter(name: str) -> None:
    base = _base()
    server = SERVED[name].build(base, NAMES)
    rows = ["a2", "a0", "a2", "a1"]
    prompts = torch.randint(1, 256, (4, 5))
    options = {"max_new_tokens": 4, "do_sample": False}
    with server.rows(rows):
        mixed = server.model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    for row, adapter in enumerate(rows):
        ids = prompts[row : row + 1]
        with server.rows([adapter]):
            alone = server.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert mixed[row : row + 1].equal(alone)


def test_servers_share_the_parameters_of_the_base() -> None:
    base = _base()
    own = {p.data_ptr() for p in base.parameters()}
    for name in MIXING:
        shared = {p.data_ptr() for p in SERVED[name].build(base, NAMES).model.parameters()}
        assert own <= shared, name


@pytest.mark.parametrize("name", list(SERVED))
def test_a_step_leaves_the_cache_and_the_model_as_they_were(name: str) -> None:
    base = _base()
    served = SERVED[name]
    server = served.build(base, NAMES)
    context = Context.random(base, 2, 3)
    before = [tensor.clone() for pair in context.past for tensor in pair]
    session = Session(server, NAMES[:2], context)
    hooks = _hooks(server.model)
    session.open()
    session.step()
    assert [layer.get_seq_length() for layer in session._cache.layers] == [3] * CASE.blocks
    session.close()
    assert _hooks(server.model) == hooks
    after = [tensor for pair in context.past for tensor in pair]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_our_operations_do_not_depend_on_the_number_of_adapters() -> None:
    base = _base()
    context = Context.random(base, 4, 3)
    counts = {
        name: [
            Session(server, rows, context).operations()
            for rows in (NAMES[:1] * 4, NAMES[:2] * 2, NAMES)
        ]
        for name in (OURS, STOCK, BASE)
        for server in [SERVED[name].build(base, NAMES)]
    }
    assert len(set(counts[OURS])) == 1
    assert counts[BASE][0] < counts[OURS][0]
    assert counts[STOCK] == sorted(set(counts[STOCK]))


def test_workloads() -> None:
    adapters = [f"a{n}" for n in range(64)]
    drawn = {name: names_of_rows(name, 64, adapters) for name in WORKLOADS}
    assert drawn == {name: names_of_rows(name, 64, adapters) for name in WORKLOADS}
    assert all(len(names) == 64 and set(names) <= set(adapters) for names in drawn.values())
    numbers = {name: len(set(names)) for name, names in drawn.items()}
    assert numbers["distinct"] == 64
    assert numbers["identical"] == 1
    assert 1 < numbers["skewed"] < numbers["uniform"] < 64
    assert Counter(drawn["skewed"]).most_common(1)[0][0] == "a0"
    with pytest.raises(ValueError, match="65 rows cannot have distinct adapters out of 64"):
        names_of_rows("distinct", 65, adapters)


def test_zipf_popularity() -> None:
    counts = Counter(names_of_rows("skewed", 20_000, ["a0", "a1", "a2"]))
    weights = [1, 2**-1.5, 3**-1.5]
    for name, weight in zip(("a0", "a1", "a2"), weights, strict=True):
        assert counts[name] / 20_000 == pytest.approx(weight / sum(weights), abs=0.02)
