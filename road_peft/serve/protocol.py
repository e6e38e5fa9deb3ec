"""What clients may ask for: OpenAI's fields as far as they can be honoured, and no others.

A field that would change the answer and cannot be honoured is refused by name. One that changes
nothing is left aside.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# field of OpenAI's: the values that ask for nothing
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "seed": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
_HARMLESS = (
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"),
    *("service_tier", "store", "user"),
)
_MOST_STOPS, _LONGEST_STOP = 4, 256


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("a JSON object is needed here")
        return {key: value for key, value in data.items() if value is not None}


class StreamOptions(_Body):
    """What a stream tells beside the text."""

    include_usage: bool = False


class Sampling(_Body):
    """What completions and chats have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    stop: list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_cannot_be(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("the body must be a JSON object")
        for name, neutral in _UNSUPPORTED.items():
            value = data.get(name)
            if value is not None and not any(_same(value, one) for one in neutral):
                allowed = "".join(f" or set it to {one!r}" for one in neutral)
                raise ValueError(f"{name} is not supported; leave it out{allowed}")
        return {k: v for k, v in data.items() if k not in _UNSUPPORTED and k not in _HARMLESS}

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
            raise ValueError("a string or a list of strings is needed")
        if len(stops) > _MOST_STOPS or not all(0 < len(s) <= _LONGEST_STOP for s in stops):
            raise ValueError(
                f"at most {_MOST_STOPS} strings are allowed, of 1 to {_LONGEST_STOP} characters"
            )
        return stops

    @model_validator(mode="after")
    def _usage_of_streams_only(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams; set stream to true or leave it out")
        return self


def _same(value: Any, neutral: Any) -> bool:
    """Tell whether two values are equal, a truth value being no number."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


class Completion(Sampling):
    """The body of POST /v1/completions."""

    prompt: str | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(part, (str, list)) for part in value):
            raise ValueError("several prompts in one request are not supported; send one each")
        if isinstance(value, list):
            whole = all(isinstance(part, int) and not isinstance(part, bool) for part in value)
        else:
            whole = isinstance(value, str)
        if not whole:
            raise ValueError("a string or a list of token ids is needed")
        return value


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str = ""
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return "".join(_text_of(part) for part in value)


def _text_of(part: Any) -> str:
    if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
        raise ValueError('only parts {"type": "text", "text": ...} are supported')
    if not isinstance(part["text"], str):
        raise ValueError("the text of a part must be a string")
    return part["text"]


class Chat(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Chat:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ; give one")
            self.max_tokens = self.max_completion_tokens
        return self


class LoadAdapter(_Body):
    """The body of POST /v1/load_adapter; `path` is relative to the folder of adapters."""

    name: str
    path: str | None = None
    replace: bool = False


class NameAdapter(_Body):
    """The body of POST /v1/unload_adapter, /v1/pin_adapter and /v1/unpin_adapter."""

    name: str
