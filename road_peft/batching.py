"""Continuous batching with an adapter for each request, on transformers' own manager.

The manager packs the tokens of all requests of a step into one row, so adapters are chosen by
token: whenever it has laid out a batch, the slots of the tokens are written into a tensor that
never moves, and layers read that. Captured CUDA graphs replay with it as well.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig

from road_peft.routing import Routing

_CHILD = "__child#"  # transformers marks further sequences of a request so


class Held(Protocol):
    """A slot that stays what it is until `release`."""

    slot: int

    def release(self) -> None:
        """Give it back."""
        ...


class Adapters(Protocol):
    """Where requests find their adapters: a `RoadBank`, or those loaded in a model.

    `lora_names` are the adapters of slots 0, 1, ... as far as one of them has a LoRA.
    """

    model: nn.Module
    routing: Routing
    lora_names: Sequence[str]

    def acquire(self, name: str | None, timeout: float = 0) -> Held:
        """Hold the slot of an adapter."""
        ...

    def table(self, layer: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the coefficients and group sizes of all slots."""
        ...


@dataclass
class _Request:
    """A request whose outputs are still to be delivered, and its sequences without the last one."""

    held: Held
    unfinished: set[str]


class _TokenRoute:
    """The slots of the tokens of one packed batch, in tensors that never move."""

    def __init__(self, adapters: Adapters, tokens: int, requests: int) -> None:
        model: Any = adapters.model
        self.names, self.table = adapters.lora_names, adapters.table
        # the head sees only tokens whose successor is wanted, where the model can leave others out
        keeps = model._supports_logits_to_keep()
        self._head = model.get_output_embeddings() if keeps else None
        self._of_tokens, self._of_head = (
            torch.full((size,), -1, dtype=torch.int32, device=model.device)
            for size in (tokens, requests)
        )
        self._values: dict[bool, list[int]] = {}

    def write(self, slots: Sequence[int], batch: Sequence[Any]) -> None:
        """Take the slots of the requests of a batch that transformers has laid out."""
        counted = list(zip(slots, batch, strict=True))
        self._values = {
            False: [s for s, request in counted for _ in range(request.query_length)],
            True: [s for s, request in counted if request.has_new_token],
        }
        for buffer, values in (
            (self._of_tokens, self._values[False]),
            (self._of_head, self._values[True]),
        ):
            buffer[: len(values)] = torch.tensor(values, dtype=torch.int32, device=buffer.device)
            buffer[len(values) :] = -1

    def slots(self, layer: Any, x: Tensor) -> Tensor:
        shape = x.shape[:-1] if x.is_floating_point() else x.shape  # an embedding sees ids
        buffer = self._of_head if layer is self._head else self._of_tokens
        return buffer[: shape.numel()].view(shape)

    def rows_of(self, slot: int, layer: Any, x: Tensor) -> Tensor:
        values = self._values[layer is self._head]
        places = [place for place, other in enumerate(values) if other == slot]
        return torch.tensor(places, dtype=torch.int64, device=x.device)


