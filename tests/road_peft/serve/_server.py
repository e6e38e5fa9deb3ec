"""A tiny model with a real tokenizer, adapters whose answers tell them apart, and a running server.

Adapters are random and far from the identity, and their right answers come from PEFT's own
`generate` on a second copy of the model, one adapter at a time.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import peft
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from road_peft import RoadConfig
from road_peft.serve import Engine, ServeOptions, create_app
from tests.road_peft._models import randomize

LINES = (
    "the quick brown fox jumps over the lazy dog",
    "a request names an adapter, and the adapter turns pairs of outputs",
    "größer, naïve, café, 東京, 🙂 and other words of several bytes",
)
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
PROMPT = "the quick brown fox"
NEW = 8  # tokens of most answers
SMALL = ServeOptions(
    slots=4, cache_tokens=8192, max_batch_tokens=512, max_new_tokens=32, request_timeout=30
)


def build_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer, so that one character may take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


@dataclass
class World:
    """A model on disk, adapters on disk, and what each of them must answer."""

    root: Path
    tokenizer: Any = None
    reference: Any = None  # a PEFT model with one adapter, whose values are drawn anew for each
    ids: dict[str, list[int]] = field(default_factory=dict)  # the answer to PROMPT

    @property
    def base(self) -> str:
        """The folder of the model."""
        return str(self.root / "tiny-llama")

    @property
    def adapters(self) -> Path:
        """The folder of adapters that a server is given."""
        return self.root / "adapters"

    def answer(self, name: str) -> str:
        """Give the text that an adapter must answer to PROMPT."""
        return self.text(self.ids[name])

    def text(self, ids: Sequence[int]) -> str:
        """Give the text of tokens."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def generate(self, prompt: str | list[int] = PROMPT, new: int = NEW) -> list[int]:
        """Generate with the values that the reference has now, greedily."""
        ids = self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        with torch.no_grad():
            tokens = torch.tensor([ids])
            out = self.reference.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                do_sample=False,
            )
        return out[0, len(ids) :].tolist()

    def make(self, name: str, seed: int, folder: Path | None = None) -> Path:
        """Write an adapter, and note its answer."""
        torch.manual_seed(seed)
        randomize(self.reference, spread=1.5)
        path = (folder or self.adapters) / name
        self.reference.save_pretrained(str(path))
        self.ids[name] = self.generate()
        return path

    def model(self) -> Any:
        """Give a fresh copy of the base."""
        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    def engine(self, **settings: Any) -> Engine:
        """Give an engine over a fresh copy of the base and all adapters of the folder."""
        options = replace(SMALL, adapters=self.adapters, **settings)
        return Engine(self.model(), AutoTokenizer.from_pretrained(self.base), options)


def build_world(root: Path, names: Mapping[str, int]) -> World:
    """Write a model and the adapters of `names`, each drawn from its seed."""
    world = World(root, build_tokenizer())
    config = LlamaConfig(
        vocab_size=len(world.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=world.tokenizer.bos_token_id,
        eos_token_id=world.tokenizer.eos_token_id,
        pad_token_id=world.tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(world.base)
    world.tokenizer.save_pretrained(world.base)
    world.adapters.mkdir()
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    world.reference = peft.get_peft_model(
        world.model(), RoadConfig(target_modules=targets, group_size=8)
    ).eval()
    with world.reference.disable_adapter():
        world.ids["tiny-llama"] = world.generate()
    for name, seed in names.items():
        world.make(name, seed)
    return world


class Running:
    """A server in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        config = uvicorn.Config(
            create_app(engine), host="127.0.0.1", port=0, log_level="warning", lifespan="on"
        )
        self.server = uvicorn.Server(config)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.left: list[str] = []  # tasks that the server leaves behind
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve()
            await asyncio.sleep(0)
            here = asyncio.current_task()
            self.left = [repr(task) for task in asyncio.all_tasks() if task is not here]

        asyncio.run(serve())

    def start(self) -> None:
        """Start, and wait until requests are taken."""
        self._thread.start()
        wait_until(lambda: self.server.started or not self._thread.is_alive(), 60)
        assert self.server.started

    def stop(self) -> None:
        """End, and wait for it."""
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"


@contextmanager
def running(engine: Engine) -> Iterator[Running]:
    """Run a server for the time of a block."""
    one = Running(engine)
    one.start()
    try:
        yield one
    finally:
        one.stop()


def wait_until(true: Any, seconds: float = 10) -> None:
    """Wait until something holds, and fail if it does not in time."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not so after {seconds} seconds"
        time.sleep(0.01)


def client(one: Running, **settings: Any) -> httpx.Client:
    """Give a client of a server; no proxy of the machine is between them."""
    return httpx.Client(base_url=one.url, timeout=60, trust_env=False, verify=False, **settings)


class Gate:
    """Holds the model before every step while it is shut."""

    def __init__(self, engine: Engine) -> None:
        self._open = threading.Event()
        self._open.set()
        self.steps = 0
        engine.bank.model.register_forward_pre_hook(self._pass)

    def _pass(self, *_: Any) -> None:
        self.steps += 1
        assert self._open.wait(60)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Hold the model for the time of a block."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()


def ask(name: str, **more: Any) -> dict[str, Any]:
    """Give the body of a completion whose answer is known."""
    return {"model": name, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, **more}


def held(engine: Engine) -> int:
    """Give the slots under a lease."""
    return engine.bank.memory().slots_held


def events(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Give the events of a stream, which must end as it should."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data.pop() == "[DONE]"
    return [json.loads(one) for one in data]
