"""The engine's HTTP interface, with the names of OpenAI's and vLLM's."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from tunewright_trainer.prepare.template import Unrenderable, render_prompt_ids
from tunewright_trainer.serve import engine as engines
from tunewright_trainer.serve.adapters import Adapters
from tunewright_trainer.serve.engine import Engine, Piece, Served
from tunewright_trainer.serve.metrics import Metrics
from tunewright_trainer.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    Options,
    Reply,
    UnloadRequest,
    Usage,
    parse,
)
from tunewright_trainer.serve.turns import end_of_turn, stop_ids

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 2**20
_LOOK_SECONDS: Final = 1.0  # how often a waiting request looks whether its client is still there

Handler = Callable[[Request], Awaitable[Response]]


class Draining:
    """Whether the engine is on its way out: no new requests."""

    def __init__(self) -> None:
        self.begun = False


def make_app(engine: Engine, adapters: Adapters, draining: Draining) -> FastAPI:
    """The application. It holds no state of its own."""
    app = FastAPI(title="Tunewright engine", openapi_url=None)
    metrics = Metrics(engine)

    def route(method: str, path: str, handler: Handler) -> None:
        app.add_api_route(path, _guarded(handler, path, metrics), methods=[method])

    async def health(_: Request) -> Response:
        _refuse_when_draining(draining)
        if not engine.alive:
            raise ApiError(503, "the engine's thread has ended")
        return _json({"status": "ok"})

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [_entry(served, engine.base) for served in (engine.base, *engine.adapters.values())]})

    async def chat(request: Request) -> Response:
        _refuse_when_draining(draining)
        wanted = parse(ChatRequest, await _body(request))
        served = engine.find(wanted.model)
        messages = [message.plain() for message in wanted.messages]
        prompt = await asyncio.to_thread(_rendered, engine, served, messages)
        options = wanted.options()
        ends = await asyncio.to_thread(end_of_turn, engine.tokenizer, served.template)
        options.stops = [*options.stops, *ends.texts]
        reply = Reply(chat=True, model=wanted.model)
        return await _answer(request, engine, metrics, wanted, served, prompt, options, ends.ids, reply)

    async def complete(request: Request) -> Response:
        _refuse_when_draining(draining)
        wanted = parse(CompletionRequest, await _body(request))
        served = engine.find(wanted.model)
        prompt = _prompt_ids(engine, wanted.prompt)
        reply = Reply(chat=False, model=wanted.model)
        return await _answer(request, engine, metrics, wanted, served, prompt, wanted.options(), stop_ids(engine.tokenizer), reply)

    async def load(request: Request) -> Response:
        wanted = parse(LoadRequest, await _body(request))
        await asyncio.to_thread(adapters.load, wanted)
        return _json({"status": "ok"})

    async def unload(request: Request) -> Response:
        wanted = parse(UnloadRequest, await _body(request))
        await asyncio.to_thread(adapters.unload, wanted.lora_name)
        return _json({"status": "ok"})

    async def expose(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    route("GET", "/health", health)
    route("GET", "/v1/models", models)
    route("POST", "/v1/chat/completions", chat)
    route("POST", "/v1/completions", complete)
    route("POST", "/v1/load_lora_adapter", load)
    route("POST", "/v1/unload_lora_adapter", unload)
    route("GET", "/metrics", expose)
    return app


def _guarded(handler: Handler, path: str, metrics: Metrics) -> Handler:
    """The handler, with errors as OpenAI's error object, and counted."""

    async def handle(request: Request) -> Response:
        try:
            response = await handler(request)
        except ApiError as error:
            response = _json(error.body(), error.status)
        except Exception:
            log.exception("%s failed", path)
            response = _json(ApiError(500, "unforeseen error; see the engine's log").body(), 500)
        metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return handle


def _refuse_when_draining(draining: Draining) -> None:
    if draining.begun:
        raise ApiError(503, "the engine is shutting down; another one answers", code="shutting_down")


