"""The front end for tests: in this process against a made-up API server, or as a program with the chart's own rights against a real one."""

import asyncio
import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
import yaml
from fastapi import FastAPI

from tests.cluster import facts
from tests.cluster.places import BIN
from tests.support.stack import ROOT, Kubectl, answers, cluster, run, wait_for
from tunewright_api.app import create_app
from tunewright_api.kube import Kube
from tunewright_api.settings import Settings
from tunewright_crds import names

KUBE_VERSION = "1.34.0"  # what charts are rendered for; helm built from source claims 1.20
START_SECONDS = 60


@dataclass
class FakeKube:
    """An API server in memory. ``rights`` holds (user, verb, resource, namespace); ``down`` makes every review fail."""

    users: dict[str, dict[str, Any]] = field(default_factory=dict)
    rights: set[tuple[str, str, str, str]] = field(default_factory=set)
    objects: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {names.JOBS: [], names.MODELS: []})
    pods: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    down: bool = False
    patch_status: int = 200
    calls: list[str] = field(default_factory=list)
    patches: list[list[dict[str, Any]]] = field(default_factory=list)

    def client(self) -> Kube:
        """A client whose calls end here."""
        return Kube(httpx.AsyncClient(base_url="https://kube.test", transport=httpx.MockTransport(self._answer)))

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        path = request.url.path
        self.calls.append(f"{request.method} {path}")
        if path.endswith("reviews"):
            if self.down:
                return httpx.Response(500, json={"message": "etcd is away"})
            spec = json.loads(request.content)["spec"]
            return httpx.Response(201, json={"status": self._token(spec) if path.endswith("tokenreviews") else self._access(spec)})
        if request.method == "PATCH":
            self.patches.append(json.loads(request.content))
            return httpx.Response(self.patch_status, json={"message": "patched or not"})
        if "/pods/" in path:
            *_, namespace, _, name = path.split("/")
            pod = self.pods.get((namespace, name))
            return httpx.Response(200, json=pod) if pod else httpx.Response(404, json={"message": "no such pod"})
        if "watch" in request.url.params:
            return httpx.Response(200, content=_silence())
        return httpx.Response(200, json={"metadata": {"resourceVersion": "1"}, "items": self.objects[path.rsplit("/", 1)[-1]]})

    def _token(self, spec: dict[str, Any]) -> dict[str, Any]:
        user = self.users.get(spec["token"])
        if user is None or (spec.get("audiences") or [""])[0] != user.get("audience", ""):
            return {"authenticated": False}
        known = {key: value for key, value in user.items() if key != "audience"}
        return {"authenticated": True, "audiences": spec.get("audiences", []), "user": known}

    def _access(self, spec: dict[str, Any]) -> dict[str, Any]:
        wanted = spec.get("resourceAttributes") or spec["nonResourceAttributes"]
        key = (spec["user"], wanted["verb"], wanted.get("resource", wanted.get("path")), wanted.get("namespace", ""))
        return {"allowed": key in self.rights}


async def _silence() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


def thing(name: str, namespace: str = "team-a", *, uid: str = "uid-1", **more: Any) -> dict[str, Any]:
    """A custom resource as the API server gives it; ``more`` adds spec and status."""
    meta = {"name": name, "namespace": namespace, "uid": uid, "creationTimestamp": "2026-01-02T03:04:05Z", "resourceVersion": "1"}
    return {"apiVersion": names.API_VERSION, "metadata": meta, "spec": {}} | more


def a_model(name: str, namespace: str = "team-a", *, endpoint: str | None = None) -> dict[str, Any]:
    """A served adapter."""
    told = f"http://engine-1.{namespace}.svc:8000" if endpoint is None else endpoint
    return thing(name, namespace, spec={"kind": "adapter", "version": "1"}, status={"endpoint": told})