class AdapterBatching:
    """Generates for requests that come and go, each with its own adapter.

    A context manager around transformers' `ContinuousBatchingManager`, whose settings it takes.
    Two are fixed: prompts share no cached blocks, since equal tokens under different adapters have
    different states; and batches are prepared one at a time. Requests may be added and cancelled
    from any thread.

    Raises:
        ValueError: the model cannot generate by continuous batching, or keeps a manager already.
    """

    def __init__(
        self,
        adapters: Adapters,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *,
        warmup: bool = True,
        **options: Any,
    ) -> None:
        model: Any = adapters.model
        if not hasattr(model, "init_continuous_batching"):
            raise ValueError(
                f"{type(model).__name__} cannot generate by continuous batching; give a causal"
                " language model of transformers"
            )
        if not hasattr(ContinuousBatchingConfig, "page_size"):
            raise ValueError(
                f"transformers {transformers.__version__} does not tell how much its cache holds;"
                " continuous batching with adapters is tested with 5.23, install that"
            )
        if getattr(model, "_cached_continuous_batching_manager", None) is not None:
            raise ValueError(  # it does not know of adapters, and shares blocks
                "the model keeps a continuous batching manager of another call; end it by"
                " destroy_cached_continuous_batching_manager() first"
            )
        config = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
        config.allow_block_sharing = False
        config.use_async_batching = False
        self.adapters, self.warmup = adapters, warmup
        self._attention = model.config._attn_implementation  # the manager may choose another
        try:
            self.manager = model.init_continuous_batching(
                generation_config=copy.deepcopy(generation_config or model.generation_config),
                continuous_batching_config=config,
                **options,
            )
        except BaseException:
            self._restore_attention()
            raise
        router = self.manager.output_router
        router.deliver = self._unless_cancelled(router.deliver)
        router.deliver_batch = self._unless_cancelled(router.deliver_batch)
        self._requests: dict[str, _Request] = {}
        self._lock = threading.Lock()
        self._count = 0
        self._route: _TokenRoute | None = None

    # ---- running ------------------------------------------------------------------------------

    def __enter__(self) -> AdapterBatching:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.stop(finish=kind is None)

    def start(self) -> None:
        """Start generating in a thread of its own."""
        try:
            self._prepare()
            self.manager.start()
        except BaseException:
            self._restore_attention()
            raise

    def _prepare(self) -> None:
        manager = self.manager
        manager.batch_processor = processor = manager._create_batch_processor()
        inputs = processor.inputs_and_outputs
        self._route = _TokenRoute(
            self.adapters, processor.cache.max_batch_tokens, inputs.max_requests_per_batch
        )
        inputs.prepare_batch_tensors = self._prepare_with_slots(inputs.prepare_batch_tensors)
        if self.warmup:
            with self.adapters.routing.use(None):  # preparing sets it for the thread
                manager.warmup()

    def _restore_attention(self) -> None:
        model: Any = self.adapters.model
        if model.config._attn_implementation != self._attention:
            model.set_attn_implementation(self._attention)

    def _prepare_with_slots(self, prepare: Callable[..., None]) -> Callable[..., None]:
        def prepare_batch(*args: Any, **kwargs: Any) -> None:
            batch = args[0] if args else kwargs["requests_in_batch"]
            slots = [self._slot(request.state.request_id) for request in batch]
            prepare(*args, **kwargs)
            assert self._route is not None
            self._route.write(slots, batch)
            self.adapters.routing.current = self._route  # of the thread that generates

        return prepare_batch

    def _slot(self, sequence: str) -> int:
        with self._lock:
            request = self._requests.get(sequence.partition(_CHILD)[0])
        return -1 if request is None else request.held.slot  # a warm-up, or cancelled just now

    def stop(self, finish: bool = True, timeout: float | None = None) -> None:
        """Stop generating, after all requests have finished if `finish`; else these fail.

        Those that have not finished after `timeout` seconds fail as well.
        """
        try:
            self.manager.stop(block=True, timeout=timeout, hard_stop=not finish)
            self.manager.destroy()
        finally:
            self._restore_attention()
            with self._lock:
                requests = list(self._requests.values())  # outputs may still be fetched
            for request in requests:
                request.held.release()

    @property
    def error(self) -> Exception | None:
        """What ended the generation thread, None while it is sound."""
        return self.manager.background_thread_status.fatal_error

    # ---- requests -----------------------------------------------------------------------------

    def add_request(
        self,
        input_ids: Sequence[int],
        adapter_name: str | None = None,
        *,
        lease: Held | None = None,
        request_id: str | None = None,
        timeout: float = 0,
        on_output: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> str:
        """Queue a prompt for an adapter, None or "__base__" for none; give the request's name.

        The adapter as it is now is held until the request has finished. `on_output` is called in
        the running event loop with each `GenerationOutput`; without it `get_result` gives them.
        `options` are those of transformers: max_new_tokens, streaming, eos_token_id, temperature
        and so on. `timeout` seconds are waited for a slot. A `lease` that the caller holds already
        is taken over in place of `adapter_name`, and given back also if this raises. Do not give
        the name of a cancelled request to another one.

        Raises:
            LookupError, RuntimeError, ValueError: the adapter is unknown, has no slot, or cannot
                be served; the prompt cannot be; the queue is full; or generation has ended.
        """
        prompt = list(input_ids)
        held = self.adapters.acquire(adapter_name, timeout) if lease is None else lease
        try:
            self._check_prompt(prompt, options.get("max_new_tokens"))
            request_id = self._enter(request_id, held)
        except ValueError:
            held.release()
            raise
        try:
            if on_output is not None:
                self._call_back(request_id, on_output)
            accepted = self.manager.add_request(prompt, request_id=request_id, **options)
            if accepted is None:
                raise RuntimeError(f"generation has ended and takes no requests: {self.error}")
        except BaseException as error:
            self._leave(request_id)
            if isinstance(error, queue.Full):
                raise RuntimeError("the queue of requests is full; try again later") from error
            raise
        return request_id

    def _check_prompt(self, prompt: list[int], max_new_tokens: int | None) -> None:
        """Refuse what would end the generation of all requests."""
        size = self.manager.model.config.get_text_config().vocab_size
        if not prompt or min(prompt) < 0 or max(prompt) >= size:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; give at least one, each from 0 to {size - 1}"
            )
        processor = self.manager.batch_processor
        if processor is None or processor.cache.read_cache_limit is not None:
            return  # not started, or the cache forgets
        new = max_new_tokens or self.manager.generation_config.max_new_tokens or 1
        length, room = len(prompt) + new - 1, processor.cache.max_tokens_read
        if length > room:
            raise ValueError(
                f"the prompt of {len(prompt)} tokens and {new} new ones need room for {length}, but"
                f" the cache holds {room}; shorten them, or give the cache more blocks (num_blocks)"
            )

    def _enter(self, request_id: str | None, held: Held) -> str:
        with self._lock:
            if request_id is None:
                while request_id is None or request_id in self._requests:
                    request_id = f"request-{self._count}"
                    self._count += 1
            if request_id in self._requests or _CHILD in request_id:
                raise ValueError(f"there is a request {request_id!r} already; choose another name")
            self._requests[request_id] = _Request(held, set(self._sequences(request_id)))
            return request_id

    def _sequences(self, request_id: str) -> list[str]:
        count = self.manager.num_return_sequences - 1
        return [request_id, *(f"{request_id}{_CHILD}{i}" for i in range(count))]

    def _call_back(self, request_id: str, on_output: Callable[[Any], None]) -> None:
        def deliver(output: Any) -> None:
            if self._take(output):
                on_output(output)

        for sequence in self._sequences(request_id):
            self.manager.register_result_handler(sequence, deliver)

    def cancel_request(self, request_id: str) -> None:
        """Stop generating for a request; nothing more of it is delivered."""
        self._leave(request_id)
        for sequence in self._sequences(request_id):
            self.manager.cancel_request(sequence)

    def get_result(self, timeout: float | None = None) -> Any:
        """Give the next `GenerationOutput` of a request without `on_output`, None if none came."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0, deadline - time.monotonic())
            output = self.manager.get_result(timeout=left)
            if output is None or self._take(output):
                return output

    def _unless_cancelled(self, deliver: Callable[[Any], None]) -> Callable[[Any], None]:
        def deliver_wanted(output: Any) -> None:
            if isinstance(output, list):
                deliver([one for one in output if self._is_wanted(one)])
            elif self._is_wanted(output):
                deliver(output)

        return deliver_wanted

    def _is_wanted(self, output: Any) -> bool:
        with self._lock:
            return output.request_id.partition(_CHILD)[0] in self._requests

    def _take(self, output: Any) -> bool:
        """Tell whether an output is to be delivered; the last one of a request ends it."""
        request_id = output.request_id.partition(_CHILD)[0]
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None and output.is_finished():
                request.unfinished.discard(output.request_id)
                if output.error is not None and output.request_id == request_id:
                    request.unfinished.clear()  # what fails before it forks has no others
        if request is not None and not request.unfinished:
            self._leave(request_id)
        return request is not None

    def _leave(self, request_id: str) -> None:
        """Forget a request and give its slot back."""
        with self.manager.output_router._lock:
            for sequence in self._sequences(request_id):
                self.manager.output_router.result_handlers.pop(sequence, None)
        with self._lock:
            request = self._requests.pop(request_id, None)
        if request is not None:
            request.held.release()


class LoadedAdapters:
    """The adapters in a model's layers as slots, for the time of one `generate_batch`."""

    def __init__(self, model: nn.Module, routing: Routing, names: Sequence[str]) -> None:
        self.model, self.routing = model, routing
        self.names: Sequence[str] = list(names)
        self.lora_names: Sequence[str] = self.names
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def acquire(self, name: str | None, timeout: float = 0) -> Held:
        """Give the place of the name; there is nothing to wait for or to release."""
        return _Place(self.names.index(name) if name in self.names else -1)

    @torch.no_grad()
    def table(self, layer: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Give the table of `layer`, made when it is first asked for."""
        if layer not in self._tables:
            self._tables[layer] = layer.coefficient_table(self.names, like)
        return self._tables[layer]


class _Place:
    def __init__(self, slot: int) -> None:
        self.slot = slot

    def release(self) -> None:
        pass


def generate_batch(
    adapters: LoadedAdapters,
    inputs: Sequence[Sequence[int]],
    adapter_names: Sequence[str],
    *,
    progress_bar: bool = False,
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    warmup: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Generate for all prompts, prompt i with the adapter `adapter_names[i]`.

    Gives transformers' `GenerationOutput` by the name of the request, in the order of the prompts,
    further sequences of a prompt before its first. `options` (max_new_tokens, record_timestamps)
    are those of a request.

    Raises:
        ValueError: there is not one name for each prompt.
        RuntimeError: a request failed.
    """
    if len(inputs) != len(adapter_names):
        raise ValueError(
            f"there are {len(inputs)} prompts and {len(adapter_names)} adapter_names; give one each"
        )
    if not inputs:
        return {}
    found: dict[str, Any] = {}
    config: Any = generation_config or adapters.model.generation_config
    total = len(inputs) * (config.num_return_sequences or 1)
    with (
        AdapterBatching(
            adapters, generation_config, continuous_batching_config, warmup=warmup
        ) as batching,
        tqdm(total=total, disable=not progress_bar, unit="request") as bar,
    ):
        ids = [
            batching.add_request(tokens, name, **options)
            for tokens, name in zip(inputs, adapter_names, strict=True)
        ]
        while len(found) < total:
            output = batching.get_result(timeout=1)
            if output is not None and output.error is not None:
                raise RuntimeError(f"request {output.request_id} failed: {output.error}")
            if output is not None and output.is_finished():
                found[output.request_id] = output
                bar.update()
            elif output is None and not batching.manager.is_running():
                raise RuntimeError(f"generation ended early: {batching.error}")
        order = [name for first in ids for name in (*batching._sequences(first)[1:], first)]
    return {name: found[name] for name in order}
