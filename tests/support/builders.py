"""Jobs, and a small world for them: what an API server, a Job controller and a kubelet do to a job's children, without any I/O.

``World`` holds manifests, lets the operator's ``reconcile`` look at them, and does what it plans.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Self

from tunewright_crds import names
from tunewright_crds.dataset import DatasetStatus
from tunewright_crds.errors import FailureCode
from tunewright_crds.evaluation import EvaluationStatus, Measured
from tunewright_crds.instruction_dataset import InstructionDatasetStatus
from tunewright_crds.pod import Failed, Outcome, Published
from tunewright_crds.status import JobStatus, LastCheckpoint
from tunewright_operator.controller import dump, status_changes
from tunewright_operator.datasets import reconcile_dataset
from tunewright_operator.observed import (
    Awaited,
    Batch,
    Job,
    Observed,
    ObservedDataset,
    Pod,
    Prepared,
    S,
    Served,
    read_dataset_status,
    read_status,
)
from tunewright_operator.plan import Plan
from tunewright_operator.reconcile import reconcile
from tunewright_operator.settings import Settings

Manifest = dict[str, Any]

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
PREPARED = Outcome(dataset=DatasetStatus(digest="d1", train_examples=10, rejected=1))
PREPARED_WITH_TEST = Outcome(dataset=DatasetStatus(digest="d1", train_examples=10, test_examples=5))
MEASURED = Outcome(
    evaluation=EvaluationStatus(
        metrics=[Measured(task="test", metric="exact_match", base=0.25, tuned=0.75)], examples=5, report_uri="s3://tunewright/report.html"
    )
)
ARTIFACT = Published(kind="adapter", uri="s3://tunewright/ns/models/a/v/adapter", digest="abc")
TRAINED = Outcome(attempt=1, resumed_from_step=0, reached_step=100, artifact=ARTIFACT)


def settings(**fields: Any) -> Settings:
    """Settings that say only what must be said."""
    return Settings(**{"trainer_image": "trainer:test", "storage_bucket": "tunewright", **fields})


class JobBuilder:
    """``a_job("x").suspended().manifest``."""

    def __init__(self, name: str, namespace: str = "ns") -> None:
        self.manifest: Manifest = {
            "apiVersion": names.API_VERSION,
            "kind": "InstructionTuningJob",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"model": {"uri": "s3://models/base/"}, "dataset": {"sources": [{"uri": "s3://data/rows.jsonl"}]}},
        }

    def with_spec(self, **fields: Any) -> Self:
        """Sets fields of the spec."""
        self.manifest["spec"] |= fields
        return self

    def suspended(self) -> Self:
        """Applied suspended."""
        return self.with_spec(suspend=True)

    def retrying(self, **retries: int) -> Self:
        """With these budgets."""
        return self.with_spec(retries=retries)


def a_job(name: str = "a", namespace: str = "ns") -> JobBuilder:
    """A job with the least that it needs."""
    return JobBuilder(name, namespace)


def a_dataset(name: str = "d", namespace: str = "ns", **spec: Any) -> Manifest:
    """An InstructionDataset with the least that it needs, and ``spec``."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": "InstructionDataset",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"uri": "s3://models/base/"}, "dataset": {"sources": [{"uri": "s3://data/rows.jsonl"}]}, **spec},
    }


def a_model(name: str = "m", namespace: str = "ns", *, kind: str = "merged", version: str = "v1", **spec: Any) -> Manifest:
    """A TunedModel with the least that it needs, and ``spec``."""
    artifact = {"uri": f"s3://tunewright/{namespace}/models/{name}/{version}/{kind}", "digest": f"{version}-{kind}"}
    return {
        "apiVersion": names.API_VERSION,
        "kind": "TunedModel",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"base": {"uri": "s3://models/base/"}, "kind": kind, "artifact": artifact, "version": version, **spec},
    }


def failure(code: FailureCode, message: str = "it broke", **fields: Any) -> Outcome:
    """Last words of a pod that failed."""
    return Outcome(error=Failed(code=code, message=message), **fields)


