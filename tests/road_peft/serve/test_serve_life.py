"""Adapters that come and go, clients that leave, and the end of a server."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from road_peft.serve.__main__ import main
from tests.road_peft.serve._server import (
    Gate,
    World,
    ask,
    build_world,
    client,
    events,
    held,
    running,
    wait_until,
)

NAMES = {f"tone-{i}": i for i in range(3)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), NAMES)


def text_of(got: httpx.Response) -> str:
    """Give the text of an answer."""
    assert got.status_code == 200, got.text
    return got.json()["choices"][0]["text"]


# ---- adapters -----------------------------------------------------------------------------------


def test_adapters_are_loaded_replaced_and_unloaded(world: World) -> None:
    with running(world.engine()) as one, client(one) as http:

        def post(path: str, /, **body: object) -> httpx.Response:
            return http.post(f"/v1/{path}", json=body)

        world.make("late", 31)  # appears after the start
        first = world.answer("late")
        assert post("completions", **ask("late")).status_code == 404
        assert post("load_adapter", name="late").json()["id"] == "late"
        assert text_of(post("completions", **ask("late"))) == first
        assert "late" in [m["id"] for m in http.get("/v1/models").json()["data"]]
        world.make("late", 32)
        second = world.answer("late")
        assert first != second
        got = post("load_adapter", name="late")
        assert got.status_code == 400
        assert got.json()["error"]["code"] == "already_loaded"
        assert text_of(post("completions", **ask("late"))) == first
        assert post("load_adapter", name="late", path="late", replace=True).status_code == 200
        assert text_of(post("completions", **ask("late"))) == second
        assert post("load_adapter", name="team/late", path="late").status_code == 200
        assert http.get("/v1/models/team/late").json()["parent"] == "tiny-llama"
        assert post("unload_adapter", name="late").json()["deleted"] is True
        for again in ("unload_adapter", "pin_adapter", "unpin_adapter"):
            assert post(again, name="late").status_code == 404
        assert post("completions", **ask("late")).status_code == 404
        assert text_of(post("completions", **ask("team/late"))) == second


def test_pinned_adapters_leave_a_slot_to_the_others(world: World) -> None:
    with running(world.engine(slots=2)) as one, client(one) as http:
        assert http.post("/v1/pin_adapter", json={"name": "tone-0"}).status_code == 200
        got = http.post("/v1/pin_adapter", json={"name": "tone-1"})
        assert got.json()["error"]["code"] == "all_pinned"
        for name in ("tone-1", "tone-2", "tone-0"):
            assert text_of(http.post("/v1/completions", json=ask(name))) == world.answer(name)
        assert "road_bank_slots_pinned 1.0" in http.get("/metrics").text
        assert http.post("/v1/unpin_adapter", json={"name": "tone-0"}).status_code == 200
        assert "road_bank_slots_pinned 0.0" in http.get("/metrics").text


def test_a_request_keeps_the_version_it_began_with(world: World) -> None:
    world.make("moving", 41)
    old = world.answer("moving")
    engine = world.engine()
    gate = Gate(engine)
    with running(engine) as one, client(one) as http, ThreadPoolExecutor() as pool:
        with gate.shut():
            asked = pool.submit(http.post, "/v1/completions", json=ask("moving"))
            wait_until(lambda: held(engine) == 1)
            world.make("moving", 42)
            with client(one) as other:
                body = {"name": "moving", "replace": True}
                assert other.post("/v1/load_adapter", json=body).status_code == 200
        assert text_of(asked.result()) == old
        assert text_of(http.post("/v1/completions", json=ask("moving"))) == world.answer("moving")
        assert old != world.answer("moving")


def test_more_adapters_than_slots_wait_for_each_other(world: World) -> None:
    engine = world.engine(slots=1)
    with running(engine) as one, client(one) as http, ThreadPoolExecutor(12) as pool:
        names = [*NAMES, "tiny-llama"] * 5
        got = list(pool.map(lambda n: http.post("/v1/completions", json=ask(n)), names))
        assert [text_of(g) for g in got] == [world.answer(n) for n in names]
        assert held(engine) == len(engine.slots) == 0


def test_metrics_count(world: World) -> None:
    with running(world.engine()) as one, client(one) as http:
        for _ in range(3):
            http.post("/v1/completions", json=ask("tone-1"))
        http.post("/v1/completions", json=ask("tone-1", n=2))
        text = http.get("/metrics").text
    assert 'road_requests_total{endpoint="/v1/completions",status="200"} 3.0' in text
    assert 'road_requests_total{endpoint="/v1/completions",status="400"} 1.0' in text
    assert f"road_generated_tokens_total {3 * len(world.ids['tone-1'])}.0" in text
    assert "road_first_token_seconds_count 3.0" in text
    assert "road_bank_loads_total 1.0" in text
    assert "tone-1" not in text


# ---- clients that leave -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["generating", "waiting"])
def test_a_client_that_leaves_gives_its_slot_back(world: World, where: str, stream: bool) -> None:
    engine = world.engine(slots=1)
    gate = Gate(engine)
    with running(engine) as one, gate.shut():
        lease = engine.bank.acquire("tone-0") if where == "waiting" else None
        with (
            client(one) as http,
            pytest.raises(httpx.ReadTimeout),
            http.stream(
                "POST", "/v1/completions", json=ask("tone-1", stream=stream), timeout=0.4
            ) as got,
        ):
            got.read()
        wait_until(lambda: not engine.jobs and not len(engine.slots))
        if lease is not None:
            lease.release()
        wait_until(lambda: held(engine) == 0)
        assert 'status="499"' in engine.metrics.text().decode() or stream


# ---- the end ------------------------------------------------------------------------------------


def test_draining_lets_running_requests_finish_and_refuses_others(world: World) -> None:
    engine = world.engine(drain_seconds=20)
    gate = Gate(engine)
    with running(engine) as one, client(one) as http, ThreadPoolExecutor() as pool:
        with gate.shut():
            asked = pool.submit(http.post, "/v1/completions", json=ask("tone-1"))
            wait_until(lambda: held(engine) == 1)
            assert one.loop is not None
            drained = asyncio.run_coroutine_threadsafe(engine.drain(20), one.loop)
            wait_until(lambda: engine.draining)
            with client(one) as other:
                assert other.get("/health").status_code == 503
                got = other.post("/v1/completions", json=ask("tone-1"))
                assert got.status_code == 503
                assert got.json()["error"]["code"] == "shutting_down"
                assert got.headers["retry-after"] == "1"
        assert text_of(asked.result()) == world.answer("tone-1")
        drained.result(10)


def test_what_does_not_finish_in_time_is_told(world: World) -> None:
    engine = world.engine(slots=1)
    gate = Gate(engine)
    with running(engine) as one, client(one) as http, ThreadPoolExecutor() as pool:
        with gate.shut():
            running_one = pool.submit(http.post, "/v1/completions", json=ask("tone-1"))
            wait_until(lambda: held(engine) == 1)
            streamed = pool.submit(http.post, "/v1/completions", json=ask("tone-1", stream=True))
            waiting = pool.submit(http.post, "/v1/completions", json=ask("tone-2"))
            wait_until(lambda: len(engine.jobs) == 3)
            assert one.loop is not None
            asyncio.run_coroutine_threadsafe(engine.drain(0.1), one.loop).result(10)
        for asked in (running_one, waiting):
            assert asked.result().status_code == 503
            assert asked.result().json()["error"]["code"] == "shutting_down"
        assert '"shutting_down"' in streamed.result().text
    assert held(engine) == 0


def test_when_generation_dies_every_request_is_told(world: World) -> None:
    engine = world.engine()

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    with running(engine) as one, client(one) as http, ThreadPoolExecutor() as pool:
        assert text_of(http.post("/v1/completions", json=ask("tone-1"))) == world.answer("tone-1")
        gate = Gate(engine)
        with gate.shut():
            asked = [
                pool.submit(http.post, "/v1/completions", json=ask(name, stream=stream))
                for name in ("tone-0", "tone-1")
                for stream in (False, True)
            ]
            wait_until(lambda: len(engine.jobs) == 4 and held(engine) == 2)
            engine.bank.model.register_forward_pre_hook(fail)
        for got in (one_asked.result(30) for one_asked in asked):
            assert got.status_code in (200, 503)
            assert "the device is gone" in got.text
        wait_until(lambda: http.get("/health").status_code == 503)
        assert "the device is gone" in http.get("/health").json()["reason"]
        got = http.post("/v1/completions", json=ask("tone-1"))
        assert got.status_code == 503
        assert got.json()["error"]["code"] == "generation_ended"
        assert held(engine) == 0


def test_a_server_leaves_nothing_behind(world: World) -> None:
    before = set(threading.enumerate())
    with running(world.engine()) as one, client(one) as http:
        http.post("/v1/completions", json=ask("tone-1"))
    assert one.left == []
    assert [t for t in threading.enumerate() if t not in before and not t.daemon] == []


# ---- the command line ---------------------------------------------------------------------------


class Command:
    """`python -m road_peft.serve` in a process of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "road_peft.serve", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += iter(self.process.stderr.readline, "")

    def found(self, pattern: str) -> re.Match[str] | None:
        """Look for a pattern in what was printed so far."""
        return re.search(pattern, "".join(self.lines))

    def end(self, seconds: float) -> int:
        """Wait for the end, and give the exit status."""
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self._reader.join(5)


