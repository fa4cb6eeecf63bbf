"""What was last seen of each object, fed by watch events, by the answers to our own writes, and by full lists.

Whatever comes in a different order, the newest wins. A watch that was cut may have missed deletions: lists mend that.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from tunewright_crds import names
from tunewright_operator.observed import Awaited, Batch, Deployed, Identity, Job, Observed, ObservedDataset, Pod, Prepared, Resource, Served
from tunewright_operator.usage import Usage, Use, model_name, named_dataset

Key = tuple[str, str]  # namespace, name


class _View(Protocol):
    @property
    def id(self) -> Identity: ...


V = TypeVar("V", bound=_View)
R = TypeVar("R", bound=Resource)


class Shelf(Generic[V]):
    """The last views of one kind, by namespace and name."""

    def __init__(self) -> None:
        self.by_key: dict[Key, V] = {}

    def put(self, view: V) -> bool:
        """Keeps a view unless a newer one of the same object is there; True if something changed."""
        key = (view.id.namespace, view.id.name)
        before = self.by_key.get(key)
        if before and before.id.resource_version >= view.id.resource_version and view.id.resource_version:
            return False
        self.by_key[key] = view
        return True

    def drop(self, identity: Identity) -> V | None:
        """Forgets an object; another one of its name stays."""
        key = (identity.namespace, identity.name)
        held = self.by_key.get(key)
        if held is None or held.id.uid != identity.uid:
            return None
        return self.by_key.pop(key)


class Stores:
    """All that the operator remembers. It grows with the objects that exist, never with history."""

    def __init__(self) -> None:
        self.jobs: Shelf[Job] = Shelf()
        self.datasets: Shelf[Prepared] = Shelf()
        self.usage = Usage()
        self.batches: Shelf[Batch] = Shelf()
        self.pods: Shelf[Pod] = Shelf()
        self.models: Shelf[Served] = Shelf()
        self.deployments: Shelf[Deployed] = Shelf()
        # Children by the UID of their owner, by their own UID; with memories of the deleted.
        self._owners: dict[str, Identity] = {}
        self._batches_of: dict[str, dict[str, Batch]] = {}
        self._owner_of_batch: dict[str, str] = {}
        self._pods_of: dict[str, dict[str, Pod]] = {}
        self._pods_of_engine: dict[Key, dict[str, Pod]] = {}

    def observe(self, key: Key, *, now: datetime, confirmed: bool = False, obstacles: Mapping[str, str] | None = None) -> Observed | None:
        """A job with what belongs to it; None if there is no such job."""
        job = self.jobs.by_key.get(key)
        if job is None:
            return None
        return Observed(
            job,
            now,
            *self._children(job),
            confirmed,
            obstacles or {},
            self._awaited(job),
            model=self.models.by_key.get((key[0], model_name(job))),
            named=self.datasets.by_key.get((key[0], named_dataset(job))),
        )

    def observe_dataset(
        self, key: Key, *, now: datetime, confirmed: bool = False, obstacles: Mapping[str, str] | None = None
    ) -> ObservedDataset | None:
        """An InstructionDataset with what belongs to it; None if there is no such one."""
        dataset = self.datasets.by_key.get(key)
        if dataset is None:
            return None
        users = len(self.usage.users(Use.NAMES, key))
        seen = ObservedDataset(dataset, now, *self._children(dataset), confirmed, obstacles or {}, self._awaited(dataset), users=users)
        return self._with_what_keeps_it(seen, dataset) if dataset.id.deleting else seen

    def _awaited(self, owner: Resource) -> dict[str, Awaited]:
        found = {}
        for key in self.usage.used_by(owner.id.uid, Use.AWAITS):
            makers = (self.jobs.by_key.get((job.namespace, job.name)) for job in self.usage.users(Use.MAKES, key))
            others = tuple(job for job in makers if job and job.id.uid != owner.id.uid)
            found[key[1]] = Awaited(self.models.by_key.get(key), others)
        return found

    def _with_what_keeps_it(self, seen: ObservedDataset, dataset: Prepared) -> ObservedDataset:
        namespace, digest = dataset.id.namespace, dataset.digest
        others = [other for other in self.datasets.by_key.values() if other.id.namespace == namespace and other.id.uid != dataset.id.uid]
        return replace(
            seen,
            trainees=len(self.usage.users(Use.TRAINS, (namespace, digest))),
            twins=sum(1 for other in others if other.digest == digest and not (other.id.deleting and other.id.held)),
            discard=self.batches.by_key.get((namespace, names.discard_name(dataset.id.name, dataset.id.uid))),
        )

    def _children(self, owner: Resource) -> tuple[tuple[Batch, ...], tuple[Pod, ...]]:
        batches = _one_of_each_name(self._batches_of.get(owner.id.uid, {}).values())
        return batches, tuple(pod for batch in batches for pod in self._pods_of.get(batch.id.uid, {}).values())

    def put_job(self, job: Job) -> bool:
        """Keeps a job."""
        if not self._put_owner(self.jobs, job):
            return False
        self.usage.put(job)
        return True

    def drop_job(self, identity: Identity) -> None:
        """Forgets a job with every memory of its children."""
        self.usage.drop(identity.uid)
        self.jobs.drop(identity)
        self._forget_owner(identity)

    def put_dataset(self, dataset: Prepared) -> bool:
        """Keeps an InstructionDataset."""
        if not self._put_owner(self.datasets, dataset):
            return False
        self.usage.put(dataset)
        return True

    def drop_dataset(self, identity: Identity) -> None:
        """Forgets an InstructionDataset with every memory of its children."""
        self.usage.drop(identity.uid)
        self.datasets.drop(identity)
        self._forget_owner(identity)

    def _put_owner(self, shelf: Shelf[R], view: R) -> bool:
        before = shelf.by_key.get((view.id.namespace, view.id.name))
        if not shelf.put(view):
            return False
        if before and before.id.uid != view.id.uid:
            self.usage.drop(before.id.uid)
            self._forget_owner(before.id)
        self._owners[view.id.uid] = view.id
        return True

    def _forget_owner(self, identity: Identity) -> None:
        self._owners.pop(identity.uid, None)
        for batch in list(self._batches_of.get(identity.uid, {}).values()):
            if batch.gone:
                self._forget_batch(batch)

    def put_batch(self, batch: Batch) -> bool:
        """Keeps a batch Job."""
        if not self.batches.put(batch):
            return False
        self._batches_of.setdefault(batch.owner, {})[batch.id.uid] = batch
        self._owner_of_batch[batch.id.uid] = batch.owner
        return True

    def drop_batch(self, identity: Identity) -> Batch | None:
        """Remembers a batch Job as deleted, as long as its owner is there."""
        batch = self.batches.drop(identity)
        if batch and batch.owner in self._owners:
            self._batches_of.setdefault(batch.owner, {})[identity.uid] = batch.remembered()
        elif batch:
            self._forget_batch(batch)
        return batch

    def forget_the_told(self, owner: Resource, *, told: Collection[str]) -> None:
        """Drops the memories of children whose end is in the status (``told``: names of batch Jobs)."""
        for batch in list(self._batches_of.get(owner.id.uid, {}).values()):
            if batch.gone and batch.id.name in told:
                self._forget_batch(batch)

    def put_pod(self, pod: Pod) -> bool:
        """Keeps a pod. One that was orphaned (deleted its Job, not its pod) still works for its job until it ends."""
        before = self.pods.by_key.get((pod.id.namespace, pod.id.name))
        if before and before.id.uid == pod.id.uid and not pod.owner:
            pod = replace(pod, owner=before.owner)
        if not self.pods.put(pod):
            return False
        if pod.engine:
            self._pods_of_engine.setdefault((pod.id.namespace, pod.engine), {})[pod.id.uid] = pod
        else:
            self._pods_of.setdefault(pod.owner, {})[pod.id.uid] = pod
        return True

    def drop_pod(self, identity: Identity) -> Pod | None:
        """Remembers a pod as deleted, with its last words, as long as its batch Job is there or remembered."""
        pod = self.pods.drop(identity)
        if pod is None:
            return None
        if pod.engine:
            self._pods_of_engine.get((pod.id.namespace, pod.engine), {}).pop(identity.uid, None)
        elif pod.owner in self._owner_of_batch:
            self._pods_of[pod.owner][identity.uid] = pod.remembered()
        else:
            siblings = self._pods_of.get(pod.owner, {})
            siblings.pop(identity.uid, None)
            if not siblings:
                self._pods_of.pop(pod.owner, None)
        return pod

    def owner_of_pod(self, pod: Pod) -> Identity | None:
        """The job or InstructionDataset that a pod works for."""
        return self._owners.get(self._owner_of_batch.get(pod.owner, ""))

    def owner_of_batch(self, batch: Batch) -> Identity | None:
        """The job or InstructionDataset that a batch Job belongs to."""
        return self._owners.get(batch.owner)

    def engine_pods(self, key: Key) -> tuple[Pod, ...]:
        """The pods of an engine."""
        return tuple(self._pods_of_engine.get(key, {}).values())

    def _forget_batch(self, batch: Batch) -> None:
        held = self._batches_of.get(batch.owner, {})
        held.pop(batch.id.uid, None)
        if not held:
            self._batches_of.pop(batch.owner, None)
        self._owner_of_batch.pop(batch.id.uid, None)
        for pod in self._pods_of.pop(batch.id.uid, {}).values():
            self.pods.drop(pod.id)


def _one_of_each_name(batches: Collection[Batch]) -> tuple[Batch, ...]:
    """Of several Jobs that had one name in turn, the last; one that is still there counts more than a memory."""
    newest: dict[str, Batch] = {}
    for batch in sorted(batches, key=lambda batch: (not batch.gone, batch.id.resource_version)):
        newest[batch.id.name] = batch
    return tuple(newest.values())
