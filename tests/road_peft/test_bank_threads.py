"""One bank, many threads: every batch sees whole versions of its adapters.

The model tells by its outputs which version each layer applied: a version that scales by k gives
rows of k in all layers, and `heard` checks that all layers of a row agree.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from road_peft import BankFullError, UnknownAdapterError
from tests.road_peft._banks import (
    bank_of,
    configs_of,
    heard,
    in_threads,
    loaded,
    loud_bank,
    no_lease,
    saved,
    scaling,
    sources_of,
)
from tests.road_peft._models import no_hooks, tiny
from tests.road_peft._rows import BASE, tokens_for_rows

SECONDS = 1.0  # how long a mixture of threads runs


def _while_running(*functions: Callable[[random.Random], None]) -> None:
    """Call every function over and over in a thread of its own, for a while."""
    end = time.monotonic() + SECONDS

    def loop(seed: int, function: Callable[[random.Random], None]) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            function(chance)

    in_threads(
        *(lambda s=seed, f=function: loop(s, f) for seed, function in enumerate(functions)),
    )


def test_rows_see_one_whole_version_while_adapters_come_and_go() -> None:
    """Adapter i has versions 2 i and 2 i + 1; some are always there, others come and go."""
    count, slots = 8, 4
    bank = loud_bank(slots)
    for i in range(1, count + 1):
        bank.add(f"n{i}", scaling(2 * i))
    served, refused = itertools.count(), itertools.count()

    def serve(chance: random.Random) -> None:
        numbers = [chance.randint(1, count) for _ in range(chance.randint(1, 2))]
        try:
            got = heard(bank, *(f"n{n}" for n in numbers), None, timeout=5)
        except UnknownAdapterError:
            next(refused)
            return
        assert got[-1] == 1
        versions: dict[int, float] = {}
        for number, scale in zip(numbers, got, strict=False):
            assert scale in (2 * number, 2 * number + 1)
            assert versions.setdefault(number, scale) == scale  # one version in a batch
        next(served)

    def replace(chance: random.Random) -> None:
        number = chance.randint(1, count // 2)
        bank.replace(f"n{number}", scaling(2 * number + chance.randint(0, 1)))

    def come_and_go(chance: random.Random) -> None:
        number = chance.randint(count // 2 + 1, count)
        bank.remove(f"n{number}")
        bank.add(f"n{number}", scaling(2 * number + chance.randint(0, 1)))

    def pin(chance: random.Random) -> None:
        name = f"n{chance.randint(1, count // 2)}"
        try:
            bank.pin(name)
        except BankFullError:
            return
        bank.unpin(name)

    def look(chance: random.Random) -> None:
        memory = bank.memory()
        assert 0 <= memory.slots_used <= slots
        assert memory.registered in (count - 1, count)
        assert memory.host_bytes == memory.host_adapters * 3 * 2 * 2 * 4
        assert len(bank.names) in (count - 1, count)

    _while_running(serve, serve, serve, serve, replace, come_and_go, pin, look)
    assert next(served) > 5
    assert no_lease(bank)
    assert no_hooks(bank.model)
    assert bank.memory().slots_pinned == 0
    for i in range(1, count + 1):
        bank.replace(f"n{i}", scaling(2 * i))
        assert heard(bank, f"n{i}") == [2 * i]


def test_rows_of_a_language_model_in_many_threads() -> None:
    base = tiny("llama")
    names = ("a", "b", "c", "f")
    model = loaded(base, configs_of(names))
    bank = bank_of(base, sources_of(model), slots=2)
    tokens = tokens_for_rows(3)
    with torch.no_grad():
        wanted = {n: model(tokens, adapter_names=[n] * 3).logits for n in (*names, BASE)}

    def serve(chance: random.Random) -> None:
        two = chance.sample(names, 2)
        rows = [chance.choice((*two, BASE)) for _ in range(3)]
        with torch.no_grad(), bank.rows(rows, timeout=20):
            got = base(tokens).logits
        for i, name in enumerate(rows):
            assert torch.equal(got[i], wanted[name][i])

    def serve_the_base(chance: random.Random) -> None:
        with torch.no_grad():
            assert torch.equal(base(tokens).logits, wanted[BASE])

    _while_running(serve, serve, serve, serve_the_base)
    assert no_lease(bank)
    assert no_hooks(base)
    assert bank.memory().evictions > 2


def test_an_adapter_that_many_threads_want_is_read_once(tmp_path: Path) -> None:
    base = tiny("llama")
    saved(loaded(base, configs_of("abc")), tmp_path)
    bank = bank_of(base, {}, slots=3)
    assert bank.add_folder(tmp_path) == ["a", "b", "c"]
    barrier = threading.Barrier(6)

    def want(name: str) -> None:
        barrier.wait()
        with bank.acquire(name):
            pass

    in_threads(*(lambda n=name: want(n) for name in "abcabc"))
    memory = bank.memory()
    assert (memory.reads, memory.loads, memory.slots_used) == (3, 3, 3)


def test_a_small_memory_of_the_host_does_not_stop_batches_of_two(tmp_path: Path) -> None:
    """What one thread has read may be dropped for another before it reaches a slot."""
    base = tiny("llama")
    saved(loaded(base, configs_of("abcf")), tmp_path)
    bank = bank_of(base, {}, slots=2, host_bytes=1)
    bank.add_folder(tmp_path)

    def want(*names: str) -> None:
        for _ in range(5):
            with bank.rows(list(names), timeout=30):
                pass

    in_threads(lambda: want("a", "b"), lambda: want("c", "f"), lambda: want("b", "c"))
    assert bank.memory().host_bytes == 0
    assert no_lease(bank)


def test_a_file_that_cannot_be_read_stops_no_other_thread(tmp_path: Path) -> None:
    base = tiny("llama")
    saved(loaded(base, configs_of("ab")), tmp_path)
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"")
    bank = bank_of(base, {}, slots=1)
    bank.add_folder(tmp_path)
    failed = itertools.count()

    def want(name: str) -> None:
        if name == "a":
            bank.acquire(name, timeout=30).release()
            return
        with pytest.raises(ValueError, match="no readable"):
            bank.acquire(name, timeout=30)
        next(failed)

    in_threads(*(lambda n=name: [want(n) for _ in range(5)] for name in "abbab"))
    assert next(failed) == 15
    assert no_lease(bank)


def test_one_adapter_is_replaced_by_many_threads_at_once() -> None:
    bank = loud_bank(2, count=1)
    in_threads(*(lambda k=k: bank.replace("n1", scaling(k)) for k in range(2, 10)))
    assert heard(bank, "n1")[0] in range(2, 10)
    assert (len(bank), bank.memory().host_adapters) == (1, 1)


def test_one_name_is_added_by_many_threads_at_once() -> None:
    bank, added = loud_bank(2), []

    def add(scale: int) -> None:
        with contextlib.suppress(ValueError):
            bank.add("x", scaling(scale))
            added.append(scale)

    in_threads(*(lambda k=k: add(k) for k in range(2, 10)))
    assert len(added) == 1
    assert heard(bank, "x") == added


def test_a_route_belongs_to_its_thread() -> None:
    bank = loud_bank(2, count=2)
    with bank.rows(["n1"]):
        in_threads(lambda: _equal(heard(bank, "n2", None), [3, 1]))
        in_threads(lambda: _equal(bank.model(torch.ones(2, 4))[:, 0, 0].tolist(), [1, 1]))
        assert bank.model(torch.ones(1, 4))[0, 0, 0] == 2


def _equal(got: object, wanted: object) -> None:
    assert got == wanted


@pytest.mark.parametrize("where", ["model", "missing adapter"])
def test_an_exception_inside_rows_gives_everything_back(where: str) -> None:
    bank = loud_bank(2, count=2)
    names = ["n1", "n2", "missing"] if where == "missing adapter" else ["n1", "n2"]
    with pytest.raises((UnknownAdapterError, RuntimeError)), bank.rows(names):
        raise RuntimeError("inside")
    assert no_lease(bank)
    assert no_hooks(bank.model)
    assert bank.routing.current is None
