"""What the server answers: the text of `generate` with the adapter that the request names."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
import torch
from transformers import TemperatureLogitsWarper

from road_peft.serve import Engine
from road_peft.serve.sampling import ExactTemperature
from tests.road_peft.serve._server import (
    NEW,
    PROMPT,
    SMALL,
    Running,
    World,
    ask,
    build_world,
    client,
    events,
    running,
)

NAMES = {f"tone-{i}": i for i in range(6)}  # more than there are slots
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "größer 🙂?"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), NAMES)


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Running]:
    with running(world.engine()) as one:
        yield one


@pytest.fixture(scope="module")
def theirs(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, http_client=client(server)
    ) as one:
        yield one


def test_the_answers_of_the_adapters_differ(world: World) -> None:
    assert len({world.answer(name) for name in world.ids}) == len(NAMES) + 1


@pytest.mark.parametrize("name", ["tiny-llama", *NAMES])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_completion_is_what_generate_gives(
    world: World, server: Running, name: str, as_ids: bool
) -> None:
    prompt = world.tokenizer(PROMPT).input_ids
    with client(server) as http:
        got = http.post("/v1/completions", json=ask(name, prompt=prompt if as_ids else PROMPT))
    answer = got.json()
    assert got.status_code == 200
    assert answer["model"] == name
    assert answer["choices"][0]["text"] == world.answer(name)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == len(world.ids[name])


@pytest.mark.parametrize("name", ["tiny-llama", *NAMES])
def test_the_pieces_of_a_stream_make_the_same_text(
    world: World, server: Running, name: str
) -> None:
    body = ask(name, stream=True)
    with client(server) as http, http.stream("POST", "/v1/completions", json=body) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        pieces = events(got.iter_lines())
    assert "".join(p["choices"][0]["text"] for p in pieces) == world.answer(name)
    assert [p["choices"][0]["finish_reason"] for p in pieces][-1] in ("length", "stop")
    assert {p["choices"][0]["finish_reason"] for p in pieces[:-1]} <= {None}
    assert all("usage" not in p for p in pieces)
    assert len({p["id"] for p in pieces}) == 1


def test_openais_client_completes(world: World, theirs: openai.OpenAI) -> None:
    whole = theirs.completions.create(**ask("tone-1"), user="someone", n=1)
    assert whole.choices[0].text == world.answer("tone-1")
    pieces = list(
        theirs.completions.create(
            **ask("tone-1"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(p.choices[0].text for p in pieces if p.choices) == world.answer("tone-1")
    assert pieces[-1].usage == whole.usage
    assert {p.usage for p in pieces[:-1]} == {None}


def test_openais_client_chats(world: World, theirs: openai.OpenAI) -> None:
    ids = world.tokenizer.apply_chat_template(
        TURNS, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    world.make("chatty", 77, world.root / "elsewhere")
    world.make("tone-2", NAMES["tone-2"])  # the reference has its values again
    wanted = world.text(world.generate(ids))
    body = {"model": "tone-2", "messages": TURNS, "temperature": 0}
    whole = theirs.chat.completions.create(**body, max_completion_tokens=NEW)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == wanted
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(ids)
    pieces = list(theirs.chat.completions.create(**body, max_tokens=NEW, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == wanted
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_content_of_a_turn_may_come_in_parts(theirs: openai.OpenAI) -> None:
    body = {"model": "tone-2", "temperature": 0, "max_tokens": NEW}
    parts = [{"type": "text", "text": text} for text in ("größer", " 🙂?")]
    answers = [
        theirs.chat.completions.create(
            **body, messages=[TURNS[0], {"role": "user", "content": content}]
        )
        for content in (TURNS[1]["content"], parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_openais_client_lists_the_adapters(theirs: openai.OpenAI) -> None:
    listed = theirs.models.list().data
    assert [one.id for one in listed] == ["tiny-llama", *sorted(NAMES)]
    assert [getattr(one, "parent", "") for one in listed] == [None] + ["tiny-llama"] * len(NAMES)
    assert theirs.models.retrieve("tone-3").id == "tone-3"
    with pytest.raises(openai.NotFoundError) as caught:
        theirs.models.retrieve("tone-99")
    assert caught.value.code == "model_not_found"


def test_openais_client_understands_the_errors(theirs: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="GET /v1/models"):
        theirs.completions.create(**ask("tone-99"))
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported") as caught:
        theirs.completions.create(**ask("tone-1"), logprobs=3)
    assert caught.value.body is not None


# ---- where an answer ends -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_also_across_tokens(
    world: World, server: Running, stream: bool
) -> None:
    new = 24
    world.make("tone-4", NAMES["tone-4"])
    text = world.text(world.generate(new=new))
    place = len(text) // 2
    stop = text[place : place + 3]
    body = ask("tone-4", max_tokens=new, stop=["never there", stop], stream=stream)
    with client(server) as http:
        got = http.post("/v1/completions", json=body)
    pieces = events(got.text.splitlines()) if stream else [got.json()]
    assert "".join(p["choices"][0]["text"] for p in pieces) == text[: text.index(stop)]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stop_string_that_never_comes_changes_nothing(world: World, server: Running) -> None:
    stop = world.answer("tone-1")[-1] + "and more"  # begins where the answer ends
    with client(server) as http:
        got = http.post("/v1/completions", json=ask("tone-1", stop=stop)).json()
    assert got["choices"][0]["text"] == world.answer("tone-1")
    assert got["choices"][0]["finish_reason"] == "length"


def test_the_token_that_ends_an_answer_is_not_shown(world: World) -> None:
    ids = world.ids["tone-1"]
    engine_model = world.model()
    engine_model.generation_config.eos_token_id = [1, ids[4]]
    engine = Engine(engine_model, world.tokenizer, SMALL)
    engine.bank.add("tone-1", world.adapters / "tone-1")
    with running(engine) as one, client(one) as http:
        got = http.post("/v1/completions", json=ask("tone-1")).json()
    first = ids.index(ids[4])
    assert got["choices"][0]["text"] == world.text(ids[:first])
    assert got["choices"][0]["finish_reason"] == "stop"
    assert got["usage"]["completion_tokens"] == first + 1


# ---- sampling -----------------------------------------------------------------------------------


def test_temperature_belongs_to_the_request(world: World, server: Running) -> None:
    with client(server) as http:
        drawn = {
            http.post("/v1/completions", json=ask("tone-1", temperature=1.5)).json()["choices"][0][
                "text"
            ]
            for _ in range(6)
        }
        sure = {
            http.post("/v1/completions", json=ask("tone-1", temperature=t)).json()["choices"][0][
                "text"
            ]
            for t in (0, 0.0, 1e-30, 1e-300)
        }
    assert len(drawn) > 1
    assert sure == {world.answer("tone-1")}


def _processor() -> ExactTemperature:
    return ExactTemperature(TemperatureLogitsWarper(0.5))


def _scaled(scores: torch.Tensor, temperatures: list[float]) -> torch.Tensor:
    arguments = torch.tensor([*temperatures, 9.0]).view(torch.int32)  # longer than needed
    return _processor()(scores, arguments).softmax(-1)


def test_temperature_zero_is_argmax_also_where_scores_tie() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-1e30, 5.0, 1e30, 1e30]])
    chances = _scaled(scores, [0.0, 0.0, 0.0])
    wanted = torch.nn.functional.one_hot(scores.argmax(-1), 4).float()
    assert torch.equal(chances, wanted)


def test_other_temperatures_scale() -> None:
    scores = torch.randn(3, 50)
    chances = _scaled(scores, [0.3, 1.0, 2.0])
    wanted = (scores / torch.tensor([[0.3], [1.0], [2.0]])).softmax(-1)
    torch.testing.assert_close(chances, wanted)


def test_scores_that_are_not_finite_leave_probabilities_that_can_be_sampled() -> None:
    rows = [[float("nan")] * 4, [float("inf"), 1, 2, 3], [float("-inf")] * 4, [3e38, -3e38, 0, 1]]
    scores = torch.tensor(rows)
    for temperature in (0.0, 1e-38, 1.0):
        chances = _scaled(scores, [temperature] * 4)
        assert torch.isfinite(chances).all()
        assert torch.multinomial(chances, 1).shape == (4, 1)