@pytest.fixture
def command(world: World) -> Iterator[Command]:
    one = Command(
        *(world.base, "--adapters", str(world.adapters), "--port", "0", "--slots", "2"),
        *("--cache-tokens", "4096", "--max-batch-tokens", "256", "--max-new-tokens", "200"),
        ROAD_API_KEY="s3cret",
    )
    yield one
    one.process.kill()
    one.process.wait(10)


def test_the_command_serves_and_ends_by_a_signal_when_all_is_answered(
    world: World, command: Command
) -> None:
    listening = r"running on (http://127\.0\.0\.1:\d+)"
    wait_until(lambda: command.found(listening) or command.process.poll() is not None, 120)
    found = command.found(listening)
    assert found is not None, "".join(command.lines)
    key = {"authorization": "Bearer s3cret"}
    settings = {"base_url": found[1], "timeout": 60, "trust_env": False, "headers": key}
    with httpx.Client(**settings) as http, httpx.Client(**settings) as other:
        assert other.get("/v1/models", headers={"authorization": ""}).status_code == 401
        assert text_of(http.post("/v1/completions", json=ask("tone-1"))) == world.answer("tone-1")
        body = ask("tone-1", max_tokens=200, stream=True)
        with http.stream("POST", "/v1/completions", json=body) as got:
            lines = got.iter_lines()
            first = next(lines)
            command.process.send_signal(signal.SIGTERM)
            wait_until(lambda: _status(other) in (503, 0))
            pieces = events([first, *lines])
    text = "".join(p["choices"][0]["text"] for p in pieces)
    assert text.startswith(world.answer("tone-1")[:4])
    assert pieces[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert command.end(30) == 0, "".join(command.lines)


def _status(http: httpx.Client) -> int:
    try:
        return http.get("/health").status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{base}", "--adapters", "{base}/nowhere"], "no folder"),
        (["{base}", "--slots", "0"], "slots is 0"),
        (["{base}/nowhere"], "nowhere"),
        (["{base}", "--target-modules", "absent"], "absent"),
    ],
)
def test_the_command_tells_what_is_wrong(
    world: World, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.replace("{base}", world.base) for a in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("road_peft.serve: ")
    assert words in said


def test_a_pickled_model_is_not_loaded(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(world.model().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert main([str(tmp_path / "pickled")]) == 2


# ---- what importing needs -----------------------------------------------------------------------


_IMPORTS = """
import sys
import road_peft
extra = ("fastapi", "uvicorn", "prometheus_client")
print(*sorted(set(extra) & set(sys.modules)), "loaded")
for missing in extra:
    sys.modules[missing] = None  # as if it were not installed
    try:
        import road_peft.serve
    except ModuleNotFoundError as error:
        print(error)
    del sys.modules[missing]
"""


def test_importing_needs_the_extra_for_the_server_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["loaded"] + [
        f"road_peft.serve needs {name}; pip install 'road-apiq-peft[serve]'"
        for name in ("fastapi", "uvicorn", "prometheus_client")
    ], done.stderr
