"""Looks, asks ``reconcile`` what to do, and does it. All writes for jobs, InstructionDatasets and engines happen here.

Order within a pass: delete, create, publish, status, events. Whatever was done before a crash answers "done already" afterwards.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from tunewright_crds import names
from tunewright_crds.errors import FailureCode
from tunewright_crds.names import Phase
from tunewright_crds.status import JobStatus, PreparationStatus
from tunewright_operator import builders
from tunewright_operator.budgets import OBSTACLE_SECONDS
from tunewright_operator.cluster import Cluster, ClusterError, Conflict, Gone, Refused
from tunewright_operator.datasets import reconcile_dataset
from tunewright_operator.engines import EngineError, Engines
from tunewright_operator.metrics import Metrics, count_phases
from tunewright_operator.models import UNSERVED, Engine, EnginePlan, Holdings, Load, Wanted, ready_pods, reconcile_engine
from tunewright_operator.node_list import NodeList
from tunewright_operator.observed import (
    Batch,
    Deployed,
    Family,
    Identity,
    Job,
    Pod,
    Prepared,
    Resource,
    Served,
    owner_uid,
    read_dataset_status,
    read_status,
)
from tunewright_operator.plan import Plan, Told
from tunewright_operator.queue import KeyedQueue
from tunewright_operator.reconcile import reconcile
from tunewright_operator.settings import Settings
from tunewright_operator.stores import Key, Stores
from tunewright_operator.usage import Use, model_name

log = logging.getLogger(__name__)

Manifest = dict[str, Any]
F = TypeVar("F", bound=Family)

# Passes at once: enough to hide the API server's latency, few enough to be gentle with it.
_JOB_WORKERS: Final = 32
_DATASET_WORKERS: Final = 8
_ENGINE_WORKERS: Final = 8
# Written by the front end, never by us.
_NOT_OURS: Final = "progress"


def _utc_now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


class Controller:
    """The doing half of the operator, around ``stores``, ``cluster`` and three queues."""

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
        self.nodes = NodeList(cluster, seconds=settings.resync_seconds)
        self.watch_events = 0  # counted by whoever feeds the stores
        self.jobs: KeyedQueue[Key] = KeyedQueue(
            self.look_after_job, width=_JOB_WORKERS, on_error=lambda _: metrics.errors.labels("jobs").inc()
        )
        self.datasets: KeyedQueue[Key] = KeyedQueue(
            self.look_after_dataset, width=_DATASET_WORKERS, on_error=lambda _: metrics.errors.labels("datasets").inc()
        )
        self.serving: KeyedQueue[Key] = KeyedQueue(
            self.look_after_engine, width=_ENGINE_WORKERS, on_error=lambda _: metrics.errors.labels("engines").inc()
        )

    # Jobs and InstructionDatasets

    def poke(self, owner: Identity) -> None:
        """Asks for a pass over a job or an InstructionDataset."""
        self._queue(owner.kind).poke((owner.namespace, owner.name))

    def _queue(self, kind: str) -> KeyedQueue[Key]:
        return self.datasets if kind == Prepared.KIND else self.jobs

    def take_job(self, job: Job, *, deleted: bool = False) -> bool:
        """Keeps a job; the InstructionDataset that it begins or ceases to use hears of it, and whoever waits for its model. Returns whether anything changed."""
        usage, had = self.stores.usage, self.stores.jobs.by_key.get((job.id.namespace, job.id.name))
        before = usage.used_by(job.id.uid, Use.NAMES)
        if deleted:
            self.stores.drop_job(job.id)
        elif not self.stores.put_job(job):
            return False
        for key in {*before} ^ {*usage.used_by(job.id.uid, Use.NAMES)}:
            self.datasets.poke(key)
        if deleted or had is None or had.raw_status.get("phase") != job.raw_status.get("phase"):
            self._poke_those_who_await((job.id.namespace, model_name(job)))
        return True

    def _poke_those_who_await(self, model: Key) -> None:
        for waiting in self.stores.usage.users(Use.AWAITS, model):
            self.poke(waiting)

    def take_dataset(self, view: Prepared, *, deleted: bool = False) -> bool:
        """Keeps an InstructionDataset; the jobs that wait for it hear of what matters to them. Returns whether anything changed."""
        key = (view.id.namespace, view.id.name)
        before = self.stores.datasets.by_key.get(key)
        if deleted:
            self.stores.drop_dataset(view.id)
        elif not self.stores.put_dataset(view):
            return False
        if deleted or before is None or _heard_by_jobs(before) != _heard_by_jobs(view):
            for job in self.stores.usage.users(Use.WAITS, key):
                self.poke(job)
        return True

    async def look_after_job(self, key: Key) -> None:
        """One pass over one job."""
        await self._look_after(key, self.stores.observe, reconcile)

    async def look_after_dataset(self, key: Key) -> None:
        """One pass over one InstructionDataset."""
        await self._look_after(key, self.stores.observe_dataset, reconcile_dataset)

    async def _look_after(self, key: Key, observe: Callable[..., F | None], decide: Callable[[F, Settings], Plan[Any]]) -> None:
        started = time.monotonic()
        seen = observe(key, now=self.now())
        if seen is None:
            return
        plan = decide(seen, self.settings)
        if plan.doubtful:
            await self._refresh(seen)
            seen = observe(key, now=self.now(), confirmed=True)
            if seen is None:
                return
            plan = decide(seen, self.settings)
        if plan.on_gpus:
            seen = replace(seen, nodes=await self.nodes.look())
            plan = decide(seen, self.settings)
        if plan.hold:
            await self._hold(seen.owner.id, hold=True)
            self.poke(seen.owner.id)
            return
        obstacles = await self._make(seen, plan)
        if obstacles:
            self._queue(seen.owner.id.kind).poke_in(key, OBSTACLE_SECONDS)
            seen = observe(key, now=self.now(), confirmed=True, obstacles=obstacles) or seen
            plan = decide(seen, self.settings)
        await self._tell_all(seen, plan)
        self.metrics.passes.observe(time.monotonic() - started)

    async def _make(self, seen: Family, plan: Plan[Any]) -> dict[str, str]:
        """Deletes and makes children. Returns what stands in the way of one: {name: why}."""
        for batch in plan.delete:
            await self.cluster.delete("Job", batch.id, foreground=True)
        owner = seen.owner.id
        if plan.needs and await self.cluster.get("ConfigMap", owner.namespace, plan.needs) is None:
            return {
                plan.needs: f"the ConfigMap {plan.needs} is gone, and so is the InstructionDataset that it was made of; apply that again"
            }
        return await self._create(seen, plan.create)

    async def _tell_all(self, seen: Family, plan: Plan[Any]) -> None:
        owner = seen.owner.id
        if plan.publish:
            self.take_model(Served.of(await self.cluster.apply(plan.publish)))
        await self._write_status(seen, plan.status)
        for told in plan.events:
            await self._tell(owner, told)
        if plan.delete_owner:
            await self.cluster.delete(owner.kind, owner)
        if plan.hold is False:
            await self._hold(owner, hold=False)
        if plan.wake_at:
            self._queue(owner.kind).poke_in((owner.namespace, owner.name), (plan.wake_at - self.now()).total_seconds() + 0.05)

    async def _hold(self, owner: Identity, *, hold: bool) -> None:
        """Puts our finalizer on an InstructionDataset, or takes it off; other finalizers stay."""
        live = await self.cluster.get(owner.kind, owner.namespace, owner.name)
        if live is None or live["metadata"]["uid"] != owner.uid:
            self.stores.drop_dataset(owner)
            return
        meta = live["metadata"]
        others = [finalizer for finalizer in meta.get("finalizers") or () if finalizer != names.FINALIZER]
        unchanged = {"op": "test", "path": "/metadata/resourceVersion", "value": meta["resourceVersion"]}
        change = {"op": "add", "path": "/metadata/finalizers", "value": [*others, *([names.FINALIZER] if hold else [])]}
        held = Prepared.of(await self.cluster.patch(owner.kind, owner, [unchanged, change]))
        if not owner.deleting:  # else it is gone by now
            self.take_dataset(held)

    async def _create(self, seen: Family, manifests: list[Manifest]) -> dict[str, str]:
        """Makes children in order. Returns what stands in the way of one: {name: why}; the ones after it are not made then."""
        owner = seen.owner.id
        for manifest in manifests:
            name = manifest["metadata"]["name"]
            try:
                live = await self.cluster.create(manifest)
            except Conflict:
                found = await self.cluster.get(manifest["kind"], owner.namespace, name)
                if found is None or owner_uid(found) != owner_uid(manifest):
                    told = f"a {manifest['kind']} named {name} stands in the way that does not belong to this {owner.kind}"
                    return {name: f"{told}; delete it to go on"}
                live = found
            except Refused as refused:
                log.warning("%s/%s: %s", owner.namespace, owner.name, refused)
                return {name: f"the {manifest['kind']} {name} was refused: {str(refused).partition(': ')[2]}"}
            if manifest["kind"] == "Job":
                self.stores.put_batch(Batch.of(live))
        return {}

    async def _write_status(self, seen: Family, status: PreparationStatus) -> None:
        """Writes the fields that differ, into that very resource; counts what came to an end."""
        owner, stored = seen.owner.id, seen.owner.raw_status
        before, after = dump(read_status(stored) if isinstance(status, JobStatus) else read_dataset_status(stored)), dump(status)
        changes = status_changes(stored, before, after, keep=_NOT_OURS)
        if not changes:
            return
        if not stored:
            # The first status is written whole: it must not wipe out one that came meanwhile.
            changes.insert(0, {"op": "test", "path": "/metadata/resourceVersion", "value": str(owner.resource_version)})
        try:
            live = await self.cluster.patch_status(owner.kind, owner, changes)
        except (Gone, Refused):
            await self._refresh(seen)
            raise
        self._take(owner.kind, live)
        self.stores.forget_the_told(seen.owner, told=_told_children(owner, status))
        if after["phase"] != before.get("phase"):
            log.info("%s %s/%s is %s%s", owner.kind, owner.namespace, owner.name, after["phase"], _because(status))
        if isinstance(status, JobStatus):
            self._count(owner.namespace, before, status)

    def _take(self, kind: str, live: Manifest) -> None:
        if kind == Prepared.KIND:
            self.take_dataset(Prepared.of(live))
        else:
            self.take_job(Job.of(live))

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

    async def _refresh(self, seen: Family) -> None:
        """Reads one owner and its children live, and corrects the stores."""
        owner = seen.owner.id
        live = await self.cluster.get(owner.kind, owner.namespace, owner.name)
        if live is None or live["metadata"]["uid"] != owner.uid:
            if owner.kind == Prepared.KIND:
                self.stores.drop_dataset(owner)
            else:
                self.stores.drop_job(owner)
        if live is None:
            return
        self._take(owner.kind, live)
        selector = "=".join(builders.uid_label(Identity.of(live, kind=owner.kind)))
        batches = [Batch.of(body) async for body in self.cluster.list_all("Job", owner.namespace, labels=selector)]
        pods = [Pod.of(body) async for body in self.cluster.list_all("Pod", owner.namespace, labels=selector)]
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
        """Keeps a TunedModel; its engine, the one that it leaves, and whoever waits for it hear of it. Returns whether anything changed."""
        had = self.stores.models.by_key.get((view.id.namespace, view.id.name))
        if not (self.stores.models.drop(view.id) if deleted else self.stores.models.put(view)):
            return False
        for key in {key for seen in (had, view) if seen for key in engine_keys(seen)}:
            self.serving.poke(key)
        if deleted or had is None or (had.packed_spec, had.id.deleting) != (view.packed_spec, view.id.deleting):
            self._poke_those_who_await((view.id.namespace, view.id.name))
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
        stores = self.stores
        corrections += await self._resync_kind(Prepared.KIND, stores.datasets, Prepared.of, stores.put_dataset, stores.drop_dataset, "")
        corrections += await self._resync_kind(Job.KIND, stores.jobs, Job.of, stores.put_job, stores.drop_job, "")
        models, deployments = self.stores.models, self.stores.deployments
        corrections += await self._resync_kind("TunedModel", models, Served.of, models.put, models.drop, "")
        corrections += await self._resync_kind("Deployment", deployments, Deployed.of, deployments.put, deployments.drop, ours)
        for view in (*stores.datasets.by_key.values(), *stores.jobs.by_key.values()):
            self.poke(view.id)
        for namespace, name in {key for model in models.by_key.values() for key in engine_keys(model)} | set(deployments.by_key):
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

    def count(self) -> None:
        """Brings the gauges up to date."""
        for gauge, shelf in ((self.metrics.jobs, self.stores.jobs), (self.metrics.datasets, self.stores.datasets)):
            views: Iterable[Resource] = shelf.by_key.values()
            count_phases(gauge, ((view.id.namespace, view.raw_status.get("phase", Phase.PENDING)) for view in views))
        self.metrics.depth.labels("jobs").set(self.jobs.depth)
        self.metrics.depth.labels("datasets").set(self.datasets.depth)
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


def _because(status: PreparationStatus) -> str:
    return f": {status.error.code}: {status.error.message}" if status.error else ""


def _told_children(owner: Identity, status: PreparationStatus) -> set[str]:
    """Names of the batch Jobs whose end is in the status."""
    attempts = status.attempts if isinstance(status, JobStatus) else []
    told = {names.attempt_name(owner.name, attempt.number) for attempt in attempts if attempt.end_time}
    if isinstance(status, JobStatus) and (status.evaluation or status.phase.terminal):
        told.add(names.evaluate_name(owner.name))
    return told | ({builders.shards_name(owner), builders.prepare_name(owner)} if status.dataset else set())


def _heard_by_jobs(dataset: Prepared) -> tuple[bool, Manifest]:
    """What of an InstructionDataset concerns the jobs that wait for it: everything but who else uses it."""
    status = dataset.raw_status
    return dataset.id.deleting, {name: status.get(name) for name in ("phase", "conditions", "dataset", "error")}
