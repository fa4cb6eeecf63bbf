"""What a Job controller, a garbage collector and a kubelet would do to batch Jobs: pods, their ends and last words, and the Jobs' conditions."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from tests.support.builders import ARTIFACT, PREPARED, stopped
from tests.support.control import Api, Manifest, Refused, path_of
from tunewright_crds import names
from tunewright_crds.names import Role
from tunewright_crds.pod import Outcome
from tunewright_operator.queue import KeyedQueue

_WORKERS = 16


@dataclass(frozen=True)
class Ended:
    """How a pod ends."""

    outcome: Outcome | None = None
    exit_code: int = 0
    reason: str = "Completed"
    disruption: str = ""


Script = Callable[[Role, int, str], Ended | None]  # role, attempt, name of the job or InstructionDataset; None: runs on


def trains_well(role: Role, attempt: int, _: str) -> Ended | None:
    """Everything works at the first try."""
    if role is Role.PREPARE:
        return Ended(PREPARED)
    if role is Role.SHARD:
        return Ended()
    return Ended(Outcome(attempt=attempt, resumed_from_step=0, reached_step=100, artifact=ARTIFACT))


class Kubelet:
    """Plays its part in one namespace until it is left. ``jobs``: names of the batch Jobs it ever saw, by UID; ``roles``: those that it runs."""

    def __init__(self, api: Api, namespace: str, script: Script = trains_well, *, roles: frozenset[Role] = frozenset(Role)) -> None:
        self._api, self._namespace, self.script, self._roles = api, namespace, script, roles
        self.jobs: dict[str, str] = {}
        self._bodies: dict[str, Manifest] = {}  # by name
        self._queue: KeyedQueue[str] = KeyedQueue(self._look_after, width=_WORKERS)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._queue.run()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def follow(self, script: Script) -> None:
        """From now on pods do this, those that run already too."""
        self.script = script
        for name in self._bodies:
            self._queue.poke(name)

    def made(self, role: Role) -> list[str]:
        """Names of the Jobs of a role, one for each that was ever made."""
        preparing = ("-prepare", "-prepare-dataset")
        return sorted(name for name in self.jobs.values() if name.endswith(preparing) == (role is Role.PREPARE))

    def shards(self, name: str) -> int:
        """Pods that a Job of this name has side by side."""
        count: int = self._bodies[name]["spec"]["parallelism"]
        return count

    async def collect_garbage(self) -> None:
        """Deletes what belongs to owners that are gone."""
        owners = [owner for kind in ("InstructionTuningJob", "InstructionDataset") for owner in await self._api.list(kind, self._namespace)]
        there = {owner["metadata"]["uid"] for owner in owners}
        for kind in ("Job", "ConfigMap"):
            for body in await self._api.list(kind, self._namespace):
                owners = body["metadata"].get("ownerReferences") or []
                if owners and not any(owner["uid"] in there for owner in owners):
                    await self._api.delete(kind, self._namespace, body["metadata"]["name"], propagationPolicy="Foreground")

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, Refused, OSError, TimeoutError):
                await self._follow_the_watch()
            await asyncio.sleep(0.2)

    async def _follow_the_watch(self) -> None:
        listed = await self._api("GET", path_of("Job", self._namespace))
        for body in listed["items"]:
            self._take(body)
        parameters = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
        endless = aiohttp.ClientTimeout(total=None, sock_connect=10)
        path = path_of("Job", self._namespace)
        async with self._api.session.get(path, params=parameters, timeout=endless) as answer:
            async for line in answer.content:
                event = orjson.loads(line)
                if event["type"] == "ERROR":
                    return
                self._take(event["object"], gone=event["type"] == "DELETED")

    def _take(self, body: Manifest, *, gone: bool = False) -> None:
        name = body["metadata"]["name"]
        self.jobs[body["metadata"]["uid"]] = name
        if gone:
            self._bodies.pop(name, None)
        else:
            self._bodies[name] = body
            self._queue.poke(name)

    async def _look_after(self, name: str) -> None:
        body = self._bodies.get(name)
        if body is None:
            return
        if body["metadata"].get("deletionTimestamp"):
            await self._take_down(body)
        elif not (body.get("status") or {}).get("conditions"):
            await self._run(body)

    async def _run(self, body: Manifest) -> None:
        labels = body["metadata"]["labels"]
        role, attempt = Role(labels[names.LABEL_ROLE]), int(labels.get(names.LABEL_ATTEMPT, "0"))
        if role not in self._roles:
            return
        ended = self.script(role, attempt, labels.get(names.LABEL_JOB) or labels[names.LABEL_DATASET])
        await self._api.create(_pod(body), again=True)
        if ended is None or role is Role.TRAIN:
            await self._tell(body, {"phase": "Running", "containerStatuses": [_container({"running": {"startedAt": _now()}})]})
        if ended is not None:
            await self._end_pod(body, ended)
            await self._end_job(body, failed=ended.exit_code != 0)

    async def _end_pod(self, body: Manifest, ended: Ended) -> None:
        told = ended.outcome.bounded() if ended.outcome else ""
        state = {"exitCode": ended.exit_code, "reason": ended.reason, "message": told, "startedAt": _now(), "finishedAt": _now()}
        status = {"phase": "Failed" if ended.exit_code else "Succeeded", "containerStatuses": [_container({"terminated": state})]}
        if ended.disruption:
            status["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": ended.disruption}]
        await self._tell(body, status)

    async def _end_job(self, body: Manifest, *, failed: bool) -> None:
        kinds = ("FailureTarget", "Failed") if failed else ("SuccessCriteriaMet", "Complete")
        conditions = [{"type": kind, "status": "True", "reason": "x", "message": "", "lastTransitionTime": _now()} for kind in kinds]
        pods = body["spec"]["completions"]
        indexes = {"completedIndexes": f"0-{pods - 1}"} if body["spec"].get("completionMode") == "Indexed" else {}
        counts = {"failed": 1} if failed else {"succeeded": pods, "completionTime": _now(), **indexes}
        status = {"startTime": _now(), "conditions": conditions, "uncountedTerminatedPods": {}, **counts}
        await self._api.patch("Job", self._namespace, body["metadata"]["name"], {"status": status}, "status")

    async def _take_down(self, body: Manifest) -> None:
        """A pod that still runs saves a checkpoint and says so; then pod and Job go."""
        name = body["metadata"]["name"]
        pod = await self._api.find("Pod", self._namespace, f"{name}-0")
        if pod and (pod.get("status") or {}).get("phase") == "Running":
            await self._end_pod(body, Ended(stopped(resumed=0, reached=40), 75, "Error"))
        await self._api.delete("Pod", self._namespace, f"{name}-0", gracePeriodSeconds=0)
        with contextlib.suppress(Refused):
            await self._api.patch("Job", self._namespace, name, {"metadata": {"finalizers": None}})

    async def _tell(self, body: Manifest, status: Manifest) -> None:
        await self._api.patch("Pod", self._namespace, f"{body['metadata']['name']}-0", {"status": status}, "status")


def _container(state: Manifest) -> Manifest:
    return {"name": "trainer", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}


def _pod(body: Manifest) -> Manifest:
    template: Any = body["spec"]["template"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": body["metadata"]["name"], "uid": body["metadata"]["uid"], "controller": True}
    meta = {"name": f"{body['metadata']['name']}-0", "namespace": body["metadata"]["namespace"], "labels": template["metadata"]["labels"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta | {"ownerReferences": [owner]},
        "spec": template["spec"] | {"nodeName": "node-1"},
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
