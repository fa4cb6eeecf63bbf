"""OpenAI's requests and answers, as far as the engine goes; what it does not do is refused by name."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_STOPS: Final = 4  # as OpenAI's interface says
MAX_STOP_CHARACTERS: Final = 256


class ApiError(Exception):
    """An answer other than 200, as OpenAI's error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Closed):
    """A part of a message's content; text is all that a language model reads."""

    type: Literal["text"]
    text: str


class Message(_Closed):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it. ``developer`` is OpenAI's newer word for ``system``."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Closed):
    include_usage: bool = False


class TextFormat(_Closed):
    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class _Request(_Closed):
    """What both kinds of completion share. Fields with one allowed value are what clients send without asking for anything."""

    model: str = Field(max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)

    def options(self) -> "Options":
        """The request's sampling options, with OpenAI's defaults."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Options(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stops=stops,
            seed=self.seed,
        )


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: TextFormat | None = None

    def options(self) -> "Options":
        options = super().options()
        options.max_tokens = self.max_completion_tokens or self.max_tokens
        return options


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[int], Field(min_length=1)]


class LoadRequest(_Closed):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    lora_path: str = Field(min_length=1, max_length=2048)
    version: str = Field("", max_length=63)


class UnloadRequest(_Closed):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=253)


@dataclass
class Options:
    """How to sample. ``max_tokens`` None: as far as the context goes."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stops: Sequence[str] = ()
    seed: int | None = None


T = TypeVar("T", bound=BaseModel)


def parse(kind: type[T], body: bytes) -> T:
    """The request in ``body``; `ApiError` 400 naming the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Where a field may be a text or a list, the deepest error is about the one that the caller meant.
        problem = max(error.errors(include_url=False, include_input=False, include_context=False), key=lambda found: len(found["loc"]))
        param = ".".join(str(part) for part in problem["loc"] if not _names_a_branch(part)) or None
        if problem["type"] == "extra_forbidden":
            raise ApiError(400, f"{param} is not supported", param=param, code="unsupported_parameter") from None
        raise ApiError(400, f"{param or 'body'}: {problem['msg']}", param=param, code="invalid_value") from None


def _names_a_branch(part: int | str) -> bool:
    """Whether part of an error's place is pydantic's name of a type in a union rather than something that the caller wrote."""
    return isinstance(part, str) and (part in ("str", "TextPart") or "[" in part)


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int
    completion: int = 0

    def body(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": self.prompt + self.completion}


@dataclass
class Reply:
    """Makes the answers to one request: chunks of a stream, or the whole."""

    chat: bool
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _envelope(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def whole(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        """The answer without streaming."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._envelope("chat.completion" if self.chat else "text_completion") | {"choices": [choice], "usage": usage.body()}

    def chunk(self, text: str, finish_reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """A piece of a stream; a chat's first one says whose turn it is."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion") | {"choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, where the request asks for it."""
        return self._envelope("chat.completion.chunk" if self.chat else "text_completion") | {"choices": [], "usage": usage.body()}