@contextlib.asynccontextmanager
async def in_process(kube: FakeKube, engines: httpx.AsyncClient | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application whose caches are full; no sockets."""
    app = create_app(Settings(**settings), kube=kube.client(), engines=engines or httpx.AsyncClient())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="https://front.test") as client:
        async with asyncio.timeout(START_SECONDS):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
        yield client


@contextlib.asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[tuple[str, uvicorn.Server]]:
    """An application behind a real socket, in this event loop; its address, and the server."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, timeout_graceful_shutdown=30))
    # The signals of this process are pytest's.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(START_SECONDS):
        while not server.started:
            await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        await task


def render(*settings: str, release: str = "tunewright", namespace: str = "tunewright-system") -> list[dict[str, Any]]:
    """The chart's objects with the settings ``key=value``."""
    chosen = [word for setting in ("storage.bucket=bucket", *settings) for word in ("--set", setting)]
    command = (str(BIN / "helm"), "template", release, "charts/tunewright", "-n", namespace, "--kube-version", KUBE_VERSION)
    return [found for found in yaml.safe_load_all(run(*command, *chosen)) if found]


@dataclass(frozen=True)
class FrontEnd:
    """A running ``tunewright-api`` on the control plane ``control``."""

    url: str
    kubectl: Kubectl

    def make_tenant(self) -> str:
        """A namespace with a ServiceAccount ``owner`` who may edit jobs and models in it, and a ServiceAccount for its pods."""
        namespace = f"tenant-{uuid.uuid4().hex[:8]}"
        kind = {"apiVersion": "rbac.authorization.k8s.io/v1"}
        everything = {
            "apiGroups": [names.GROUP],
            "resources": [names.JOBS, names.MODELS],
            "verbs": ["get", "list", "watch", "create", "patch"],
        }
        self.kubectl.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
            *(
                {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": who, "namespace": namespace}}
                for who in ("owner", "default")
            ),
            kind | {"kind": "Role", "metadata": {"name": "owner", "namespace": namespace}, "rules": [everything]},
            kind
            | {
                "kind": "RoleBinding",
                "metadata": {"name": "owner", "namespace": namespace},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "owner"},
                "subjects": [{"kind": "ServiceAccount", "name": "owner", "namespace": namespace}],
            },
        )
        return namespace

    def make_job(self, namespace: str, name: str) -> str:
        """A job; returns its UID."""
        spec = {"model": {"uri": "s3://bucket/model/"}, "dataset": {"sources": [{"uri": "s3://bucket/rows.jsonl"}]}}
        self.kubectl.apply(
            {
                "apiVersion": names.API_VERSION,
                "kind": "InstructionTuningJob",
                "metadata": {"name": name, "namespace": namespace},
                "spec": spec,
            }
        )
        return str(self.kubectl.get("itj", name, "-n", namespace)["metadata"]["uid"])

    def set_status(self, namespace: str, name: str, **status: Any) -> None:
        """Writes parts of a job's status, as the operator would."""
        patch = json.dumps({"status": status})
        self.kubectl("patch", "itj", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)

    def status(self, namespace: str, name: str) -> dict[str, Any]:
        """A job's status."""
        found: dict[str, Any] = self.kubectl.get("itj", name, "-n", namespace).get("status", {})
        return found

    def pod_token(self, namespace: str, name: str, job_uid: str, *, audience: str = names.PROGRESS_AUDIENCE) -> str:
        """Makes a pod of a job, and the token that the kubelet would project into it."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": {names.LABEL_JOB_UID: job_uid}},
            "spec": {"containers": [{"name": "trainer", "image": "trainer"}], "automountServiceAccountToken": False},
        }
        self.kubectl.apply(pod)
        words = (
            "create",
            "token",
            "default",
            "-n",
            namespace,
            f"--audience={audience}",
            "--bound-object-kind=Pod",
            f"--bound-object-name={name}",
        )
        return self.kubectl(*words).strip()

    def get(self, path: str, token: str, **headers: str) -> httpx.Response:
        """A GET with a bearer token."""
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {token}"} | headers, timeout=30)

    def wait_job(self, namespace: str, name: str, uid: str, token: str) -> None:
        """Until the cache holds the job."""

        def known() -> bool:
            answer = self.get(f"/apis/v1/namespaces/{namespace}/jobs/{name}", token)
            return answer.status_code == 200 and answer.json()["metadata"]["uid"] == uid

        wait_for(f"the front end knows {name}", known, seconds=60, every=0.1)


@contextlib.contextmanager
def front_end(folder: Path, **environment: str) -> Iterator[FrontEnd]:
    """``tunewright-api`` as a program, with the rights that the chart gives it, while the context lasts. Files go to ``folder``."""
    cluster("up", "--name", "control", "--control-plane-only")
    kubectl = Kubectl(facts("control").kubeconfig)
    for kind in (names.JOBS, names.MODELS):
        kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds" / f"{kind}.yaml"))
    kubectl("wait", "--for=condition=Established", f"crd/{names.JOBS}.{names.GROUP}", f"crd/{names.MODELS}.{names.GROUP}", "--timeout=60s")
    release = f"tunewright-{uuid.uuid4().hex[:6]}"
    rights = [one for one in render(release=release, namespace="default") if one["metadata"]["name"].startswith(f"{release}-api")]
    rights = [one for one in rights if one["kind"] in ("ServiceAccount", "ClusterRole", "ClusterRoleBinding")]
    for one in rights:
        if one["kind"] == "ServiceAccount":
            one["metadata"]["namespace"] = "default"
    kubectl.apply(*rights)
    program = None
    try:
        settings = _settings(kubectl, release, folder) | environment
        with (folder / "front_end.log").open("w") as log:
            program = subprocess.Popen(
                [sys.executable, "-m", "tunewright_api"], env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
            )
        told = wait_for("the front end listens", lambda: _address(folder / "front_end.log", program), seconds=START_SECONDS, every=0.1)
        wait_for("the front end is ready", lambda: answers(f"{told}/readyz"), seconds=START_SECONDS, every=0.1)
        assert told
        yield FrontEnd(told, kubectl)
    finally:
        if program:
            program.terminate()
            program.wait(START_SECONDS)
        for one in rights:
            kubectl("delete", one["kind"], one["metadata"]["name"], "-n", "default", "--ignore-not-found")


def _settings(kubectl: Kubectl, release: str, folder: Path) -> dict[str, str]:
    there = yaml.safe_load(kubectl.kubeconfig.read_text())["clusters"][0]["cluster"]
    authority = there.get("certificate-authority-data")
    ca = base64.b64decode(authority) if authority else Path(there["certificate-authority"]).read_bytes()
    files = {"TOKEN": kubectl.token(f"{release}-api", "default").encode(), "CA": ca}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {
        "TUNEWRIGHT_HOST": "127.0.0.1",
        "TUNEWRIGHT_PORT": "0",
        "TUNEWRIGHT_KUBE_URL": there["server"],
        "TUNEWRIGHT_KUBE_TOKEN_FILE": str(folder / "TOKEN"),
        "TUNEWRIGHT_KUBE_CA_FILE": str(folder / "CA"),
        "TUNEWRIGHT_PROGRESS_SECONDS": "0.2",
    }


def _address(log: Path, program: "subprocess.Popen[bytes]") -> str | None:
    said = log.read_text()
    assert program.poll() is None, f"the front end ended with {program.returncode}:\n{said}"
    found = re.search(r"running on (http://127\.0\.0\.1:\d+)", said)
    return found[1] if found else None
