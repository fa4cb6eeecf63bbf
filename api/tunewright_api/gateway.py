"""Requests for tuned models, passed on to the pods that serve them.

Ids are ``<namespace>/<model>``, and ``<namespace>/<model>:base`` for the model that it was tuned from. Answers are passed on byte by byte as
they come; a caller who hangs up ends the request in the serving pod too.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final

import httpx
import orjson
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tunewright_api.cache import Object
from tunewright_api.errors import ApiError, BadEngine, Invalid, NotFound, Unavailable, from_status, openai_body
from tunewright_crds import names

MAX_BODY: Final = 2**20
MAX_ERROR_BODY: Final = 65_536
HUNG_UP: Final = 499  # nginx's status for a caller who did not wait for the answer; seen by logs and metrics only
_ID: Final = re.compile(r"([a-z0-9][a-z0-9-]{0,62})/([a-z0-9][a-z0-9.-]{0,252})(:base)?")
# What is taken over from a serving pod's answer; everything else (cookies, server names) is its own business.
_PASSED_HEADERS: Final = ("content-type", "cache-control", "retry-after")


def parse_id(model: Any) -> tuple[str, str, bool]:
    """Namespace, name, and whether the base model is meant; raises NotFound for anything that cannot be an id."""
    match = _ID.fullmatch(model) if isinstance(model, str) else None
    if not match:
        raise NotFound(
            "`model` must be <namespace>/<model> or <namespace>/<model>:base; GET /v1/models lists them.",
            code="model_not_found",
            param="model",
        )
    return match[1], match[2], match[3] is not None


def endpoint(model: Object) -> str:
    """Where the model answers; raises Unavailable where it is not served.

    Only a Service of the model's own namespace is called, whatever the status says: who may write a status must not thereby make the
    front end call any address that it can reach.
    """
    namespace, name = model["metadata"]["namespace"], model["metadata"]["name"]
    told = str(model.get("status", {}).get("endpoint", ""))
    if not told:
        why = str(model.get("status", {}).get("message", "")) or "nothing serves it now"
        raise Unavailable(f"The model {namespace}/{name} does not answer yet: {why}.", code="model_not_ready", retry_after=10)
    allowed = rf"http://[a-z0-9-]{{1,63}}\.{re.escape(namespace)}\.svc(\.cluster\.local)?:{names.ENGINE_PORT}/?"
    if not re.fullmatch(allowed, told):
        raise Unavailable(f"The endpoint of {namespace}/{name} is no Service of its namespace.", code="model_not_ready", retry_after=60)
    return told.rstrip("/")


def describe(model: Object) -> list[dict[str, Any]]:
    """OpenAI's model objects for one TunedModel that is served: itself, and the base of an adapter."""
    meta, spec = model["metadata"], model["spec"]
    if not model.get("status", {}).get("endpoint"):
        return []
    created = _epoch(meta["creationTimestamp"])
    full_id = f"{meta['namespace']}/{meta['name']}"
    own = {"id": full_id, "object": "model", "created": created, "owned_by": meta["namespace"], "version": spec["version"]}
    base = {"id": full_id + names.BASE_SUFFIX, "object": "model", "created": created, "owned_by": meta["namespace"]}
    return [own | {"parent": base["id"]}, base] if spec["kind"] == "adapter" else [own]


def _epoch(timestamp: str) -> int:
    return int(datetime.fromisoformat(timestamp).timestamp())


class Gateway:
    """Calls serving pods."""

    def __init__(self, client: httpx.AsyncClient, *, silence_seconds: float) -> None:
        self._client = client
        self._timeout = httpx.Timeout(silence_seconds, connect=5, pool=5)

    async def relay(self, request: Request, *, model: Object, base: bool, path: str, body: dict[str, Any], request_id: str) -> Response:
        """Passes the request on, and its answer back. Raises Unavailable or BadEngine while nothing is sent yet."""
        wanted = names.ENGINE_BASE_ID if base else model["metadata"]["name"]
        upstream = self._client.build_request(
            "POST",
            endpoint(model) + path,
            content=_json(body | {"model": wanted}),
            headers={"Content-Type": "application/json", "X-Request-Id": request_id},
            timeout=self._timeout,
        )
        gone = asyncio.create_task(_gone(request.receive))
        call = asyncio.create_task(self._client.send(upstream, stream=True))
        try:
            await asyncio.wait({gone, call}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                return Response(status_code=HUNG_UP)
            return _Relay(await _opened(call), gone)
        finally:
            if not call.done():
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
            if call.cancelled() or call.exception() or call.result().is_closed:
                gone.cancel()


def _json(body: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        raise Invalid("The body is nested too deep.", code="invalid_json") from None


async def _opened(call: "asyncio.Task[httpx.Response]") -> httpx.Response:
    try:
        answer = call.result()
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise Unavailable("The serving pods cannot be reached; try again.", code="engine_unavailable", retry_after=5) from error
    except httpx.HTTPError as error:
        raise BadEngine(f"The serving pod broke off: {type(error).__name__}.") from error
    if answer.status_code < 400:
        return answer
    try:
        raise await _refusal(answer)
    finally:
        await answer.aclose()


async def _refusal(answer: httpx.Response) -> ApiError:
    """The error that a serving pod's own error becomes: its refusals are passed on, its faults are 502, or 503 where it says so."""
    body = b""
    try:
        async for chunk in answer.aiter_bytes():
            body += chunk
            if len(body) > MAX_ERROR_BODY:
                break
        told = orjson.loads(body)["error"]
        message, code, param = str(told["message"]), str(told.get("code") or ""), told.get("param")
    except (httpx.HTTPError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        message, code, param = "The serving pod gave no reason.", "", None
    if answer.status_code in (429, 503):
        return Unavailable(message, code=code or "engine_unavailable", retry_after=5)
    if answer.status_code >= 500:
        return BadEngine(f"The serving pod failed: {message}")
    error = from_status(answer.status_code, message)
    error.code, error.param = code or error.code, param if isinstance(param, str) else None
    return error


async def _gone(receive: Receive) -> None:
    """Returns when the caller has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Relay(Response):
    """A serving pod's answer, passed on as it comes, until the caller hangs up."""

    def __init__(self, answer: httpx.Response, gone: "asyncio.Task[None]") -> None:
        super().__init__(None, answer.status_code)
        self._answer = answer
        self._gone = gone
        self.raw_headers = [
            (name.encode(), answer.headers[name].encode("latin-1")) for name in _PASSED_HEADERS if name in answer.headers
        ] + [(b"x-accel-buffering", b"no")]  # proxies in front of us must not hold a stream back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        try:
            await asyncio.wait({pump, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            pump.cancel()
            self._gone.cancel()
            await asyncio.gather(pump, self._gone, return_exceptions=True)
            await self._answer.aclose()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer.aiter_bytes():
                yield chunk
        except httpx.HTTPError as error:
            if not self._answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise
            # The status is long sent: inside the stream is the only place left to say it.
            broken = openai_body(BadEngine(f"The serving pod broke off: {type(error).__name__}."))
            yield b"\n\ndata: " + orjson.dumps(broken) + b"\n\n"
