"""Answers in OpenAI's shapes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

DONE = "data: [DONE]\n\n"


def event(data: Mapping[str, Any]) -> str:
    """Give one event of a stream."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Give the account of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class Answer:
    """The shape of one answer: a chat's or a completion's, whole or in pieces."""

    model: str
    chat: bool
    with_usage: bool = False  # of a stream: a last piece accounts for it, and the others say null
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _around(self, choices: list[dict[str, Any]], piece: bool, **more: Any) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": f"{kind}.chunk" if self.chat and piece else kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def whole(self, text: str, finish_reason: str, account: dict[str, int]) -> dict[str, Any]:
        """Give the answer at once."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return self._around([choice], False, usage=account)

    def piece(
        self, text: str | None, finish_reason: str | None = None, *, role: str | None = None
    ) -> dict[str, Any]:
        """Give a piece of a stream; a chat's first has a role and its last no text."""
        if self.chat:
            delta = {} if text is None else {"content": text}
            said: dict[str, Any] = {"delta": {"role": role, **delta} if role else delta}
        else:
            said = {"text": text or ""}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return self._around([choice], True, **({"usage": None} if self.with_usage else {}))

    def account(self, account: dict[str, int]) -> dict[str, Any]:
        """Give the piece that only accounts."""
        return self._around([], True, usage=account)
