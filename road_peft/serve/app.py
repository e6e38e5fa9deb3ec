"""The routes of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from road_peft.serve.answers import DONE, Answer, event, usage
from road_peft.serve.engine import Engine
from road_peft.serve.errors import ApiError, invalid, unknown
from road_peft.serve.jobs import Job
from road_peft.serve.limits import Measured, key_check, read, while_there
from road_peft.serve.protocol import Chat, Completion, LoadAdapter, NameAdapter

_LINGER = 5.0  # seconds a client may take to read what is left, when its request is given up


def create_app(engine: Engine) -> FastAPI:
    """Give the application that serves `engine`, which it starts and closes.

    /health and /metrics need no key: they tell no names and no text.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.drain(engine.options.drain_seconds)
            await engine.close()

    app = FastAPI(lifespan=life, openapi_url=None)
    app.add_middleware(Measured, metrics=engine.metrics)
    app.include_router(_watching(engine))
    guarded = [Depends(key_check(engine.options.api_key))]
    for router in (_generating(engine), _managing(engine)):  # whole paths: metrics show them
        app.include_router(router, dependencies=guarded)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(RequestValidationError, _told)
    app.add_exception_handler(Exception, _told)
    return app


async def _told(request: Request, error: Exception) -> Response:
    """Tell a client of an error in OpenAI's shape; what nobody foresaw is also logged."""
    if isinstance(error, HTTPException):
        code = "not_found" if error.status_code == 404 else "not_allowed"
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        told = ApiError(error.status_code, message, code)
        told.headers = dict(error.headers or {})
    elif isinstance(error, RequestValidationError):
        told = invalid(str(error.errors()[:1]))
    elif isinstance(error, ApiError):
        told = error
    else:
        told = ApiError(500, "the server failed; its log says why", "server_error")
    return JSONResponse(told.body(), told.status, told.headers)


# ---- generating ---------------------------------------------------------------------------------


def _generating(engine: Engine) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(
            engine, request, await read(request, Completion, engine.options.max_body_bytes)
        )

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(
            engine, request, await read(request, Chat, engine.options.max_body_bytes)
        )

    return router


async def _answer(engine: Engine, request: Request, body: Completion | Chat) -> Response:
    if body.top_p != 1 and not engine.options.top_p:
        raise invalid("top_p is not supported here; leave it out or set it to 1", "top_p")
    adapter = engine.adapter(body.model)
    job = engine.admit()
    handed_over = False

    async def prepare() -> None:
        await job.start(adapter, await engine.tokens(body), body)

    try:
        await while_there(request, prepare())
        told = body.stream_options is not None and body.stream_options.include_usage
        answer = Answer(body.model, isinstance(body, Chat), with_usage=told)
        if body.stream:
            handed_over = True
            return _EventStream(_events(job, answer), job, engine.options.request_timeout)
        text = await while_there(request, job.text())
        account = usage(job.prompt_tokens, job.generated_tokens)
        return JSONResponse(answer.whole(text, job.finish_reason, account))
    finally:
        if not handed_over:
            job.close()


async def _events(job: Job, answer: Answer) -> AsyncIterator[str]:
    """Give the events of a stream; an error is one too, and ends it without the usual mark."""
    try:
        if answer.chat:
            yield event(answer.piece("", role="assistant"))
        async for text in job.pieces():
            yield event(answer.piece(text))
        yield event(answer.piece(None, job.finish_reason))
        if answer.with_usage:
            yield event(answer.account(usage(job.prompt_tokens, job.generated_tokens)))
        yield DONE
    except ApiError as error:
        yield event(error.body())


class _EventStream(StreamingResponse):
    """A stream whose job is closed however it ends, also before it began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], job: Job, seconds: float) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._job, self._seconds = job, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._job.began + self._seconds + _LINGER - time.perf_counter()
        try:  # a client that reads nothing would otherwise stay for ever
            await asyncio.wait_for(super().__call__(scope, receive, send), max(left, 0))
        except asyncio.TimeoutError:
            return
        finally:
            self._job.close()


# ---- adapters -----------------------------------------------------------------------------------


def _managing(engine: Engine) -> APIRouter:
    router = APIRouter()
    began = int(time.time())
    folder = engine.folder

    def described(name: str) -> dict[str, Any]:
        parent = None if name == engine.name else engine.name
        return {
            "id": name,
            "object": "model",
            "created": began,
            "owned_by": "road_peft",
            "parent": parent,
        }

    @router.get("/v1/models")
    async def models() -> Response:
        names = [engine.name, *engine.bank.names]
        return JSONResponse({"object": "list", "data": [described(name) for name in names]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != engine.name and name not in engine.bank:
            raise unknown(name)
        return JSONResponse(described(name))

    @router.post("/v1/load_adapter")
    async def load(request: Request) -> Response:
        body = await read(request, LoadAdapter, engine.options.max_body_bytes)
        await engine.manage(folder.load, body.name, body.path, body.replace)
        return JSONResponse(described(body.name))

    def add_action(path: str, action: Callable[[str], None], said: str) -> None:
        @router.post(path)
        async def act(request: Request) -> Response:
            body = await read(request, NameAdapter, engine.options.max_body_bytes)
            await engine.manage(action, body.name)
            return JSONResponse({"id": body.name, "object": "model", said: True})

    add_action("/v1/unload_adapter", folder.unload, "deleted")
    add_action("/v1/pin_adapter", folder.pin, "pinned")
    add_action("/v1/unpin_adapter", folder.unpin, "unpinned")
    return router


# ---- watching -----------------------------------------------------------------------------------


def _watching(engine: Engine) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        reason = engine.why_unavailable
        if reason is not None:
            return JSONResponse({"status": "unavailable", "reason": reason}, 503)
        return JSONResponse({"status": "ok"})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
