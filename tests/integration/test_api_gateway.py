"""The gateway between OpenAI's own client and a serving pod, over real sockets: what arrives, what breaks, and what a hang-up ends."""

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tests.support.front_end import FakeKube, a_model, served
from tunewright_api.app import create_app
from tunewright_api.settings import Settings
from tunewright_crds import names

WAIT_SECONDS = 60


@dataclass
class Engine:
    """A serving pod. What it does is told by the last message: stream, fail, refuse, break, hang."""

    asked: list[dict[str, Any]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            return await self._answer(request, body, body["messages"][-1]["content"])

        return app

    async def _answer(self, request: Request, body: dict[str, Any], wish: str) -> Response:
        if wish == "fail":
            return JSONResponse({"error": {"message": "CUDA broke", "type": "server_error", "param": None, "code": None}}, 500)
        if wish == "refuse":
            return JSONResponse(
                {"error": {"message": "too long", "type": "x", "param": "messages", "code": "context_length_exceeded"}}, 400
            )
        if wish == "hang":
            while not await request.is_disconnected():
                await asyncio.sleep(0.02)
            self.left.set()
        if body.get("stream"):
            return StreamingResponse(self._stream(wish), media_type="text/event-stream")
        return JSONResponse(completion(body["model"], message={"role": "assistant", "content": f"{wish}!"}))

    async def _stream(self, wish: str) -> AsyncIterator[str]:
        try:
            yield chunk("one ")
            if wish == "break":
                raise ConnectionResetError("the pod was killed")
            if wish == "wait":
                await self.go_on.wait()
            yield chunk("two")
            yield "data: [DONE]\n\n"
        finally:
            self.left.set()


def completion(model: str, **choice: Any) -> dict[str, Any]:
    kind = "chat.completion.chunk" if "delta" in choice else "chat.completion"
    return {"id": "c1", "object": kind, "created": 1, "model": model, "choices": [{"index": 0, "finish_reason": None} | choice]}


def chunk(text: str) -> str:
    return f"data: {json.dumps(completion('tuned', delta={'content': text}))}\n\n"


class ToEngine(httpx.AsyncHTTPTransport):
    """What cluster DNS does: sends calls for a Service to where it really is."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = httpx.URL(address)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(host=self._address.host, port=self._address.port)
        return await super().handle_async_request(request)


@dataclass
class Running:
    """A front end with an engine behind it."""

    engine: Engine
    url: str
    front: Any

    def client(self, token: str = "t") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=WAIT_SECONDS)


@contextlib.asynccontextmanager
async def running(engine_address: str = "") -> AsyncIterator[Running]:
    kube = FakeKube(users={"t": {"username": "ann"}})
    kube.rights = {("ann", "get", names.MODELS, "team-a")}
    kube.objects[names.MODELS] = [a_model("tuned"), a_model("waiting", endpoint=""), a_model("hidden", "team-b")]
    engine = Engine()
    async with served(engine.app()) as (engine_url, _):
        engines = httpx.AsyncClient(transport=ToEngine(engine_address or engine_url))
        async with served(create_app(Settings(), kube=kube.client(), engines=engines)) as (url, front):
            async with httpx.AsyncClient() as client, asyncio.timeout(WAIT_SECONDS):
                while (await client.get(f"{url}/readyz")).status_code != 200:
                    await asyncio.sleep(0.02)
            yield Running(engine, url, front)


def asking(wish: str, model: str = "team-a/tuned") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": wish}]}


async def test_openais_client_lists_asks_and_streams() -> None:
    async with running() as here, here.client() as client:
        assert [model.id async for model in client.models.list()] == ["team-a/tuned", "team-a/tuned:base"]
        assert (await client.models.retrieve("team-a/tuned")).owned_by == "team-a"
        said = await client.chat.completions.create(**asking("hello"), temperature=0.5)
        assert said.choices[0].message.content == "hello!"
        await client.chat.completions.create(**asking("hello", "team-a/tuned:base"))
        assert [body["model"] for body in here.engine.asked] == ["tuned", ":base"]
        assert here.engine.asked[0]["temperature"] == 0.5
        stream = await client.chat.completions.create(**asking("hello"), stream=True)
        assert [part.choices[0].delta.content async for part in stream] == ["one ", "two"]


async def test_a_stream_arrives_as_it_is_made_and_ends_in_the_pod_when_the_caller_leaves() -> None:
    async with running() as here, here.client() as client, asyncio.timeout(WAIT_SECONDS):
        stream = await client.chat.completions.create(**asking("wait"), stream=True)
        async for part in stream:
            assert part.choices[0].delta.content == "one "  # while the pod still waits
            break
        await stream.close()
        await here.engine.left.wait()


async def test_a_caller_who_leaves_before_the_first_word_ends_the_request_too() -> None:
    async with running() as here, httpx.AsyncClient(timeout=WAIT_SECONDS) as client, asyncio.timeout(WAIT_SECONDS):
        headers = {"Authorization": "Bearer t"}
        call = asyncio.create_task(client.post(f"{here.url}/v1/chat/completions", json=asking("hang"), headers=headers))
        while not here.engine.asked:
            await asyncio.sleep(0.02)
        call.cancel()
        await here.engine.left.wait()


REFUSALS: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str]] = {
    "the engine fails": (asking("fail"), openai.InternalServerError, "engine_error"),
    "the engine refuses": (asking("refuse"), openai.BadRequestError, "context_length_exceeded"),
    "a model that does not answer yet": (asking("x", "team-a/waiting"), openai.InternalServerError, "model_not_ready"),
    "a model that is not": (asking("x", "team-a/none"), openai.NotFoundError, "model_not_found"),
    "no id at all": (asking("x", "gpt-4"), openai.NotFoundError, "model_not_found"),
    "a model of others": (asking("x", "team-b/hidden"), openai.PermissionDeniedError, "forbidden"),
    "a model of others that is not": (asking("x", "team-b/none"), openai.PermissionDeniedError, "forbidden"),
    "too long a conversation": (asking("x" * 2**20), openai.APIStatusError, "request_too_large"),
}


async def test_refusals_are_openais_error_object() -> None:
    async with running() as here, here.client() as client:
        for case, (request, kind, code) in REFUSALS.items():
            with pytest.raises(kind) as told:
                await client.chat.completions.create(**request)
            assert told.value.code == code, case
            assert told.value.request_id, case
        with pytest.raises(openai.AuthenticationError):
            await here.client("unknown").models.list()


async def test_a_pod_that_cannot_be_reached_is_503_with_retry_after() -> None:
    async with running("http://127.0.0.1:1") as here, here.client() as client:
        with pytest.raises(openai.InternalServerError) as told:
            await client.chat.completions.create(**asking("hello"))
    assert (told.value.status_code, told.value.response.headers["retry-after"]) == (503, "5")


async def test_a_stream_that_breaks_says_so_inside() -> None:
    async with running() as here, here.client() as client:
        stream = await client.chat.completions.create(**asking("break"), stream=True)
        assert (await anext(stream)).choices[0].delta.content == "one "
        with pytest.raises(openai.APIError, match="broke off"):
            await anext(stream)


async def test_sigterm_lets_a_stream_end() -> None:
    async with running() as here, here.client() as client, asyncio.timeout(WAIT_SECONDS):
        stream = await client.chat.completions.create(**asking("wait"), stream=True)
        words = []
        async for part in stream:
            words.append(part.choices[0].delta.content)
            if not here.front.should_exit:
                here.front.handle_exit(signal.SIGTERM, None)
                await asyncio.sleep(0.5)  # the server is ending now
                here.engine.go_on.set()
        assert words == ["one ", "two"]
