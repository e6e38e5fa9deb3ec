"""Errors as clients see them: a status, and OpenAI's `{"error": ...}`."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

GONE = 499  # the client left before its answer; nobody sees this status but the metrics

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Ends a request with a status, a message, and a code that programs can read."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """Give the error in OpenAI's shape."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else _TYPES[400])
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Refuse what the client sent."""
    return ApiError(400, message, code, param=param)


def unavailable(message: str, code: str) -> ApiError:
    """Refuse what would have been right, had the server been able."""
    return ApiError(503, message, code, retry_after=1)


def unknown(model: str) -> ApiError:
    """Tell that no model or adapter has this name."""
    message = f"there is no model or adapter {model[:200]!r}; GET /v1/models lists them"
    return ApiError(404, message, "model_not_found", param="model")


def not_valid(error: ValidationError) -> ApiError:
    """Name the first field that pydantic refuses, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "is not known here; leave it out"
    return invalid(f"{where}: {reason}" if where else reason, where or None)
