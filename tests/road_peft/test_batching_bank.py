"""Requests that come and go, on a bank whose adapters come and go.

The model waits before each step until the test lets it, so that every test knows what has happened
when it acts.

| property                                        | oracle                                         |
|-------------------------------------------------|------------------------------------------------|
| tokens of a request, whatever happens meanwhile | the prompt alone, with the version of its start|
| leases                                          | how many a slot has, at each moment            |
| deliveries                                      | one token more each; none once cancelled       |
| ends: finished, stopped, died                   | outputs, errors, leases, what is refused       |
"""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from road_peft import AdapterBatching, BankFullError, RoadBank, UnknownAdapterError
from tests.road_peft._banks import (
    in_threads,
    no_lease,
    prompts,
    sources_of,
)
from tests.road_peft._models import VOCABULARY, call_silently, randomize, tiny
from tests.road_peft._rows import BASE
from tests.road_peft._served import GREEDY, LENGTH, PATIENCE, SMALL, Served, results, tokens_of

if not hasattr(ContinuousBatchingConfig, "page_size"):
    pytest.skip("needs a newer transformers", allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """Spare what exists already from the collections of garbage at the end of each generation."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.steps.open()
    assert no_lease(served.bank)
    assert served.bank.routing.current is None


# ---- coming and going -------------------------------------------------------------------------


def test_requests_join_while_others_run(served: Served) -> None:
    p, q, r = prompts(3)
    with served.batching() as batching:
        first = batching.add_request(p, "a")
        served.steps.take(2)
        second = batching.add_request(q, "b")
        third = batching.add_request(r, None, max_new_tokens=2)
        served.steps.take(1)
        assert (served.uses("a"), served.uses("b")) == (1, 1)
        fourth = batching.add_request(p, "__base__")
        fifth = batching.add_request(p, "a", request_id="mine")
        assert served.uses("a") == 2
        served.steps.open()
        got = tokens_of(results(batching, 5))
        assert no_lease(served.bank)
    assert got == {
        first: served.wanted(p, "a"),
        second: served.wanted(q, "b"),
        third: served.wanted(r, BASE, 2),
        fourth: served.wanted(p, BASE),
        fifth: served.wanted(p, "a"),
    }
    assert fifth == "mine"


def test_a_request_keeps_the_version_that_it_started_with(served: Served) -> None:
    p = prompts(1)[0]
    wanted = {"old": served.wanted(p, "a"), "other": served.wanted(p, "b")}
    randomize(served.loaded, "a", spread=0.8)
    wanted["new"] = served.wanted(p, "a")
    assert wanted["new"] != wanted["old"]
    source = sources_of(served.loaded, "a")["a"]
    with served.batching() as batching:
        batching.add_request(p, "a", request_id="old")
        served.steps.take(2)
        served.bank.replace("a", source)
        batching.add_request(p, "a", request_id="new")
        served.steps.take(1)
        served.bank.remove("a")
        with pytest.raises(UnknownAdapterError):
            batching.add_request(p, "a")
        batching.add_request(p, "b", request_id="other")
        assert served.bank.memory().slots_used == 3
        with pytest.raises(BankFullError):
            batching.add_request(p, "c")
        served.steps.open()
        assert tokens_of(results(batching, 3)) == wanted
    assert served.bank.memory().slots_used == 1


def test_adapters_are_evicted_and_come_back_between_requests() -> None:
    served, p = Served(slots=1), prompts(1)[0]
    served.steps.open()
    with served.batching() as batching:
        for name in ("a", "b", "c", "a", BASE, "f"):
            request = batching.add_request(p, name)
            assert tokens_of(results(batching, 1)) == {request: served.wanted(p, name)}
    assert served.bank.memory().evictions == 4


def test_a_full_bank_refuses_or_waits(served: Served) -> None:
    p = prompts(1)[0]
    for name in ("b", "c"):
        served.bank.pin(name)
    with served.batching() as batching:
        batching.add_request(p, "a")
        with pytest.raises(BankFullError):
            batching.add_request(p, "f")
        got: dict[str, Any] = {}
        reader = threading.Thread(target=lambda: got.update(results(batching, 2)))
        reader.start()
        served.steps.open()
        second = batching.add_request(p, "f", timeout=PATIENCE)
        reader.join(PATIENCE)
    assert got[second].generated_tokens == served.wanted(p, "f")


def test_requests_from_many_threads(served: Served) -> None:
    served.steps.open()
    inputs = prompts(4)
    names = ["a", "b", BASE, "c"]
    wanted = [[served.wanted(p, n) for n in names] for p in inputs]
    asked: dict[str, list[int]] = {}
    with served.batching({"max_batch_tokens": 12, "num_blocks": 8}) as batching:

        def ask(i: int) -> None:
            for j in range(4):
                asked[batching.add_request(inputs[i], names[j], timeout=PATIENCE)] = wanted[i][j]

        in_threads(*(lambda i=i: ask(i) for i in range(4)))
        assert tokens_of(results(batching, 16)) == asked


# ---- deliveries -------------------------------------------------------------------------------


def test_streamed_outputs_grow_token_by_token(served: Served) -> None:
    p, q = prompts(2)
    served.steps.open()
    with served.batching() as batching:
        streamed = batching.add_request(p, "a", streaming=True)
        whole = batching.add_request(q, "b")
        outputs: list[Any] = []
        while sum(output.is_finished() for output in outputs) < 2:
            outputs.append(batching.get_result(timeout=PATIENCE))
    mine = [output.generated_tokens for output in outputs if output.request_id == streamed]
    tokens = served.wanted(p, "a")
    assert mine == [tokens[: i + 1] for i in range(LENGTH)]
    assert [o.generated_tokens for o in outputs if o.request_id == whole] == [served.wanted(q, "b")]


def test_outputs_are_handed_to_functions_in_the_event_loop(served: Served) -> None:
    inputs = prompts(3)
    names = ["a", "c", BASE]
    served.steps.open()

    async def main(batching: AdapterBatching) -> list[list[list[int]]]:
        loop = asyncio.get_running_loop()
        finished = [loop.create_future() for _ in names]
        seen: list[list[list[int]]] = [[] for _ in names]

        def receive(i: int) -> Callable[[Any], None]:
            def on_output(output: Any) -> None:
                assert asyncio.get_running_loop() is loop
                seen[i].append(output.generated_tokens)
                if output.is_finished():
                    finished[i].set_result(None)

            return on_output

        for i, name in enumerate(names):
            batching.add_request(inputs[i], name, streaming=i < 2, on_output=receive(i))
        await asyncio.wait_for(asyncio.gather(*finished), PATIENCE)
        assert batching.get_result(timeout=0) is None
        assert no_lease(served.bank)
        return seen

    with served.batching() as batching:
        seen = asyncio.run(main(batching))
        assert batching.manager.output_router.result_handlers == {}
    for i, name in enumerate(names):
        tokens = served.wanted(inputs[i], name)
        assert seen[i] == ([tokens[: n + 1] for n in range(LENGTH)] if i < 2 else [tokens])


def test_all_sequences_of_a_request_are_handed_to_its_function(served: Served) -> None:
    served.steps.open()

    async def main(batching: AdapterBatching) -> set[str]:
        done: asyncio.Queue[str] = asyncio.Queue()
        batching.add_request(
            prompts(1)[0], "a", request_id="x", on_output=lambda o: done.put_nowait(o.request_id)
        )
        return {await asyncio.wait_for(done.get(), PATIENCE) for _ in range(3)}

    with served.batching(do_sample=True, num_return_sequences=3) as batching:
        assert asyncio.run(main(batching)) == {"x", "x__child#0", "x__child#1"}
        assert no_lease(served.bank)
        assert batching.get_result(timeout=0) is None


# ---- cancelling -------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_cancelled_request_delivers_nothing_more(served: Served, sequences: int) -> None:
    p, q = prompts(2)
    settings = {"num_return_sequences": sequences, "do_sample": sequences > 1}
    with served.batching(max_new_tokens=20, **settings) as batching:
        cancelled = batching.add_request(p, "a", streaming=True)
        batching.add_request(q, "b", max_new_tokens=6)
        served.steps.take(4)  # outputs lie there already
        assert served.uses("a") == 1
        batching.cancel_request(cancelled)
        assert (served.uses("a"), served.uses("b")) == (0, 1)
        served.steps.take(1)  # the step that was laid out before
        laid_out = batching.manager.batch_processor.inputs_and_outputs.requests_in_batch
        assert len(laid_out) == sequences  # those of the other request
        served.steps.open()
        outputs = [batching.get_result(timeout=PATIENCE) for _ in range(sequences)]
        assert not any(output.request_id.startswith(cancelled) for output in outputs)
        assert batching.get_result(timeout=0.05) is None
    if sequences == 1:
        assert outputs[0].generated_tokens == served.wanted(q, "b", 6)


def test_a_request_that_waits_can_be_cancelled(served: Served) -> None:
    p, q = prompts(2)
    with served.batching({"max_requests_per_batch": 1, "max_batch_tokens": 8}) as batching:
        first = batching.add_request(p, "a")
        waiting = batching.add_request(q, "b")
        served.steps.take(1)
        batching.cancel_request(waiting)
        batching.cancel_request(waiting)
        batching.cancel_request("never asked")
        assert served.uses("b") == 0
        served.steps.open()
        assert tokens_of(results(batching, 1)) == {first: served.wanted(p, "a")}
        assert batching.get_result(timeout=0.05) is None


def test_cancelling_in_the_event_loop(served: Served) -> None:
    async def main(batching: AdapterBatching) -> list[int]:
        seen: list[int] = []
        enough = asyncio.get_running_loop().create_future()

        def on_output(output: Any) -> None:
            seen.append(len(output.generated_tokens))
            if len(seen) == 2:
                batching.cancel_request(output.request_id)
                enough.set_result(None)

        batching.add_request(prompts(1)[0], "a", streaming=True, on_output=on_output)
        served.steps.open()
        await asyncio.wait_for(enough, PATIENCE)
        await asyncio.sleep(0.1)
        return seen

    with served.batching(max_new_tokens=40) as batching:
        assert asyncio.run(main(batching)) == [1, 2]
        assert no_lease(served.bank)
        assert batching.manager.output_router.result_handlers == {}
        assert batching.get_result(timeout=0) is None


def test_what_the_event_loop_has_not_handed_over_yet_is_dropped(served: Served) -> None:
    async def main(batching: AdapterBatching) -> list[Any]:
        seen: list[Any] = []
        name = batching.add_request(prompts(1)[0], "a", streaming=True, on_output=seen.append)
        served.steps.take(3)  # the loop is held up here, and its calls pile up
        batching.cancel_request(name)
        served.steps.open()
        await asyncio.sleep(0.05)
        return seen

    with served.batching() as batching:
        assert asyncio.run(main(batching)) == []
        assert batching.get_result(timeout=0) is None


# ---- ends -------------------------------------------------------------------------------------


def test_stop_finishes_what_was_asked(served: Served) -> None:
    p, q = prompts(2)
    batching = served.batching()
    batching.start()
    first, second = batching.add_request(p, "a"), batching.add_request(q, "b")
    served.steps.open()
    batching.stop()
    assert no_lease(served.bank)
    assert tokens_of(results(batching, 2)) == {
        first: served.wanted(p, "a"),
        second: served.wanted(q, "b"),
    }
    assert batching.get_result(timeout=0) is None
    with pytest.raises(RuntimeError, match="generation has ended and takes no requests"):
        batching.add_request(p, "a")


@pytest.mark.parametrize("how", [{"finish": False}, {"finish": True, "timeout": 0.01}], ids=str)
def test_stop_at_once_fails_what_is_left(served: Served, how: dict[str, Any]) -> None:
    batching = served.batching({"max_requests_per_batch": 1}, max_new_tokens=50)
    batching.start()
    for name in ("a", "b"):
        batching.add_request(prompts(1)[0], name)
    served.steps.take(1)
    timer = threading.Timer(0.1, served.steps.open)
    timer.start()
    batching.stop(**how)
    timer.join()
    assert no_lease(served.bank)
    assert not batching.manager.is_running()
    assert all(output.error for output in results(batching, 2).values())


def test_an_exception_in_the_body_stops_at_once(served: Served) -> None:
    served.steps.open()
    batching = served.batching(max_new_tokens=50)
    with pytest.raises(UnknownAdapterError, match="nobody"), batching:
        batching.add_request(prompts(1)[0], "nobody")
    assert not batching.manager.is_running()


def test_when_generation_dies_requests_fail_and_new_ones_are_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("on purpose")

    p = prompts(1)[0]
    with served.batching({"max_requests_per_batch": 1}) as batching:
        names = {batching.add_request(p, name) for name in ("a", "b")}
        served.steps.take(1)
        monkeypatch.setattr(served.bank.model.model, "forward", fail)
        served.steps.open()
        got = results(batching, 2)
        assert got.keys() == names
        assert {output.error for output in got.values()} == {"on purpose"}
        assert no_lease(served.bank)
        batching.manager._generation_thread.join(PATIENCE)
        with pytest.raises(RuntimeError, match="takes no requests: on purpose"):
            batching.add_request(p, "a")
        assert str(batching.error) == "on purpose"
        assert batching.get_result(timeout=0) is None
    monkeypatch.undo()
    with served.batching() as batching:
        assert batching.error is None
        batching.add_request(p, "a")
        assert list(tokens_of(results(batching, 1)).values()) == [served.wanted(p, "a")]


# ---- refusals ---------------------------------------------------------------------------------


def test_requests_that_are_refused_hold_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = prompts(1)[0]
    with served.batching() as batching:
        batching.add_request(p, "a", request_id="x")
        for name in ("x", "y__child#0"):
            with pytest.raises(ValueError, match=f"there is a request '{name}' already"):
                batching.add_request(p, "b", request_id=name)
        with pytest.raises(UnknownAdapterError, match="no adapter 'nobody'"):
            batching.add_request(p, "nobody")
        with pytest.raises(ValueError, match="the prompt has 0 tokens"):
            batching.add_request([], "b")
        with pytest.raises(RuntimeError, match="event loop"):
            batching.add_request(p, "b", on_output=print)
        with monkeypatch.context() as patch:
            full = queue.Full()

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise full

            patch.setattr(batching.manager.input_queue, "put", refuse)
            with pytest.raises(RuntimeError, match="queue of requests is full"):
                batching.add_request(p, "b")
        assert (served.uses("a"), served.uses("b")) == (1, 0)
        assert batching.manager.output_router.result_handlers == {}
        served.steps.open()
        assert results(batching, 1).keys() == {"x"}
        batching.add_request(p, "b", request_id="x")  # the name is free again
        assert tokens_of(results(batching, 1)) == {"x": served.wanted(p, "b")}


def test_an_option_that_transformers_refuses_fails_that_request_alone(served: Served) -> None:
    p = prompts(1)[0]
    with served.batching({"per_request_processors": True}) as batching:
        bad = batching.add_request(p, "a", no_such_option=3)
        good = batching.add_request(p, "b")
        served.steps.open()
        got = results(batching, 2)
        assert "no_such_option" in got[bad].error
        assert got[good].generated_tokens == served.wanted(p, "b")


def test_names_that_were_given_are_not_given_again(served: Served) -> None:
    served.steps.open()
    with served.batching() as batching:
        batching.add_request([3], request_id="request-0")
        assert batching.add_request([3]) == "request-1"
        results(batching, 2)


def test_a_bank_without_adapters_serves_the_base() -> None:
    base = tiny("llama", dtype=torch.float64)
    p = prompts(1)[0]
    config = GenerationConfig(**GREEDY, eos_token_id=VOCABULARY)
    wanted = call_silently(base.generate, torch.tensor([p]), generation_config=config)
    bank = RoadBank(base, 1)
    with AdapterBatching(bank, config, ContinuousBatchingConfig(**SMALL)) as batching:
        batching.add_request(p)
        assert list(tokens_of(results(batching, 1)).values()) == [wanted[0, len(p) :].tolist()]
