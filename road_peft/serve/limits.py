"""What stands between a client and the engine: the key, the size of a body, whether it is there."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from road_peft.serve.errors import GONE, ApiError, invalid, not_valid
from road_peft.serve.metrics import Metrics

_BODY_SECONDS = 30.0  # for all of a body to arrive

_Result = TypeVar("_Result")
_Model = TypeVar("_Model", bound=BaseModel)


def key_check(api_key: str | None) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """Give what refuses requests that do not have the key; nothing is refused if there is none."""

    async def check(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                401, "a valid key is needed: Authorization: Bearer KEY", "invalid_api_key"
            )

    return check


async def read(request: Request, kind: type[_Model], most: int) -> _Model:
    """Read the body of a request, at most `most` bytes, whether it tells its length or not.

    Raises:
        ApiError: it is too long or too slow, or it is not what it should be.
    """
    # only JSON: a page in a browser can send other types to this machine without being asked
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise invalid("the body must have Content-Type: application/json", code="invalid_type")
    try:
        body = await asyncio.wait_for(_bytes(request, most), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took over {_BODY_SECONDS:g} s", "timeout") from None
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise not_valid(error) from None


async def _bytes(request: Request, most: int) -> bytes:
    told = request.headers.get("content-length", "")
    parts: list[bytes] = []
    size = int(told) if told.isascii() and told.isdigit() and len(told) < 20 else 0
    if size <= most:
        size = 0
        while size <= most:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise left()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body", False):
                break
    if size > most:
        error = ApiError(413, f"the body is over {most} bytes", "body_too_large")
        error.headers["Connection"] = "close"  # the rest of it is not read
        raise error
    return b"".join(parts)


def left() -> ApiError:
    """Tell that nobody is there to be told."""
    return ApiError(GONE, "the client has left", "client_left")


async def while_there(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Do `work`, and cancel it when the client leaves.

    Raises:
        ApiError: the client has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise left()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Measured:
    """Middleware that counts requests and their time, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = GONE, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            # the pattern of the route: what clients make up must not become labels
            endpoint = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.duration.labels(endpoint).observe(time.perf_counter() - began)
