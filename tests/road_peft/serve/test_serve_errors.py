"""What the server refuses: by which status, code and field, and that it goes on afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from road_peft.serve import ServeOptions
from tests.road_peft.serve._server import (
    Gate,
    Running,
    World,
    ask,
    build_world,
    client,
    held,
    running,
    wait_until,
)

NAMES = {f"tone-{i}": i for i in range(3)}
CHAT = {"model": "tone-1", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), NAMES)


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Running]:
    with running(world.engine(max_body_bytes=4000, max_prompt_tokens=100)) as one:
        yield one


@pytest.fixture
def http(server: Running, world: World) -> Iterator[httpx.Client]:
    with client(server) as one:
        yield one
        # whatever was refused, the next request is answered
        got = one.post("/v1/completions", json=ask("tone-1")).json()
        assert got["choices"][0]["text"] == world.answer("tone-1")
        assert held(server.engine) == 0


def refused(got: httpx.Response, status: int, code: str, *words: str) -> dict[str, Any]:
    """Check the shape of an error, and give it."""
    assert got.status_code == status, got.text
    error = got.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    for word in words:
        assert word in error["message"]
    return error


# ---- bodies -------------------------------------------------------------------------------------

# a body, or what is changed in a good one: the field that is named
WRONG: list[tuple[Any, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b'"text"', None),
    (b"null", None),
    (b"\xff\xfe", None),
    (b"[" * 3000, None),
    (b'{"model": "tone-1", "prompt": "\\ud800"}', None),
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": ["one", "two"]}, "prompt"),
    ({"prompt": [[1], [2]]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"max_tokens": 33}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    (b'{"model": "tone-1", "prompt": "a", "temperature": NaN}', "temperature"),
    ({"top_p": 0.5}, "top_p"),
    ({"top_p": 0}, "top_p"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 1]}, "stop"),
    ({"stop": list("abcde")}, "stop"),
    ({"stop": "a" * 300}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, None),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"top_k": 5}, "top_k"),
    ({"unheard_of": 1}, "unheard_of"),
]


@pytest.mark.parametrize(("wrong", "param"), WRONG, ids=[str(w)[:40] for w, _ in WRONG])
def test_a_wrong_body_is_refused(http: httpx.Client, wrong: Any, param: str | None) -> None:
    body = wrong if isinstance(wrong, bytes) else json.dumps({**ask("tone-1"), **wrong}).encode()
    error = refused(http.post("/v1/completions", content=body, headers=JSON), 400, "invalid_value")
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


UNSUPPORTED = {
    "n": 2,
    "best_of": 3,
    "echo": True,
    "logprobs": 0,
    "seed": 1,
    "suffix": "end",
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "logit_bias": {"5": 1},
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
@pytest.mark.parametrize("chat", [False, True])
def test_what_cannot_be_honoured_is_refused_by_name(
    http: httpx.Client, field: str, chat: bool
) -> None:
    body = {**(CHAT if chat else ask("tone-1")), field: UNSUPPORTED[field]}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    refused(http.post(path, json=body), 400, "invalid_value", f"{field} is not supported", "leave")


def test_what_asks_for_nothing_is_left_aside(http: httpx.Client) -> None:
    nothing = {"n": 1, "echo": False, "frequency_penalty": 0.0, "logit_bias": {}, "seed": None}
    more = {"user": "u", "metadata": {"a": "b"}, "stop": None, "top_p": 1, "suffix": None}
    assert http.post("/v1/completions", json=ask("tone-1", **nothing, **more)).status_code == 200


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": 3}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ([{"role": "user", "content": "x", "images": []}], "messages.0.images"),
        (["hi"], "messages.0"),
    ],
)
def test_a_wrong_chat_is_refused(http: httpx.Client, messages: Any, param: str) -> None:
    got = http.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    assert refused(got, 400, "invalid_value")["param"] == param


def test_a_chat_needs_a_template_that_takes_it(server: Running, http: httpx.Client) -> None:
    tokenizer = server.engine.tokenizer
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
        got = http.post("/v1/chat/completions", json=CHAT)
        refused(got, 400, "invalid_value", "no system turns")
        tokenizer.chat_template = None
        refused(http.post("/v1/chat/completions", json=CHAT), 400, "invalid_value", "no chat temp")
    finally:
        tokenizer.chat_template = before


def test_only_json_is_read(http: httpx.Client) -> None:
    body = json.dumps(ask("tone-1")).encode()
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data"}):
        refused(http.post("/v1/completions", content=body, headers=kind), 400, "invalid_type")


# ---- limits -------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused(http: httpx.Client) -> None:
    for body in (b" " * 4001, iter([b" " * 900] * 10)):  # the second does not tell its length
        got = http.post("/v1/completions", content=body, headers=JSON)
        refused(got, 413, "body_too_large", "4000")


def test_prompts_and_answers_have_limits(http: httpx.Client, world: World) -> None:
    for tokens, more, words in (
        (101, {}, "at most 100"),
        (100, {"max_tokens": 33}, "at most 32"),
    ):
        got = http.post("/v1/completions", json=ask("tone-1", prompt=[5] * tokens, **more))
        assert got.status_code == 400
        assert words in got.json()["error"]["message"]
    with running(world.engine()) as other, client(other) as there:
        got = there.post("/v1/completions", json=ask("tone-1", prompt=[5] * 250))
        refused(got, 400, "context_length_exceeded", "room for 256")
        body = ask("tone-1", prompt=[5] * 250)
        del body["max_tokens"]  # then it is what there is room for
        assert there.post("/v1/completions", json=body).json()["usage"]["total_tokens"] <= 256


def test_a_prompt_that_the_cache_cannot_hold_is_refused(world: World) -> None:
    with running(world.engine(cache_tokens=1)) as one, client(one) as there:
        one.engine.context = 10**6  # as if the model had no end of positions
        got = there.post("/v1/completions", json=ask("tone-1", prompt=[5] * 5000))
        refused(got, 400, "invalid_value", "cache")
        assert held(one.engine) == 0
        assert there.post("/v1/completions", json=ask("tone-1")).status_code == 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"request_timeout": float("nan")}, "request_timeout is nan"),
        ({"adapters": Path("nowhere")}, "no folder"),
        ({"api_key": " "}, "api_key is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServeOptions(**settings)


def test_no_more_requests_are_taken_than_allowed(world: World) -> None:
    engine = world.engine(max_queue=2)
    gate = Gate(engine)
    with running(engine) as one, client(one) as there, client(one) as other:
        body = ask("tone-1", stream=True)
        with (
            gate.shut(),
            there.stream("POST", "/v1/completions", json=body),
            other.stream("POST", "/v1/completions", json=body),
            client(one) as third,
        ):
            got = third.post("/v1/completions", json=ask("tone-1"))
            refused(got, 429, "queue_full")
            assert got.headers["retry-after"] == "1"
        wait_until(lambda: not engine.jobs)
        assert there.post("/v1/completions", json=ask("tone-1")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_given_up(world: World, stream: bool) -> None:
    engine = world.engine(request_timeout=0.3)
    gate = Gate(engine)
    with running(engine) as one, client(one) as there, gate.shut():
        got = there.post("/v1/completions", json=ask("tone-1", stream=stream))
        if stream:
            assert got.status_code == 200
            last = got.text.split("data: ")[-1]
            assert json.loads(last)["error"]["code"] == "timeout"
            assert "[DONE]" not in got.text
        else:
            refused(got, 503, "timeout", "0.3 seconds")
        wait_until(lambda: held(engine) == 0 and not engine.jobs)


def test_waiting_for_a_slot_ends(world: World) -> None:
    engine = world.engine(slots=1, request_timeout=0.5)
    gate = Gate(engine)
    with running(engine) as one, client(one) as there, gate.shut():
        lease = engine.bank.acquire("tone-0")
        refused(there.post("/v1/completions", json=ask("tone-1")), 503, "no_slot", "tone-1")
        lease.release()
        assert not len(engine.slots)


# ---- keys and paths -----------------------------------------------------------------------------


def test_a_key_is_asked_for(world: World) -> None:
    with running(world.engine(api_key="s3cret")) as one, client(one) as there:
        for headers in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "s3cret"}):
            for path in ("/v1/models", "/v1/models/tone-1"):
                refused(there.get(path, headers=headers), 401, "invalid_api_key")
            for path in ("completions", "chat/completions", "load_adapter", "unload_adapter"):
                got = there.post(f"/v1/{path}", json=ask("tone-1"), headers=headers)
                refused(got, 401, "invalid_api_key")
        right = {"authorization": "Bearer s3cret"}
        got = there.post("/v1/completions", json=ask("tone-1"), headers=right)
        assert got.json()["choices"][0]["text"] == world.answer("tone-1")
        assert there.get("/health").status_code == there.get("/metrics").status_code == 200


def test_unknown_models_and_routes(http: httpx.Client) -> None:
    for name in ("tone-99", "", "__base__", "../adapters/tone-1", "x" * 3000):
        got = http.post("/v1/completions", json=ask(name))
        assert refused(got, 404, "model_not_found")["param"] == "model"
    refused(http.get("/v1/nothing"), 404, "not_found")
    refused(http.get("/v1/completions"), 405, "not_allowed")
    assert 'endpoint="other"' in http.get("/metrics").text


@pytest.fixture
def outside(world: World) -> Iterator[Path]:
    """An adapter beside the folder of adapters, and ways to it."""
    path = world.make("secret", 9, world.root)
    links = [world.adapters / "link", world.adapters / "parts"]
    links[0].symlink_to(path)
    shutil.copytree(path, links[1], symlinks=True)
    (links[1] / "adapter_model.safetensors").unlink()
    (links[1] / "adapter_model.safetensors").symlink_to(path / "adapter_model.safetensors")
    yield path
    links[0].unlink()
    shutil.rmtree(links[1])


def test_adapters_outside_the_folder_are_not_loaded(
    http: httpx.Client, outside: Path, world: World
) -> None:
    paths = ["../secret", str(outside), "tone-1/../../secret", "link", "parts", ".", "", "..", "/"]
    paths += ["nowhere", "tone-1/adapter_config.json", "a\0b", "a" * 5000, "~", "file:///etc"]
    for path in paths:
        got = http.post("/v1/load_adapter", json={"name": "new", "path": path[:3000]})
        error = refused(got, 400, "invalid_value", "inside the folder of adapters")
        assert error["param"] == "path"
        assert path.startswith("/") or str(world.root) not in error["message"]
    for name in ("", "__base__", "tiny-llama", "line\nbreak", "x" * 201):
        got = http.post("/v1/load_adapter", json={"name": name, "path": "tone-1"})
        assert refused(got, 400, "invalid_value")["param"] == "name"
    assert http.get("/v1/models/new").status_code == 404


# ---- adapters that cannot be served -------------------------------------------------------------


def _spoil(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BROKEN: dict[str, Any] = {
    "no json": lambda f: (f / "adapter_config.json").write_text("{"),
    "a list": lambda f: (f / "adapter_config.json").write_text("[1]"),
    "another kind": lambda f: _spoil(f, peft_type="LORA", r=4),
    "another base": lambda f: _spoil(f, base_model_name_or_path="some/other"),
    "a group size of text": lambda f: _spoil(f, group_size="x"),
    "an endless group": lambda f: _spoil(f, group_size=0),
    "targets of numbers": lambda f: _spoil(f, target_modules=5),
    "no pattern": lambda f: _spoil(f, target_modules="(("),
    "an unknown variant": lambda f: _spoil(f, variant="road_9"),
    "more than rotations": lambda f: _spoil(f, modules_to_save=["lm_head"]),
    "no tensors": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "half of the tensors": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:900]
    ),
    "a header of lies": lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_is_refused_and_the_server_goes_on(
    http: httpx.Client, server: Running, world: World, how: str
) -> None:
    folder = world.adapters / "broken"
    shutil.copytree(world.adapters / "tone-1", folder)
    try:
        BROKEN[how](folder)
        got = http.post("/v1/load_adapter", json={"name": "broken"})
        error = refused(got, 400, "bad_adapter", "broken")
        assert str(world.root) not in error["message"]
        body = {"name": "tone-2", "path": "broken", "replace": True}
        refused(http.post("/v1/load_adapter", json=body), 400, "bad_adapter")
        engine = server.engine
        engine.bank.add_folder(world.adapters)  # as at the start: registered, but not read
        refused(http.post("/v1/completions", json=ask("broken")), 400, "bad_adapter", "broken")
        engine.bank.remove("broken")
    finally:
        shutil.rmtree(folder)
    got = http.post("/v1/completions", json=ask("tone-2")).json()
    assert got["choices"][0]["text"] == world.answer("tone-2")


def test_values_that_would_overflow_are_refused(
    http: httpx.Client, server: Running, world: World
) -> None:
    world.make("tone-0", NAMES["tone-0"])
    for name, parameter in world.reference.named_parameters():
        if "road_alpha" in name:
            parameter.data.fill_(1e30)
    world.reference.save_pretrained(str(world.adapters / "huge"))
    answer = http.post("/v1/load_adapter", json={"name": "huge"})
    refused(answer, 400, "bad_adapter", "outputs overflow")
    assert "huge" not in server.engine.bank
    assert server.engine.ended is None
