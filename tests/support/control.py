"""A real API server (the cluster ``control``: no nodes, no controllers), the real operator as a process of its own, and a proxy between the two."""

import asyncio
import base64
import contextlib
import os
import signal
import ssl
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import orjson
import yaml
from aiohttp import web

from tests.cluster import facts
from tests.support.stack import ROOT, Kubectl, cluster
from tunewright_crds.definitions import definitions
from tunewright_operator.cluster import KINDS

Manifest = dict[str, Any]
T = TypeVar("T")

WAIT_SECONDS = 120.0  # what takes a second may take long on a busy machine
NAME = "control"
KINDS_OF_TESTS = {**KINDS, "Namespace": ("/api/v1", "namespaces"), "ServiceAccount": ("/api/v1", "serviceaccounts")}


class Refused(Exception):
    """The API server said no."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


def path_of(kind: str, namespace: str, name: str = "", subresource: str = "") -> str:
    """Where an object, or all of a kind, is found."""
    root, plural = KINDS_OF_TESTS[kind]
    where = f"{root}/namespaces/{namespace}/{plural}" if namespace and kind != "Namespace" else f"{root}/{plural}"
    return "/".join(part for part in (where, name, subresource) if part)


@dataclass
class Api:
    """The API server as its administrator."""

    server: str
    token: str
    tls: ssl.SSLContext
    _session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=64, ssl=self.tls)
        self._session = aiohttp.ClientSession(self.server, connector=connector, headers={"Authorization": f"Bearer {self.token}"})
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session, "use the API within `async with`"
        return self._session

    async def __call__(self, method: str, path: str, body: Any = None, *, content: str = "application/json", **parameters: str) -> Manifest:
        """The answer; raises ``Refused``."""
        data = None if body is None else orjson.dumps(body)
        async with self.session.request(method, path, data=data, params=parameters, headers={"Content-Type": content}) as answer:
            raw = await answer.read()
            if answer.status >= 300:
                raise Refused(answer.status, raw.decode(errors="replace")[:1000])
            result: Manifest = orjson.loads(raw)
            return result

    async def create(self, manifest: Manifest, *, again: bool = False) -> Manifest:
        """Makes an object. ``again``: it may be there already."""
        meta = manifest["metadata"]
        try:
            return await self("POST", path_of(manifest["kind"], meta.get("namespace", "")), manifest)
        except Refused as refused:
            if not again or refused.status != 409:
                raise
            return await self("GET", path_of(manifest["kind"], meta.get("namespace", ""), meta["name"]))

    async def find(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """An object, or None."""
        try:
            return await self("GET", path_of(kind, namespace, name))
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str, labels: str = "") -> list[Manifest]:
        """All of a kind."""
        items: list[Manifest] = (await self("GET", path_of(kind, namespace), labelSelector=labels))["items"]
        return items

    async def patch(self, kind: str, namespace: str, name: str, body: Any, subresource: str = "") -> Manifest:
        """A JSON merge patch."""
        return await self("PATCH", path_of(kind, namespace, name, subresource), body, content="application/merge-patch+json")

    async def delete(self, kind: str, namespace: str, name: str, **options: Any) -> None:
        """Deletes an object, if it is there."""
        with contextlib.suppress(Refused):
            await self("DELETE", path_of(kind, namespace, name), {"kind": "DeleteOptions", "apiVersion": "v1", **options})

    async def make_namespace(self) -> str:
        """A namespace of its own for a test, with the ServiceAccount that every pod needs."""
        name = f"operator-{uuid.uuid4().hex[:8]}"
        await self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}}
        await self.create(account, again=True)
        return name

    async def empty(self, namespace: str) -> None:
        """Removes what a test made; without controllers nobody else does."""
        for kind in (
            "InstructionTuningJob",
            "InstructionDataset",
            "TunedModel",
            "Job",
            "Pod",
            "ConfigMap",
            "Event",
            "Deployment",
            "Service",
            "NetworkPolicy",
            "Lease",
        ):
            options = {"propagationPolicy": "Background", "gracePeriodSeconds": 0}
            await self("DELETE", path_of(kind, namespace), {"kind": "DeleteOptions", "apiVersion": "v1", **options})
        for job in await self.list("Job", namespace):  # those that were being deleted in the foreground
            await self.patch("Job", namespace, job["metadata"]["name"], {"metadata": {"finalizers": None}})
        await self.delete("Namespace", "", namespace)


def control_plane() -> Api:
    """Brings the cluster up, with the definitions of today."""
    cluster("up", "--name", NAME, "--control-plane-only")
    kubeconfig = facts(NAME).kubeconfig
    define(Kubectl(kubeconfig))
    return api_of(kubeconfig)


def define(kubectl: Kubectl) -> None:
    """Applies the definitions of today."""
    for file in definitions():
        kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds" / file))
    defined = [f"crd/{definition['metadata']['name']}" for definition in definitions().values()]
    kubectl("wait", "--for=condition=Established", *defined, "--timeout=60s")


def api_of(kubeconfig: Path) -> Api:
    """The API server that a kubeconfig of the test cluster names."""
    config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    server, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    authority = server.get("certificate-authority")
    inline = base64.b64decode(server["certificate-authority-data"]).decode() if "certificate-authority-data" in server else None
    return Api(server["server"], user["token"], ssl.create_default_context(cafile=authority, cadata=inline))


async def eventually(
    what: str, look: Callable[[], Awaitable[T]], *, seconds: float = WAIT_SECONDS, context: Callable[[], str] = lambda: ""
) -> T:
    """The first truthy answer."""
    end = time.monotonic() + seconds
    while True:
        seen = await look()
        if seen:
            return seen
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s; last seen: {seen!r}\n{context()}"
        await asyncio.sleep(0.1)


class Proxy:
    """Plain HTTP in front of the API server. It counts writes, can strike at one of them, and can play dead.

    Renewals of the Lease are no writes here: they come by the clock, not by a job's life.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self.port = 0
        self.writes: list[str] = []  # "METHOD path"
        self.dead = False
        self.strike: Callable[[], None] | None = None  # called once, at ...
        self.strike_at = 0  # ... this write (counted from 1)
        self.deliver_before = False  # ... after the API server did it, or before it sees it
        self._open: set[asyncio.Transport] = set()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=16 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cut()
        if self._runner:
            await self._runner.cleanup()

    def kubeconfig(self, folder: Path) -> Path:
        """A kubeconfig that leads here."""
        file = folder / f"proxy-{self.port}.kubeconfig"
        context = {"name": "x", "context": {"cluster": "x", "user": "x"}}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "contexts": [context],
            "clusters": [{"name": "x", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "x", "user": {"token": self._api.token}}],
        }
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return file

    def cut(self) -> None:
        """Breaks every open connection."""
        for transport in list(self._open):
            transport.abort()

    def die(self) -> None:
        """From now on nobody gets an answer."""
        self.dead = True
        self.cut()

    def revive(self) -> None:
        """Answers again."""
        self.dead = False

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport
        if self.dead:
            transport.abort()
            return web.Response()
        self._open.add(transport)
        try:
            return await self._answer(request)
        except (aiohttp.ClientError, ConnectionError):
            transport.abort()
            return web.Response()
        finally:
            self._open.discard(transport)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        strikes = self._count(request)
        if strikes and not self.deliver_before:
            return self._hit(request)
        headers = {"Content-Type": request.headers.get("Content-Type", ""), "Accept": request.headers.get("Accept", "application/json")}
        upstream = self._api.session.request(
            request.method, request.path_qs, data=body or None, headers=headers, timeout=aiohttp.ClientTimeout(total=None)
        )
        async with upstream as answer:
            if strikes:
                await answer.read()
                return self._hit(request)
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers.get("Content-Type", "")})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    def _count(self, request: web.Request) -> bool:
        if request.method == "GET" or "/leases" in request.path:
            return False
        self.writes.append(f"{request.method} {request.path}")
        return len(self.writes) == self.strike_at

    def _hit(self, request: web.Request) -> web.Response:
        if self.strike:
            self.strike()
        if request.transport:
            request.transport.abort()
        return web.Response()


