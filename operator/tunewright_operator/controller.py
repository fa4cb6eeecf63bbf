"""Looks, asks ``reconcile`` what to do, and does it. All writes for jobs and engines happen here.

Order within a pass: delete, create, publish, status, events. Whatever was done before a crash answers "done already" afterwards.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import BaseModel

from tunewright_crds import names
from tunewright_crds.errors import FailureCode
from tunewright_crds.job import JobStatus
from tunewright_crds.names import Phase
from tunewright_operator import builders
from tunewright_operator.attempts import OBSTACLE_SECONDS
from tunewright_operator.cluster import Cluster, ClusterError, Conflict, Gone, Refused
from tunewright_operator.engines import EngineError, Engines
from tunewright_operator.metrics import Metrics
from tunewright_operator.models import UNSERVED, Engine, EnginePlan, Holdings, Load, Wanted, ready_pods, reconcile_engine
from tunewright_operator.observed import Batch, Deployed, Identity, Job, Observed, Pod, Served, owner_uid, read_status
from tunewright_operator.plan import Plan, Told
from tunewright_operator.queue import KeyedQueue
from tunewright_operator.reconcile import reconcile
from tunewright_operator.settings import Settings
from tunewright_operator.stores import Key, Stores

log = logging.getLogger(__name__)

Manifest = dict[str, Any]

# Passes at once: enough to hide the API server's latency, few enough to be gentle with it.
_JOB_WORKERS: Final = 32
_ENGINE_WORKERS: Final = 8
# Written by the front end, never by us.
_NOT_OURS: Final = "progress"


def _utc_now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


class Controller:
    """The doing half of the operator, around ``stores``, ``cluster`` and two queues."""

    def __init__(
        self,
        settings: Settings,
        *,
        cluster: Cluster,
        engines: Engines,
        stores: Stores,
        metrics: Metrics,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self.settings = settings
        self.cluster = cluster
        self.engines = engines
        self.stores = stores
        self.metrics = metrics
        self.now = now
        self.watch_events = 0  # counted by whoever feeds the stores
        self.jobs: KeyedQueue[Key] = KeyedQueue(
            self.look_after_job, width=_JOB_WORKERS, on_error=lambda _: metrics.errors.labels("jobs").inc()
        )
        self.serving: KeyedQueue[Key] = KeyedQueue(
            self.look_after_engine, width=_ENGINE_WORKERS, on_error=lambda _: metrics.errors.labels("engines").inc()
        )

    # Jobs

    async def look_after_job(self, key: Key) -> None:
        """One pass over one job."""
        started = time.monotonic()
        seen = self.stores.observe(key, now=self.now())
        if seen is None:
            return
        plan = reconcile(seen, self.settings)
        if plan.doubtful:
            await self._refresh(seen)
            seen = self.stores.observe(key, now=self.now(), confirmed=True)
            if seen is None:
                return
            plan = reconcile(seen, self.settings)
        await self._carry_out(seen, plan)
        self.metrics.passes.observe(time.monotonic() - started)

    async def _carry_out(self, seen: Observed, plan: Plan) -> None:
        key = (seen.job.id.namespace, seen.job.id.name)
        for batch in plan.delete:
            await self.cluster.delete("Job", batch.id, foreground=True)
        obstacles = await self._create(seen, plan.create)
        if obstacles:
            seen = self._observe_again(key, obstacles) or seen
            plan = reconcile(seen, self.settings)
            plan.create.clear()
        if plan.publish:
            self.take_model(Served.of(await self.cluster.apply(plan.publish)))
        await self._write_status(seen, plan.status)
        for told in plan.events:
            await self._tell(seen.job.id, told)
        if plan.delete_job:
            await self.cluster.delete("InstructionTuningJob", seen.job.id)
        if plan.wake_at:
            self.jobs.poke_in(key, (plan.wake_at - self.now()).total_seconds() + 0.05)

    def _observe_again(self, key: Key, obstacles: dict[str, str]) -> Observed | None:
        self.jobs.poke_in(key, OBSTACLE_SECONDS)
        return self.stores.observe(key, now=self.now(), confirmed=True, obstacles=obstacles)

    async def _create(self, seen: Observed, manifests: list[Manifest]) -> dict[str, str]:
        """Makes children in order. Returns what stands in the way of one: {name: why}; the ones after it are not made then."""
        for manifest in manifests:
            name = manifest["metadata"]["name"]
            try:
                live = await self.cluster.create(manifest)
            except Conflict:
                found = await self.cluster.get(manifest["kind"], seen.job.id.namespace, name)
                if found is None or owner_uid(found) != seen.job.id.uid:
                    return {
                        name: f"a {manifest['kind']} named {name} stands in the way that does not belong to this job; delete it to go on"
                    }
                live = found
            except Refused as refused:
                log.warning("%s/%s: %s", seen.job.id.namespace, seen.job.id.name, refused)
                return {name: f"the {manifest['kind']} {name} was refused: {str(refused).partition(': ')[2]}"}
            if manifest["kind"] == "Job":
                self.stores.put_batch(Batch.of(live))
        return {}

    async def _write_status(self, seen: Observed, status: JobStatus) -> None:
        """Writes the fields that differ, into that very job; counts what came to an end."""
        before, after = dump(read_status(seen.job.raw_status)), dump(status)
        stored = seen.job.raw_status
        changes = status_changes(stored, before, after, keep=_NOT_OURS)
        if not changes:
            return
        if not stored:
            # The first status is written whole: it must not wipe out one that came meanwhile.
            version = str(seen.job.id.resource_version)
            changes.insert(0, {"op": "test", "path": "/metadata/resourceVersion", "value": version})
        try:
            live = await self.cluster.patch_status("InstructionTuningJob", seen.job.id, changes)
        except (Gone, Refused):
            await self._refresh(seen)
            raise
        self.stores.put_job(Job.of(live))
        self.stores.forget_the_told(seen.job, told=_told_children(seen.job.id, status))
        if status.phase != before.get("phase"):
            log.info("%s/%s is %s%s", live["metadata"]["namespace"], live["metadata"]["name"], status.phase, _because(status))
        self._count(seen.job.id.namespace, before, status)

    def _count(self, namespace: str, before: Manifest, status: JobStatus) -> None:
        if status.phase.terminal and before.get("phase") != status.phase:
            if status.phase is Phase.SUCCEEDED:
                self.metrics.succeeded.labels(namespace).inc()
            elif status.phase is Phase.FAILED:
                self.metrics.failed.labels(namespace, status.error.code if status.error else FailureCode.INTERNAL).inc()
        ended = {entry["number"] for entry in before.get("attempts", ()) if entry.get("endTime")}
        known = {entry["number"] for entry in before.get("attempts", ())}
        for attempt in status.attempts:
            if attempt.end_time and attempt.number not in ended and attempt.start_time:
                self.metrics.train.observe((attempt.end_time - attempt.start_time).total_seconds())
            if attempt.number in known:
                continue
            if attempt.number == 1 and attempt.start_time and status.start_time:
                self.metrics.prepare.observe((attempt.start_time - status.start_time).total_seconds())
            previous = next((entry for entry in status.attempts if entry.number == attempt.number - 1), None)
            if previous:
                self.metrics.restarted.labels(namespace, previous.reason).inc()

    async def _tell(self, about: Identity, told: Told) -> None:
        """Events are for people; a job does not wait for one."""
        stamp = self.now().strftime("%Y-%m-%dT%H:%M:%SZ")
        event = builders.event(
            about,
            kind="InstructionTuningJob",
            reason=told.reason,
            message=told.message,
            warning=told.warning,
            stamp=stamp,
            unique=told.unique,
        )
        try:
            await self.cluster.create(event)
        except Conflict:
            return
        except ClusterError as error:
            log.info("an event was not written: %s", error)

    async def _refresh(self, seen: Observed) -> None:
        """Reads one job and its children live, and corrects the stores."""
        job = seen.job.id
        live = await self.cluster.get("InstructionTuningJob", job.namespace, job.name)
        if live is None or live["metadata"]["uid"] != job.uid:
            self.stores.drop_job(job)
        if live is None:
            return
        self.stores.put_job(Job.of(live))
        selector = f"{names.LABEL_JOB_UID}={live['metadata']['uid']}"
        batches = [Batch.of(body) async for body in self.cluster.list_all("Job", job.namespace, labels=selector)]
        pods = [Pod.of(body) async for body in self.cluster.list_all("Pod", job.namespace, labels=selector)]
        for batch in batches:
            self.stores.put_batch(batch)
        for pod in pods:
            self.stores.put_pod(pod)
        there = {batch.id.uid for batch in batches} | {pod.id.uid for pod in pods}
        for batch in seen.batches:
            if batch.id.uid not in there:
                self.stores.drop_batch(batch.id)
        for pod in seen.pods:
            if pod.id.uid not in there:
                self.stores.drop_pod(pod.id)

    # Engines

    def take_model(self, view: Served, *, deleted: bool = False) -> bool:
        """Keeps a TunedModel; its engine, and the one that it leaves, hear of it. Returns whether anything changed."""
        had = self.stores.models.by_key.get((view.id.namespace, view.id.name))
        if not (self.stores.models.drop(view.id) if deleted else self.stores.models.put(view)):
            return False
        for key in {key for seen in (had, view) if seen for key in engine_keys(seen)}:
            self.serving.poke(key)
        return True

    async def look_after_engine(self, key: Key) -> None:
        """One pass over one engine; ``key``: namespace and name of the engine."""
        engine = await self._see_engine(key)
        plan = reconcile_engine(engine, self.settings)
        trouble = await self._change_engine(engine, plan)
        if plan.loads:
            engine = await self._see_engine(key, trouble)
            plan = reconcile_engine(engine, self.settings)
        for model in engine.models:
            await self._write_model_status(model, plan)
        if plan.wake_in is not None:
            self.serving.poke_in(key, plan.wake_in)

    async def _see_engine(self, key: Key, trouble: dict[str, str] | None = None) -> Engine:
        namespace, name = key
        wanted = [Wanted.of(view) for view in self.stores.models.by_key.values() if view.id.namespace == namespace]
        models = tuple(model for model in wanted if model and model.engine == name and not model.id.deleting)
        pods = self.stores.engine_pods(key) if name != UNSERVED else ()
        answering = ready_pods(pods) if models else []
        held = await asyncio.gather(*(self._ask(pod) for pod in answering))
        holdings = {pod.id.name: answer for pod, answer in zip(answering, held, strict=True)}
        return Engine(namespace, name, models, self.stores.deployments.by_key.get(key), pods, holdings, self.now(), trouble or {})

    async def _ask(self, pod: Pod) -> Holdings | None:
        try:
            return await self.engines.holdings(pod.ip)
        except EngineError as error:
            log.info("engine pod %s/%s: %s", pod.id.namespace, pod.id.name, error)
            return None

    async def _change_engine(self, engine: Engine, plan: EnginePlan) -> dict[str, str]:
        """Applies, removes, loads. Returns what could not be loaded: {model: why}."""
        for manifest in reversed(plan.apply):
            live = await self.cluster.apply(manifest)
            if manifest["kind"] == "Deployment":
                self.stores.deployments.put(Deployed.of(live))
        if plan.remove:
            for kind in ("Deployment", "Service", "NetworkPolicy"):
                found = await self.cluster.get(kind, engine.namespace, engine.name)
                if found and (found["metadata"].get("labels") or {}).get(names.LABEL_MANAGED_BY) == names.MANAGED_BY:
                    await self.cluster.delete(kind, Identity.of(found))
        return dict([told for told in await asyncio.gather(*(self._load(load) for load in plan.loads)) if told])

    async def _load(self, load: Load) -> tuple[str, str] | None:
        try:
            await self.engines.carry_out(load)
        except EngineError as error:
            return load.model, str(error)
        return None

    async def _write_model_status(self, model: Wanted, plan: EnginePlan) -> None:
        status = plan.statuses.get(model.id.name)
        view = self.stores.models.by_key.get((model.id.namespace, model.id.name))
        if status is None or view is None or view.id.uid != model.id.uid:
            return
        changes = status_changes(view.raw_status, dump(model.status), dump(status))
        if not changes:
            return
        try:
            live = await self.cluster.patch_status("TunedModel", model.id, changes)
        except Gone:
            return
        self.stores.models.put(Served.of(live))

    # Everything

    async def resync(self) -> int:
        """Compares all that is remembered with full lists and corrects it. Returns how many objects the watch should have told of."""
        corrections = 0
        ours = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
        corrections += await self._resync_kind("Job", self.stores.batches, Batch.of, self.stores.put_batch, self.stores.drop_batch, ours)
        corrections += await self._resync_kind("Pod", self.stores.pods, Pod.of, self.stores.put_pod, self.stores.drop_pod, ours)
        corrections += await self._resync_kind(
            "InstructionTuningJob", self.stores.jobs, Job.of, self.stores.put_job, self.stores.drop_job, ""
        )
        models, deployments = self.stores.models, self.stores.deployments
        corrections += await self._resync_kind("TunedModel", models, Served.of, models.put, models.drop, "")
        corrections += await self._resync_kind("Deployment", deployments, Deployed.of, deployments.put, deployments.drop, ours)
        for key in list(self.stores.jobs.by_key):
            self.jobs.poke(key)
        for namespace, name in {key for view in models.by_key.values() for key in engine_keys(view)} | set(deployments.by_key):
            self.serving.poke((namespace, name))
        return corrections

    async def _resync_kind(
        self,
        kind: str,
        shelf: Any,
        view_of: Callable[[Manifest], Any],
        put: Callable[[Any], bool],
        drop: Callable[[Identity], object],
        labels: str,
    ) -> int:
        before = {view.id.uid for view in shelf.by_key.values()}
        live: set[str] = set()
        corrections = 0
        for namespace in self.settings.watched_namespaces or ("",):
            async for body in self.cluster.list_all(kind, namespace, labels=labels):
                view = view_of(body)
                live.add(view.id.uid)
                corrections += put(view)
        # Only what was there before the list began can be missing from it.
        for view in [view for view in shelf.by_key.values() if view.id.uid in before - live]:
            drop(view.id)
            corrections += 1
        return corrections

    def count_jobs(self) -> None:
        """Brings the gauges up to date."""
        self.metrics.count_jobs(
            (view.id.namespace, view.raw_status.get("phase", Phase.PENDING)) for view in self.stores.jobs.by_key.values()
        )
        self.metrics.depth.labels("jobs").set(self.jobs.depth)
        self.metrics.depth.labels("engines").set(self.serving.depth)
        self.metrics.writes.set(self.cluster.writes)


def engine_keys(view: Served) -> set[Key]:
    """The engine that a model needs now."""
    wanted = Wanted.of(view)
    return {(view.id.namespace, wanted.engine)} if wanted else set()


def dump(status: BaseModel) -> Manifest:
    """A status as it is stored: the manifest's names, without what is not known."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def status_changes(stored: Manifest, before: Manifest, after: Manifest, *, keep: str = "") -> list[Manifest]:
    """The JSON patch from one status to the next, field by field; fields that we do not change are not touched, whoever writes them meanwhile.

    ``before`` is ``stored`` as we read it (with defaults); ``keep`` names a field of somebody else.
    """
    if not stored:
        return [{"op": "add", "path": "/status", "value": {name: value for name, value in after.items() if name != keep}}]
    changed = [name for name in {**before, **after} if name != keep and before.get(name) != after.get(name)]
    set_ = [{"op": "add", "path": f"/status/{name}", "value": after[name]} for name in changed if name in after]
    return set_ + [{"op": "remove", "path": f"/status/{name}"} for name in changed if name not in after and name in stored]


def _because(status: JobStatus) -> str:
    return f": {status.error.code}: {status.error.message}" if status.error else ""


def _told_children(job: Identity, status: JobStatus) -> set[str]:
    """Names of the batch Jobs whose end is in the status."""
    told = {names.attempt_name(job.name, attempt.number) for attempt in status.attempts if attempt.end_time}
    return told | ({names.prepare_name(job.name)} if status.dataset else set())