async def _body(request: Request) -> bytes:
    """The whole body, up to `MAX_BODY_BYTES`."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
    return body


def _rendered(engine: Engine, served: Served, messages: list[dict[str, str]]) -> list[int]:
    try:
        return render_prompt_ids(engine.tokenizer, messages, served.template)
    except Unrenderable as error:
        raise ApiError(400, f"the model's chat template refuses these messages: {str(error.__cause__)[:300]}", param="messages") from error


def _prompt_ids(engine: Engine, prompt: str | list[str] | list[int]) -> list[int]:
    if isinstance(prompt, str):
        return list(engine.tokenizer(prompt).input_ids)
    if isinstance(prompt[0], str):
        return list(engine.tokenizer(prompt[0]).input_ids)
    tokens = [int(token) for token in prompt]
    vocabulary = int(engine.network.config.vocab_size)
    if any(not 0 <= token < vocabulary for token in tokens):
        raise ApiError(400, f"prompt: token ids are from 0 to {vocabulary - 1}", param="prompt", code="invalid_value")
    return tokens


def _check_length(engine: Engine, prompt: list[int], options: Options, param: str) -> None:
    if not prompt:
        raise ApiError(400, "the prompt is empty", param=param, code="invalid_value")
    if (options.max_tokens or 1) > engine.room(len(prompt)):
        raise ApiError(
            400,
            f"the model's context is {engine.context} tokens; the prompt has {len(prompt)} and the answer may have {options.max_tokens or 1}",
            param=param,
            code="context_length_exceeded",
        )


async def _answer(
    request: Request,
    engine: Engine,
    metrics: Metrics,
    wanted: ChatRequest | CompletionRequest,
    served: Served,
    prompt: list[int],
    options: Options,
    stops: frozenset[int],
    reply: Reply,
) -> Response:
    _check_length(engine, prompt, options, "messages" if reply.chat else "prompt")
    usage = Usage(prompt=len(prompt))
    pieces = _pieces(request, engine, engines.Request(served, prompt, options, stops, emit=_nowhere), usage, metrics)
    if not wanted.stream:
        texts, reason = [], "stop"
        async for piece in pieces:
            texts.append(piece.text)
            reason = piece.finish_reason or reason
        return _json(reply.whole("".join(texts), reason, usage))
    first = await anext(pieces)  # an error before the first piece is still an answer with a status of its own
    tell_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
    return StreamingResponse(_events(first, pieces, reply, usage, tell_usage=tell_usage), media_type="text/event-stream")


async def _pieces(request: Request, engine: Engine, generation: engines.Request, usage: Usage, metrics: Metrics) -> AsyncIterator[Piece]:
    """The pieces of a generation as they come, which ends when nobody listens any more."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Piece] = asyncio.Queue()
    generation.emit = lambda piece: _deliver(loop, arrived, piece)
    engine.submit(generation)
    try:
        while True:
            try:
                piece = await asyncio.wait_for(arrived.get(), _LOOK_SECONDS)
            except TimeoutError:
                if await request.is_disconnected():
                    raise ApiError(499, "the client went away") from None
                continue
            usage.completion = piece.tokens
            if piece.error is not None:
                raise piece.error
            yield piece
            if piece.last:
                return
    finally:
        generation.cancelled = True
        metrics.prompt_tokens.inc(usage.prompt)
        metrics.generated_tokens.inc(usage.completion)


def _deliver(loop: asyncio.AbstractEventLoop, arrived: "asyncio.Queue[Piece]", piece: Piece) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(arrived.put_nowait, piece)


def _nowhere(_: Piece) -> None:
    """Where a generation's pieces go before anybody listens."""


async def _events(first: Piece, pieces: AsyncIterator[Piece], reply: Reply, usage: Usage, *, tell_usage: bool) -> AsyncIterator[bytes]:
    """The stream as server-sent events."""
    try:
        yield _event(reply.chunk("", first=True)) if reply.chat else b""
        piece = first
        while True:
            if piece.text:
                yield _event(reply.chunk(piece.text))
            if piece.last:
                break
            piece = await anext(pieces)
        yield _event(reply.chunk("", piece.finish_reason))
        if tell_usage:
            yield _event(reply.usage_chunk(usage))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    except Exception:
        log.exception("a stream failed")
        yield _event(ApiError(500, "unforeseen error; see the engine's log").body())
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _entry(served: Served, base: Served) -> dict[str, Any]:
    parent = None if served is base else base.id
    return {"id": served.id, "object": "model", "created": 0, "owned_by": "tunewright", "version": served.version, "parent": parent}
