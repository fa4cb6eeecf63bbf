"""The one seam to the API server: bounded requests, plain dictionaries, one kind of error.

``ClusterError``
    ``Unreachable`` (no answer in time), ``Conflict`` (409), ``Gone`` (404), ``Refused`` (403, 422 and other 4xx), ``NotLeader`` (never sent)
"""

import os
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import kopf
import orjson

from tunewright_crds import names
from tunewright_operator.observed import Identity

Manifest = dict[str, Any]

REQUEST_SECONDS: Final = 10.0  # shorter than what a lease has left when a write is let through
_TOKEN_SECONDS: Final = 60.0  # mounted tokens are renewed by the kubelet long before they expire
_PAGE: Final = 500
_FIELD_MANAGER: Final = {"fieldManager": names.OPERATOR_MANAGER}
_IN_CLUSTER_SERVER: Final = "https://kubernetes.default.svc"
_IN_CLUSTER_TOKEN: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

# Where each kind lives: the path before "namespaces", and the plural.
KINDS: Final[dict[str, tuple[str, str]]] = {
    "InstructionTuningJob": (f"/apis/{names.API_VERSION}", names.JOBS),
    "InstructionDataset": (f"/apis/{names.API_VERSION}", names.DATASETS),
    "TunedModel": (f"/apis/{names.API_VERSION}", names.MODELS),
    "Job": ("/apis/batch/v1", "jobs"),
    "Pod": ("/api/v1", "pods"),
    "Node": ("/api/v1", "nodes"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Service": ("/api/v1", "services"),
    "Event": ("/api/v1", "events"),
    "Deployment": ("/apis/apps/v1", "deployments"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
}


class ClusterError(Exception):
    """A request to the API server that did not do what it should."""


class Unreachable(ClusterError):
    """No answer in time, or a server error: nobody knows whether it was done."""


class Conflict(ClusterError):
    """It exists already, or changed meanwhile."""


class Gone(ClusterError):
    """It does not exist (any more)."""


class Refused(ClusterError):
    """The API server will not do it: forbidden, over quota, or invalid."""


class NotLeader(ClusterError):
    """The write was not sent: this replica is not, or not surely, the leader."""


def connection() -> kopf.ConnectionInfo:
    """The API server to talk to: that of KUBECONFIG where it is set, otherwise the pod's own."""
    settings = kopf.OperatorSettings()
    ways = [kopf.login_with_service_account, kopf.login_with_kubeconfig]
    if os.environ.get("KUBECONFIG"):
        ways.reverse()
    found = ways[0](settings=settings) or ways[1](settings=settings)
    if found is None:
        raise SystemExit("no Kubernetes to talk to: run in a pod, or set KUBECONFIG")
    return found


def _path(kind: str, namespace: str, name: str = "", subresource: str = "") -> str:
    root, plural = KINDS[kind]
    where = f"{root}/namespaces/{namespace}/{plural}" if namespace else f"{root}/{plural}"
    return "/".join(part for part in (where, name, subresource) if part)


class Cluster:
    """Requests to the API server. ``may_write`` is asked before each write; ``heard_at`` is when the last answer came (monotonic seconds)."""

    def __init__(self, info: kopf.ConnectionInfo, *, may_write: Callable[[], bool] = lambda: True) -> None:
        self._info = info
        self._may_write = may_write
        self._session: aiohttp.ClientSession | None = None
        self._token = info.token
        self._token_read = 0.0
        self.heard_at = 0.0
        self.writes = 0

    async def __aenter__(self) -> "Cluster":
        info = self._info
        context: ssl.SSLContext | bool = False
        if info.server.startswith("https") and not info.insecure:
            context = info.as_ssl_context()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=64, ssl=context),
            timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS),
            json_serialize=lambda value: orjson.dumps(value).decode(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    def leading_by(self, may_write: Callable[[], bool]) -> "Cluster":
        """From now on writes are sent only while ``may_write`` says so."""
        self._may_write = may_write
        return self

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """One object, or None where there is none."""
        try:
            return await self._request("GET", _path(kind, namespace, name))
        except Gone:
            return None

    async def list_all(self, kind: str, namespace: str = "", *, labels: str = "") -> AsyncIterator[Manifest]:
        """Every object, in pages; ``namespace`` empty: of all namespaces."""
        parameters = {"limit": str(_PAGE)} | ({"labelSelector": labels} if labels else {})
        while True:
            page = await self._request("GET", _path(kind, namespace), parameters=parameters)
            for item in page.get("items") or ():
                yield item
            following = page["metadata"].get("continue")
            if not following:
                return
            parameters["continue"] = following

    async def ask(self, path: str) -> Manifest:
        """Any GET, to see whether the API server answers and what it serves."""
        return await self._request("GET", path)

    async def create(self, manifest: Manifest) -> Manifest:
        """Makes an object; ``Conflict`` where one of its name is there."""
        meta = manifest["metadata"]
        return await self._write("POST", _path(manifest["kind"], meta["namespace"]), manifest, _FIELD_MANAGER)

    async def apply(self, manifest: Manifest) -> Manifest:
        """Server-side apply: the fields of the manifest become so, whoever had set them."""
        meta = manifest["metadata"]
        path = _path(manifest["kind"], meta["namespace"], meta["name"])
        return await self._write("PATCH", path, manifest, {**_FIELD_MANAGER, "force": "true"}, content="application/apply-patch+yaml")

    async def replace(self, manifest: Manifest) -> Manifest:
        """Puts an object; ``Conflict`` where it is not of the resourceVersion that the manifest names. Not gated: this is how a leader becomes one."""
        meta = manifest["metadata"]
        return await self._request("PUT", _path(manifest["kind"], meta["namespace"], meta["name"]), body=manifest)

    async def create_ungated(self, manifest: Manifest) -> Manifest:
        """``create`` for the Lease itself."""
        return await self._request("POST", _path(manifest["kind"], manifest["metadata"]["namespace"]), body=manifest)

    async def patch_status(self, kind: str, of: Identity, changes: list[Manifest]) -> Manifest:
        """A JSON patch of the status, void if the object is not the one that was looked at (a new one may have its name)."""
        patch = [{"op": "test", "path": "/metadata/uid", "value": of.uid}, *changes]
        path = _path(kind, of.namespace, of.name, "status")
        return await self._write("PATCH", path, patch, _FIELD_MANAGER, content="application/json-patch+json")

    async def patch(self, kind: str, of: Identity, changes: list[Manifest]) -> Manifest:
        """A JSON patch of anything but the status, void if the object is not the one that was looked at."""
        patch = [{"op": "test", "path": "/metadata/uid", "value": of.uid}, *changes]
        return await self._write("PATCH", _path(kind, of.namespace, of.name), patch, _FIELD_MANAGER, content="application/json-patch+json")

    async def delete(self, kind: str, of: Identity, *, foreground: bool = False) -> None:
        """Deletes that very object. In the foreground it stays, marked, until its children are gone."""
        options: Manifest = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "preconditions": {"uid": of.uid},
            "propagationPolicy": "Foreground" if foreground else "Background",
        }
        try:
            await self._write("DELETE", _path(kind, of.namespace, of.name), options, {})
        except (Gone, Conflict):
            return  # gone already, or another object has its name now

    async def _write(self, method: str, path: str, body: Any, parameters: dict[str, str], *, content: str = "application/json") -> Manifest:
        if not self._may_write():
            raise NotLeader("this replica does not hold the lease")
        self.writes += 1
        return await self._request(method, path, body=body, parameters=parameters, content=content)

    async def _request(
        self, method: str, path: str, *, body: Any = None, parameters: dict[str, str] | None = None, content: str = "application/json"
    ) -> Manifest:
        if self._session is None:
            raise RuntimeError("use the cluster within `async with`")
        headers = {"Content-Type": content, "Accept": "application/json", **self._authorization()}
        data = None if body is None else orjson.dumps(body)
        try:
            async with self._session.request(method, self._info.server + path, data=data, params=parameters, headers=headers) as answer:
                raw = await answer.read()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"{method} {path}: {type(error).__name__} {error}") from error
        if status < 500:
            self.heard_at = time.monotonic()
        if status < 300:
            return _parsed(raw, f"{method} {path}")
        raise _error(status, f"{method} {path}: {status} {_message(raw)}")

    def _authorization(self) -> dict[str, str]:
        if self._info.token and time.monotonic() - self._token_read > _TOKEN_SECONDS:
            self._token_read = time.monotonic()
            if self._info.server == _IN_CLUSTER_SERVER:
                self._token = _IN_CLUSTER_TOKEN.read_text(encoding="utf-8").strip()
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}


def _parsed(raw: bytes, what: str) -> Manifest:
    try:
        result: Manifest = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Unreachable(f"{what}: the answer is not JSON") from error
    return result


def _message(raw: bytes) -> str:
    """What a Status object says; other bodies may hold anything and are not quoted."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return ""
    return str(body.get("message", ""))[:512] if isinstance(body, dict) and body.get("kind") == "Status" else ""


def _error(status: int, text: str) -> ClusterError:
    if status == 404:
        return Gone(text)
    if status == 409:
        return Conflict(text)
    if status == 429 or status >= 500 or status == 401:
        return Unreachable(text)
    return Refused(text)