@dataclass
class Operator:
    """One operator process. ``start`` may be called again once it ended."""

    kubeconfig: Path
    namespace: str
    log: Path
    settings: dict[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> Self:
        """Starts the process; does not wait for anything."""
        wanted = {
            "TRAINER_IMAGE": "trainer:test",
            "STORAGE_BUCKET": "tunewright",
            "NAMESPACES": self.namespace,
            "LEASE_NAMESPACE": self.namespace,
            "LEASE_SECONDS": "10",
            "IDENTITY": "one",
            "BACKOFF_BASE_SECONDS": "0",
            "PORT": "0",
            **self.settings,
        }
        plain = {name: value for name, value in os.environ.items() if not name.startswith("TUNEWRIGHT_")}
        environment = plain | {"KUBECONFIG": str(self.kubeconfig), **{f"TUNEWRIGHT_{name}": value for name, value in wanted.items()}}
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tunewright_operator", stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        return self

    @property
    def running(self) -> asyncio.subprocess.Process:
        assert self.process, "the operator was not started"
        return self.process

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self.running.send_signal(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.running.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.running.wait(), WAIT_SECONDS)

    async def end(self) -> None:
        """Whatever it does, afterwards it does not run."""
        if self.process and self.process.returncode is None:
            self.kill()
        if self.process:
            await self.process.wait()

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:] if self.log.exists() else "(no log)"

    def port(self) -> int:
        """Of its probes and metrics; 0 while it is not known."""
        marks = [line for line in self.log.read_text(encoding="utf-8").splitlines() if "probes and metrics at port" in line]
        return int(marks[-1].split()[-1]) if marks else 0

    async def probe(self, path: str) -> tuple[int, str]:
        """What ``/healthz``, ``/readyz`` or ``/metrics`` says; (0, "") where nobody answers."""
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.port()}{path}") as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, OSError):
            return 0, ""


@contextlib.asynccontextmanager
async def operator(kubeconfig: Path, namespace: str, folder: Path, **settings: str) -> AsyncIterator[Operator]:
    """An operator that is started, and surely ended."""
    one = Operator(kubeconfig, namespace, folder / f"operator-{settings.get('IDENTITY', 'one')}.log", settings)
    try:
        yield await one.start()
    finally:
        await one.end()
