"""The server under load: hundreds of clients, few slots, adapters that come, change and go.

Every answer is compared with the one computed beforehand for its adapter, so a row that took a
wrong adapter, or half of one, is noticed. All loops are bounded in number and in time.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.road_peft.serve._server import (
    NEW,
    Running,
    World,
    ask,
    build_world,
    events,
    held,
    running,
    wait_until,
)

CLIENTS = 240
EACH = 3  # requests of a client
SLOTS = 8
STEADY = [f"steady-{i}" for i in range(30)]  # never change
MOVING = [f"moving-{i}" for i in range(6)]  # are replaced
LEAVING = [f"leaving-{i}" for i in range(4)]  # are unloaded and loaded again
KILLED = 40  # clients that hang up in the middle, beside the others
TRIES = 200  # of a request that is told to come again
SECONDS = 50  # for everything

MALFORMED = [
    b"{",
    b'{"model": "steady-1"}',
    b'{"model": "steady-1", "prompt": [99999]}',
    b'{"model": "steady-1", "prompt": "x", "max_tokens": 100000}',
    b'{"model": "steady-1", "prompt": "x", "n": 4}',
    b"\x00" * 50,
    b'{"model": "nobody", "prompt": "x"}',
]


@dataclass
class Load:
    """What is asked, what may be answered, and what came."""

    url: str
    allowed: dict[str, set[str]]  # the texts that an adapter may answer
    random: random.Random = field(default_factory=lambda: random.Random(0))
    answers: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    changes: Counter[str] = field(default_factory=Counter)
    over: bool = False

    def http(self) -> httpx.AsyncClient:
        """Give a client with connections of its own."""
        return httpx.AsyncClient(base_url=self.url, timeout=SECONDS, trust_env=False, verify=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    names = [*STEADY, *MOVING, *LEAVING]
    return build_world(
        tmp_path_factory.mktemp("world"), {name: seed for seed, name in enumerate(names)}
    )


async def _text(http: httpx.AsyncClient, name: str, stream: bool) -> str | int:
    """Give an answer, or the status of a refusal that says to come again."""
    body = ask(name, stream=stream)
    if not stream:
        got = await http.post("/v1/completions", json=body)
        return got.json()["choices"][0]["text"] if got.status_code == 200 else _status(got)
    async with http.stream("POST", "/v1/completions", json=body) as got:
        if got.status_code != 200:
            await got.aread()
            return _status(got)
        pieces = events([line async for line in got.aiter_lines()])
        return "".join(p["choices"][0]["text"] for p in pieces)


def _status(got: httpx.Response) -> int:
    assert got.json()["error"]["message"]
    assert got.status_code in (404, 429, 503), got.text
    return got.status_code


async def _client(load: Load, number: int) -> None:
    async with load.http() as http:
        for turn in range(EACH):
            name = load.random.choice([*STEADY, *MOVING, *LEAVING, "tiny-llama"])
            for _ in range(TRIES):
                got = await _text(http, name, stream=(number + turn) % 2 == 0)
                if isinstance(got, str):
                    break
                load.refused[str(got)] += 1
                await asyncio.sleep(0.05 + load.random.random() * 0.1)
            if got not in load.allowed[name]:
                load.wrong.append((name, str(got)))
            load.answers[name] += 1


async def _killed(load: Load, number: int) -> None:
    """Hang up: before the answer, or after its first bytes."""
    await asyncio.sleep(load.random.random() * 3)
    reader, writer = await asyncio.open_connection(*httpx.URL(load.url).netloc.split(b":"))
    body = json.dumps(ask(load.random.choice(STEADY), stream=number % 2 == 0)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    await writer.drain()
    if number % 4 == 0:
        await asyncio.wait_for(reader.read(10), SECONDS)
    elif number % 4 == 1:
        await asyncio.sleep(0.05)
    writer.transport.abort()


async def _malformed(load: Load) -> None:
    async with load.http() as http:
        for turn in range(1000):
            if load.over:
                return
            got = await http.post(
                "/v1/completions",
                content=MALFORMED[turn % len(MALFORMED)],
                headers={"content-type": "application/json"},
            )
            assert got.status_code in (400, 404, 429), got.text
            load.changes["malformed"] += 1
            await asyncio.sleep(0.02)


async def _changing(load: Load, versions: dict[str, list[Path]]) -> None:
    """Replace some adapters by their other version, and take others away for a while."""
    async with load.http() as http:

        async def post(action: str, **body: object) -> None:
            got = await http.post(f"/v1/{action}", json=body)
            assert got.status_code == 200, (action, body, got.text)
            load.changes[action] += 1

        for turn in range(1000):
            if load.over:
                return
            name = MOVING[turn % len(MOVING)]
            path = versions[name][(turn // len(MOVING) + 1) % 2]
            await post("load_adapter", name=name, path=str(path), replace=True)
            gone = LEAVING[turn % len(LEAVING)]
            await post("unload_adapter", name=gone)
            await asyncio.sleep(0.03)
            await post("load_adapter", name=gone)
            await asyncio.sleep(0.01)


async def _all(load: Load, versions: dict[str, list[Path]]) -> None:
    beside = [asyncio.create_task(_malformed(load)), asyncio.create_task(_changing(load, versions))]
    work = [_client(load, i) for i in range(CLIENTS)] + [_killed(load, i) for i in range(KILLED)]
    try:
        await asyncio.wait_for(asyncio.gather(*work), SECONDS)
    finally:
        load.over = True
    await asyncio.gather(*beside)


def _versions(world: World) -> tuple[dict[str, list[Path]], dict[str, set[str]]]:
    """Write a second version of those that are replaced; give the paths and the right answers."""
    allowed = {name: {world.answer(name)} for name in world.ids}
    versions: dict[str, list[Path]] = {}
    for seed, name in enumerate(MOVING, 1000):
        world.make(f"{name}-b", seed)
        versions[name] = [Path(name), Path(f"{name}-b")]
        allowed[name].add(world.answer(f"{name}-b"))
    return versions, allowed


def test_nothing_is_lost_and_nobody_gets_the_adapter_of_another(world: World) -> None:
    threads = set(threading.enumerate())
    engine = world.engine(slots=SLOTS, max_queue=200, request_timeout=SECONDS)
    for name in MOVING:  # registered by the name of their folder, like the others
        assert name in engine.bank
    versions, allowed = _versions(world)
    texts = [text for some in allowed.values() for text in some]
    assert len(set(texts)) == len(texts) == len(STEADY) + 2 * len(MOVING) + len(LEAVING) + 1

    began = time.monotonic()
    with running(engine) as server:
        load = Load(server.url, allowed)
        asyncio.run(_all(load, versions))
        seconds = time.monotonic() - began
        wait_until(lambda: not engine.jobs, 20)
        account = engine.bank.memory()
        assert held(engine) == 0
        assert not len(engine.slots)
        assert engine.ended is None
        _idle(server)
    print(
        f"\n{CLIENTS} clients, {load.answers.total()} answers in {seconds:.1f} s, {SLOTS} slots,"
        f" {account.registered} adapters, {account.loads} loads, refused {dict(load.refused)},"
        f" beside {dict(load.changes)}, {KILLED} killed"
    )
    assert load.wrong == []
    assert load.answers.total() == CLIENTS * EACH
    assert all(load.answers[name] for name in STEADY)
    assert account.evictions > SLOTS  # slots did change hands
    assert min(load.changes[what] for what in ("malformed", "unload_adapter", "load_adapter")) > 5
    assert server.left == []
    assert [t for t in threading.enumerate() if t not in threads and not t.daemon] == []


def _idle(server: Running) -> None:
    """Check that nothing waits or runs: neither here nor in transformers' own queues."""
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        text = http.get("/metrics").text
        got = http.post("/v1/completions", json=ask("tiny-llama"))
    for line in ("running", "waiting"):
        assert f"road_requests_{line} 0.0" in text
    assert len(got.json()["choices"][0]["text"]) <= 10 * NEW
    manager = server.engine.batching.manager
    wait_until(lambda: not manager.batch_processor.has_pending_requests())
    assert manager.output_router.output_queue.empty()
    assert not manager.output_router.result_handlers
    assert not server.engine.batching._requests


def test_a_slot_is_shared_fairly(world: World) -> None:
    """One popular adapter does not keep the slot from the others for good."""
    engine = world.engine(slots=1, request_timeout=SECONDS)
    over = threading.Event()

    async def popular(http: httpx.AsyncClient) -> int:
        count = 0
        while not over.is_set() and count < 2000:
            await _text(http, STEADY[0], stream=False)
            count += 1
        return count

    async def rare(http: httpx.AsyncClient) -> float:
        began = time.monotonic()
        try:
            assert await _text(http, STEADY[1], stream=False) == world.answer(STEADY[1])
        finally:
            over.set()
        return time.monotonic() - began

    async def both(url: str) -> tuple[int, ...]:
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
            crowd = [popular(http) for _ in range(8)]
            return tuple(await asyncio.gather(rare(http), *crowd))  # type: ignore[arg-type]

    with running(engine) as server:
        waited, *counts = asyncio.run(both(server.url))
    assert waited < 15
    assert sum(counts) > 0