def stopped(*, resumed: int, reached: int) -> Outcome:
    """Last words of a trainer that was told to stop."""
    checkpoint = LastCheckpoint(step=reached, uri=f"s3://tunewright/step-{reached}")
    return Outcome(attempt=1, resumed_from_step=resumed, reached_step=reached, last_checkpoint=checkpoint)


class Around(ABC, Generic[S]):
    """One resource, its children, and time."""

    def __init__(self, manifest: Manifest, **fields: Any) -> None:
        self.settings = settings(**fields)
        self.now = START
        self._version = 0
        self.job = copy.deepcopy(manifest)  # or whatever owns the children
        meta = self.job["metadata"]
        meta |= {"uid": "12345678-aaaa", "generation": 1, "creationTimestamp": self.stamp}
        self.batches: dict[str, Manifest] = {}  # by name, as in an API server
        self.pods: dict[str, Manifest] = {}  # by name
        self.memories: list[Batch] = []
        self.pod_memories: list[Pod] = []
        self.model: Manifest | None = None
        self.foreign: set[str] = set()
        self.awaited: dict[str, Awaited] = {}  # tuned models that it names
        self.plans: list[Plan[S]] = []
        self.most_active = 0

    @property
    @abstractmethod
    def status(self) -> S:
        """The status as stored."""

    @abstractmethod
    def decide(self, family: dict[str, Any]) -> Plan[S]:
        """What the operator would do; ``family``: fields of what it sees."""

    # What the operator sees and does

    @property
    def stamp(self) -> str:
        """Now, as Kubernetes writes it."""
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    def family(self, *, confirmed: bool, blind: frozenset[str] = frozenset()) -> dict[str, Any]:
        """What is there; ``blind``: names of children that a late watch has not shown yet."""
        batches = [Batch.of(body) for name, body in self.batches.items() if name not in blind]
        pods = [Pod.of(body) for name, body in self.pods.items() if name not in blind]
        there = {batch.id.name for batch in batches}
        gone = [batch for batch in self.memories if batch.id.name not in there and batch.id.name not in blind]
        obstacles = {name: f"{name} stands in the way" for name in self.foreign}
        batches = [batch for batch in batches if batch.owner == self.job["metadata"]["uid"]]
        return {
            "now": self.now,
            "batches": (*batches, *gone),
            "pods": (*pods, *self.pod_memories),
            "confirmed": confirmed,
            "obstacles": obstacles,
            "awaited": self.awaited,
        }

    def reconcile(self, *, blind: frozenset[str] = frozenset(), upto: int | None = None) -> Plan[S]:
        """One pass. ``upto``: crash after so many of its writes."""
        plan = self.decide(self.family(confirmed=False, blind=blind))
        if plan.doubtful:
            plan = self.decide(self.family(confirmed=True))
            assert not plan.doubtful, "what was confirmed is still in doubt"
        self.plans.append(plan)
        for write in self._writes(plan)[:upto]:
            write()
        self.most_active = max(self.most_active, self.active())
        return plan

    def settle(self) -> None:
        """Passes until nothing changes."""
        for _ in range(12):
            before = copy.deepcopy((self.job, self.batches))
            self.reconcile()
            if before == (self.job, self.batches):
                return
        raise AssertionError("the operator never comes to rest")

    def _writes(self, plan: Plan[S]) -> list[Callable[[], None]]:
        writes: list[Callable[[], None]] = [lambda name=batch.id.name: self.delete_batch(name) for batch in plan.delete]  # type: ignore[misc]
        writes += [lambda body=body: self._create(body) for body in plan.create if body["kind"] == "Job"]  # type: ignore[misc]
        if plan.publish:
            writes.append(lambda: setattr(self, "model", self._stamped(copy.deepcopy(plan.publish or {}))))
        writes.append(lambda: self._write_status(plan.status))
        return writes

    def _write_status(self, status: S) -> None:
        changes = status_changes(self.job.get("status") or {}, dump(self.status), dump(status), keep="progress")
        for change in changes:
            *_, field = change["path"].split("/")
            if change["path"] == "/status":
                self.job["status"] = change["value"]
            elif change["op"] == "add":
                self.job["status"][field] = change["value"]
            else:
                del self.job["status"][field]
        if changes:
            self._stamped(self.job)
        attempts = status.attempts if isinstance(status, JobStatus) else []
        told = {names.attempt_name("a", attempt.number) for attempt in attempts if attempt.end_time}
        self.memories = [batch for batch in self.memories if batch.id.name not in told]

    def _create(self, body: Manifest) -> None:
        name = body["metadata"]["name"]
        if name not in self.batches:
            self.batches[name] = self._stamped(copy.deepcopy(body), uid=True)

    def _stamped(self, body: Manifest, *, uid: bool = False) -> Manifest:
        self._version += 1
        body["metadata"] |= {"resourceVersion": str(self._version)}
        if uid:
            body["metadata"] |= {"uid": f"uid-{self._version}", "creationTimestamp": self.stamp}
        return body

    # What others do

    def pass_time(self, seconds: float) -> Self:
        """Moves the clock."""
        self.now += timedelta(seconds=seconds)
        return self

    def change(self, **spec: Any) -> Self:
        """The owner changes the spec."""
        self.job["spec"] |= spec
        self.job["metadata"]["generation"] += 1
        self._stamped(self.job)
        return self

    def start(self, name: str, *, index: int = 0, **status: Any) -> Self:
        """The Job controller makes the pod, and the kubelet runs it, or whatever ``status`` says."""
        batch = self.batches[name]
        pod: Manifest = {
            "metadata": {
                "name": f"{name}-{index}",
                "namespace": "ns",
                "labels": batch["spec"]["template"]["metadata"]["labels"],
                "annotations": {names.COMPLETION_INDEX: str(index)} if "completionMode" in batch["spec"] else {},
                "ownerReferences": [{"uid": batch["metadata"]["uid"], "controller": True}],
            },
            "spec": {"nodeName": "node-1"},
            "status": {"phase": "Running"} | status,
        }
        self.pods[f"{name}-{index}"] = self._stamped(pod, uid=True)
        return self

    def finish(self, name: str, outcome: Outcome | str | None = None, *, exit_code: int = 0, reason: str = "", **status: Any) -> Self:
        """The container ends with last words; the Job controller sees it."""
        self.end_pod(name, outcome, exit_code=exit_code, reason=reason, **status)
        self.batches[name]["status"] = {"conditions": [{"type": "Failed" if exit_code else "Complete", "status": "True"}]}
        self._stamped(self.batches[name])
        return self

    def end_pod(
        self, name: str, outcome: Outcome | str | None = None, *, index: int = 0, exit_code: int = 0, reason: str = "", **status: Any
    ) -> Self:
        """A container ends with last words."""
        if f"{name}-{index}" not in self.pods:
            self.start(name, index=index)
        pod = self.pods[f"{name}-{index}"]
        message = outcome.bounded() if isinstance(outcome, Outcome) else (outcome or "")
        ended = {"exitCode": exit_code, "reason": reason, "message": message, "finishedAt": self.stamp}
        pod["status"] |= {"phase": "Failed" if exit_code else "Succeeded", "containerStatuses": [{"state": {"terminated": ended}}]} | status
        self._stamped(pod)
        return self

    def lose_pod(self, name: str) -> Self:
        """The pod vanishes without a word; the Job fails for it."""
        self.pods.pop(f"{name}-0", None)
        return self.fail_batch(name)

    def fail_batch(self, name: str) -> Self:
        """The Job controller sees that its pod failed."""
        self.batches[name]["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
        self._stamped(self.batches[name])
        return self

    def delete_batch(self, name: str) -> None:
        """Somebody deletes a batch Job, in the foreground: it stays, marked, until ``collect``."""
        self.batches[name]["metadata"]["deletionTimestamp"] = self.stamp
        self._stamped(self.batches[name])

    def collect(self, outcome: Outcome | None = None, *, exit_code: int = 75) -> Self:
        """What was marked for deletion goes; a pod that still ran leaves its last words first."""
        for name in [name for name, body in self.batches.items() if body["metadata"].get("deletionTimestamp")]:
            pod = self.pods.pop(f"{name}-0", None)
            if pod and outcome and "containerStatuses" not in pod["status"]:
                ended = {"exitCode": exit_code, "message": outcome.bounded(), "finishedAt": self.stamp}
                pod["status"] |= {"phase": "Failed", "containerStatuses": [{"state": {"terminated": ended}}]}
            if pod:
                self.pod_memories.append(Pod.of(pod).remembered())
            self.memories.append(Batch.of(self.batches.pop(name)).remembered())
        return self

    def active(self) -> int:
        """Training Jobs that have, or may still start, a pod."""
        bodies = [Batch.of(body) for body in self.batches.values()]
        return sum(1 for batch in bodies if batch.role == names.Role.TRAIN and not batch.finished)


class World(Around[JobStatus]):
    """One job, its children, and the InstructionDataset that it names, if any."""

    def __init__(self, job: JobBuilder | None = None, **fields: Any) -> None:
        super().__init__((job or a_job()).manifest, **fields)
        self.dataset: Manifest | None = None

    @property
    def status(self) -> JobStatus:
        return read_status(self.job.get("status") or {})

    def decide(self, family: dict[str, Any]) -> Plan[JobStatus]:
        model = Served.of(self.model) if self.model else None
        named = Prepared.of(self.dataset) if self.dataset else None
        return reconcile(Observed(Job.of(self.job), **family, model=model, named=named), self.settings)

    def progress(self, attempt: int, step: int, resumed: int = 0) -> Self:
        """The front end writes the pod's progress."""
        told = {"step": step, "maxSteps": 100, "attempt": attempt, "resumedFromStep": resumed, "lastUpdated": self.stamp}
        self.job.setdefault("status", {})["progress"] = told
        return self


class DatasetWorld(Around[InstructionDatasetStatus]):
    """One InstructionDataset and its children. ``users``, ``trainees``, ``twins``: as ``ObservedDataset`` has them."""

    def __init__(self, name: str = "d", *, spec: Manifest | None = None, **fields: Any) -> None:
        super().__init__(a_dataset(name, **(spec or {})), **fields)
        self.users = self.trainees = self.twins = 0

    @property
    def status(self) -> InstructionDatasetStatus:
        return read_dataset_status(self.job.get("status") or {})

    def decide(self, family: dict[str, Any]) -> Plan[InstructionDatasetStatus]:
        meta = self.job["metadata"]
        counts: dict[str, Any] = {"users": self.users, "trainees": self.trainees, "twins": self.twins}
        discard = self.batches.get(names.discard_name(meta["name"], meta["uid"]))
        seen = ObservedDataset(Prepared.of(self.job), **family, **counts, discard=Batch.of(discard) if discard else None)
        plan = reconcile_dataset(seen, self.settings)
        if plan.hold is not None:
            meta["finalizers"] = [names.FINALIZER] if plan.hold else []
        return plan

    def delete(self) -> Self:
        """Its owner deletes it; with a finalizer it stays, marked."""
        self.job["metadata"]["deletionTimestamp"] = self.stamp
        self._stamped(self.job)
        return self

    @property
    def held(self) -> bool:
        """Whether our finalizer keeps it."""
        return names.FINALIZER in self.job["metadata"].get("finalizers", [])


def a_prepared_world(job: JobBuilder | None = None, *, outcome: Outcome = PREPARED, **fields: Any) -> World:
    """A world whose first attempt has just been started."""
    world = World(job, **fields)
    world.settle()
    world.finish("a-prepare", outcome)
    world.settle()
    return world
