"""What answers requests: a model, its tokenizer, a bank of adapters, and batching over them."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from road_peft.bank import RoadBank
from road_peft.batching import AdapterBatching
from road_peft.leases import Lease
from road_peft.serve.errors import ApiError, invalid, unavailable, unknown
from road_peft.serve.folder import AdapterFolder
from road_peft.serve.jobs import Job
from road_peft.serve.metrics import Metrics
from road_peft.serve.options import ServeOptions
from road_peft.serve.protocol import Chat, Completion, Sampling
from road_peft.serve.sampling import (
    batching_config,
    eos_ids,
    generation_config,
    make_temperature_exact,
)
from road_peft.serve.slots import SlotQueue

_THREADS = 8  # that read and load adapters; none of them waits for a slot
_LOOK = 0.5  # seconds between looks whether generation still runs

_Result = TypeVar("_Result")


class Engine:
    """Generates for many requests at once, each with its own adapter.

    Wraps the linear layers of `model` in place. Apart from the constructor, everything is called in
    one event loop; disk, slots and tokenisation are left to threads.

    Raises:
        ValueError: the model cannot be served, or the folder of adapters cannot be read.
    """

    def __init__(self, model: Any, tokenizer: Any, options: ServeOptions | None = None) -> None:
        self.options = options = options or ServeOptions()
        self.tokenizer = tokenizer
        path = str(getattr(model, "name_or_path", ""))
        self.name = options.model_name or path.rstrip("/").rpartition("/")[2] or "base"
        self.bank = RoadBank(
            model,
            options.slots,
            target_modules=options.targets,
            host_bytes=options.host_bytes,
            base_model=options.base_model,
        )
        self.folder = AdapterFolder(self.bank, options.adapters, self.name)
        self.batching = AdapterBatching(
            self.bank, generation_config(model, tokenizer, options), batching_config(options)
        )
        make_temperature_exact(self.batching.manager)
        self.eos_ids = frozenset(eos_ids(model, tokenizer))
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = positions if isinstance(positions, int) else None
        self.jobs: dict[str, Job] = {}
        self.draining = False
        self.ended: str | None = None  # why generation has ended
        self.metrics = Metrics(self)
        self._count = itertools.count()
        self._pool = ThreadPoolExecutor(_THREADS, "road-bank")
        # one thread: a tokenizer may not be used by several at a time
        self._words = ThreadPoolExecutor(1, "road-words")
        self.slots = SlotQueue(self.bank, self._pool)
        self._reader: threading.Thread | None = None

    # ---- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start generating."""
        await asyncio.to_thread(self.batching.start)
        cache = self.batching.manager.batch_processor.cache
        if cache.read_cache_limit is None:  # else it forgets, and holds a request of any length
            room = cache.max_tokens_read
            self.context = room if self.context is None else min(room, self.context)
        loop = asyncio.get_running_loop()
        self._reader = threading.Thread(target=self._read, args=(loop,), name="road-reader")
        self._reader.start()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Carry what is generated to the event loop, until there is no more."""
        while True:
            running = self.batching.manager.is_running()  # asked first: what it left is still read
            outputs = []
            output = self.batching.get_result(timeout=_LOOK)
            while output is not None:
                outputs.append(output)
                output = self.batching.get_result(timeout=0)
            if outputs:
                loop.call_soon_threadsafe(self._deliver, outputs)
            elif not running:
                loop.call_soon_threadsafe(self._end, self.batching.error or "it was stopped")
                return

    def _deliver(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            job = self.jobs.get(output.request_id)
            if job is not None:
                job.feed(output)
        self.slots.wake()

    def _end(self, reason: object) -> None:
        self.ended = f"generation has ended: {reason}"
        self._fail_all(unavailable(self.ended, "generation_ended"))

    def _fail_all(self, error: ApiError) -> None:
        for job in self.jobs.values():
            job.fail(error)
        self.slots.fail(error)

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and let those there are finish; after `seconds` they fail."""
        self.draining = True
        loop = asyncio.get_running_loop()
        for limit, what in ((seconds, None), (2.0, "the server is shutting down")):
            if what is not None and self.jobs:
                self._fail_all(unavailable(what, "shutting_down"))
            until = loop.time() + limit
            while self.jobs and loop.time() < until:
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Stop generating, drop what still runs, and end all threads."""
        await self.drain(0)
        await self.slots.close()
        await asyncio.to_thread(self.batching.stop, finish=False)
        if self._reader is not None:
            await asyncio.to_thread(self._reader.join)
        for pool in (self._pool, self._words):
            await asyncio.to_thread(pool.shutdown)

    @property
    def why_unavailable(self) -> str | None:
        """Why no request is taken, None while all is well."""
        return "the server is shutting down" if self.draining else self.ended

    # ---- requests -----------------------------------------------------------------------------

    def admit(self) -> Job:
        """Give a new request its place; the caller closes it.

        Raises:
            ApiError: too many requests wait or run, the server drains, or generation has ended.
        """
        reason = self.why_unavailable
        if reason is not None:
            raise unavailable(reason, "shutting_down" if self.draining else "generation_ended")
        if len(self.jobs) >= self.options.max_queue:
            raise ApiError(
                429,
                f"{len(self.jobs)} requests wait or run, and no more are taken; try again later",
                "queue_full",
                retry_after=1,
            )
        job = Job(self, f"request-{next(self._count)}", self.options.request_timeout)
        self.jobs[job.id] = job
        return job

    def adapter(self, model: str) -> str | None:
        """Give the adapter that `model` names, None for the model without one.

        Raises:
            ApiError: there is neither.
        """
        if model == self.name:
            return None
        if model not in self.bank:
            raise unknown(model)
        return model

    async def tokens(self, body: Completion | Chat) -> list[int]:
        """Give the prompt as tokens.

        Raises:
            ApiError: there are none, one is not in the vocabulary, or the chat cannot be written.
        """
        ids = await self._in(self._words, self._encode, body)
        param = "messages" if isinstance(body, Chat) else "prompt"
        if not ids:
            raise invalid("the prompt is empty", param)
        wrong = next((one for one in ids if not 0 <= one < self._vocabulary), None)
        if wrong is not None:
            raise invalid(f"token {wrong} is not one of the model's {self._vocabulary}", param)
        return ids

    def _encode(self, body: Completion | Chat) -> list[int]:
        if isinstance(body, Completion):
            if isinstance(body.prompt, list):
                return body.prompt
            return list(self.tokenizer(body.prompt, verbose=False).input_ids)
        if not getattr(self.tokenizer, "chat_template", None):
            raise invalid(
                "the tokenizer of this model has no chat template; use /v1/completions", "messages"
            )
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything
            raise invalid(f"the chat template refuses: {error}", "messages") from error
        # the template writes the special tokens itself
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def new_tokens(self, prompt: int, wanted: int | None) -> int:
        """Give how many tokens may follow a prompt.

        Raises:
            ApiError: the prompt is too long, or more are wanted than may be.
        """
        most, longest = self.options.max_new_tokens, self.options.max_prompt_tokens
        if longest is not None and prompt > longest:
            raise invalid(
                f"the prompt has {prompt} tokens; at most {longest} are allowed",
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > most:
            raise invalid(f"max_tokens is {wanted}; at most {most} are allowed", "max_tokens")
        least = 1 if wanted is None else wanted
        if self.context is not None and prompt + least > self.context:
            raise invalid(
                f"the prompt has {prompt} tokens and {least} are to follow, but this server has"
                f" room for {self.context}",
                code="context_length_exceeded",
            )
        room = most if self.context is None else min(most, self.context - prompt)
        return room if wanted is None else wanted

    async def lease(self, adapter: str | None, seconds: float) -> Lease:
        """Hold the adapter in a slot.

        Raises:
            ApiError: it is gone, it cannot be served, or no slot became free in time.
        """
        try:
            return await self.slots.lease(adapter, seconds)
        except ApiError:
            raise
        except Exception as error:
            raise self.folder.explained(error, adapter or "") from error

    def begin(
        self, job: Job, lease: Lease, prompt: Sequence[int], sampling: Sampling, limit: int
    ) -> None:
        """Add a job to the batch; the lease is taken over."""
        more: dict[str, Any] = {"top_p": float(sampling.top_p)} if self.options.top_p else {}
        streaming = sampling.stream or bool(sampling.stop)
        try:
            self.batching.add_request(
                prompt,
                lease=lease,
                request_id=job.id,
                max_new_tokens=limit,
                streaming=streaming,
                record_timestamps=not streaming,  # else the first token is noticed as it comes
                temperature=float(sampling.temperature),
                **more,
            )
        except RuntimeError as error:
            raise unavailable(str(error), "generation_ended") from error
        except ValueError as error:
            raise invalid(str(error)) from error

    def end(self, job: Job, cancel: bool) -> None:
        """Forget a job, and what it holds."""
        del self.jobs[job.id]
        if cancel:
            self.batching.cancel_request(job.id)
        self.metrics.count(job)
        self.slots.wake()

    # ---- adapters -----------------------------------------------------------------------------

    async def manage(self, action: Callable[..., _Result], *arguments: Any) -> _Result:
        """Do something to the bank in a thread, and tell those who wait for slots.

        Raises:
            ApiError: it cannot be done.
        """
        try:
            return await self._in(self._pool, action, *arguments)
        except ApiError:
            raise
        except Exception as error:
            raise self.folder.explained(error, str(arguments[0])) from error
        finally:
            self.slots.wake()

    async def _in(
        self, pool: ThreadPoolExecutor, function: Callable[..., _Result], *arguments: Any
    ) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)
