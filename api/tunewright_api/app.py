"""The application: its parts put together, its routes, and what happens around every request."""

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunewright_api import bodies, openai, resources, web
from tunewright_api.auth import Action, Auth, bearer
from tunewright_api.cache import Cache
from tunewright_api.deps import Parts, PartsDep
from tunewright_api.errors import ApiError, Invalid, TooLarge, from_status, render
from tunewright_api.gateway import MAX_BODY, Gateway
from tunewright_api.kube import Kube
from tunewright_api.metrics import Metrics
from tunewright_api.progress import Progress
from tunewright_api.sessions import Sessions
from tunewright_api.settings import Settings
from tunewright_crds.pod import MAX_PROGRESS_BYTES

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def create_app(settings: Settings, *, kube: Kube, engines: httpx.AsyncClient) -> FastAPI:
    """The application. It closes the two clients when it ends."""
    cache = Cache(kube, settings.namespaces)
    auth = Auth(kube, audience=settings.audience)
    parts = Parts(
        settings=settings,
        auth=auth,
        cache=cache,
        gateway=Gateway(engines, silence_seconds=settings.engine_seconds),
        progress=Progress(kube=kube, auth=auth, cache=cache, seconds=settings.progress_seconds),
        metrics=Metrics(cache.jobs),
        sessions=Sessions.from_file(settings.session_key_file, seconds=settings.session_seconds, secure=settings.secure_cookies),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with cache:
            yield
        await engines.aclose()
        await kube.close()

    app = FastAPI(title="Tunewright", version="v1", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/apis/v1/openapi.json")
    app.state.parts = parts
    app.include_router(resources.router)
    app.include_router(openai.router)
    app.include_router(web.router)
    _add_own_routes(app)
    app.mount("/static", StaticFiles(directory=web.STATIC), name="static")
    _add_error_handlers(app)
    app.add_middleware(Around, metrics=parts.metrics)
    return app


def _add_own_routes(app: FastAPI) -> None:
    @app.post("/internal/progress", include_in_schema=False)
    async def progress(request: Request, parts: PartsDep) -> JSONResponse:
        body = bodies.json_object(await bodies.read(request, limit=MAX_PROGRESS_BYTES))
        answer = await parts.progress.take(bearer(request.headers.get("authorization")), body)
        return JSONResponse(answer.model_dump(), 202)

    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: Request, parts: PartsDep) -> Response:
        if not parts.settings.open_metrics:
            caller = await parts.auth.identity(bearer(request.headers.get("authorization")))
            await parts.auth.check(caller, Action("get", path="/metrics"))
        return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz", include_in_schema=False)
    async def healthz(parts: PartsDep) -> JSONResponse:
        """Whether a restart would not help. Caches that grow old because the API server is away are told, and no reason to restart."""
        ages = {kind.plural: round(kind.age, 1) if kind.synced else None for kind in (parts.cache.jobs, parts.cache.models)}
        return JSONResponse({"alive": parts.cache.alive, "ageSeconds": ages}, 200 if parts.cache.alive else 503)

    @app.get("/readyz", include_in_schema=False)
    async def readyz(parts: PartsDep) -> JSONResponse:
        """Whether requests are answered."""
        return JSONResponse({"ready": parts.cache.synced}, 200 if parts.cache.synced else 503)


def _add_error_handlers(app: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> Response:
        return render(error, path=request.url.path, request_id=request.state.request_id)

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> Response:
        return answer(request, from_status(error.status_code, str(error.detail)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = str(first["loc"][-1])
        return answer(request, Invalid(f"{where}: {first['msg']}", param=where))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return answer(request, ApiError("Something went wrong here; the log tells more under this request's id."))


class Around:
    """Around every request: an id in answer and log, its time by route template, and headers that every answer carries.

    No route takes a longer body than ``MAX_BODY``: forms are read whole, before anybody is asked who sent them.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = told if _REQUEST_ID.fullmatch(told) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status, received = time.monotonic(), 500, 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise TooLarge(f"The body has more than {MAX_BODY} bytes.")
            return message

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self._app(scope, bounded, tagged)
        finally:
            seconds = time.monotonic() - started
            route = template(scope)
            self._metrics.requests.labels(scope["method"], route, str(status)).inc()
            self._metrics.seconds.labels(scope["method"], route).observe(seconds)
            if route not in ("/healthz", "/readyz", "/metrics", "/fragments/jobs"):
                log.info("%s %s %s %.3fs %s", scope["method"], route, status, seconds, request_id)


def template(scope: Scope) -> str:
    """The route's template: the path itself would make a series of every name that someone tries."""
    route = scope.get("route")
    if route is not None:
        return str(getattr(route, "path", "unmatched"))
    return "/static" if scope["path"].startswith("/static/") else "unmatched"
