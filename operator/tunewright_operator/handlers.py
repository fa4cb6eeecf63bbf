"""What kopf does for us: watching. Its handlers only feed the stores and poke the queues; every decision is made elsewhere.

Nothing of kopf is written into anybody's objects: no finalizers, no annotations, no events, no peering.
"""

import logging
from collections.abc import Callable
from typing import Any, Final

import kopf

from tunewright_crds import names
from tunewright_operator.controller import Controller
from tunewright_operator.models import Wanted
from tunewright_operator.observed import Batch, Deployed, Identity, Job, Pod, Prepared, Served

log = logging.getLogger(__name__)

OURS: Final = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"

# Silence of a watch after which it is made anew; the API server sends a bookmark every minute.
_SILENCE_SECONDS: Final = 70.0
# Waits between tries of a list that fails, ten minutes in all; then kopf gives up, the process ends, and a new one begins.
_LIST_BACKOFFS: Final = (0.5, 1, 2, 3, 5, 8, 13, *([20] * 30))


class _NoDiffs(kopf.DiffBaseStorage):
    """kopf copies every object of every event, twice, to see what changed; nobody here asks for that."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):
    """Where kopf would keep the progress of handlers that change objects: we have none."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def kopf_settings() -> kopf.OperatorSettings:
    """How kopf shall watch."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True  # would need the right to list every namespace and definition
    settings.watching.inactivity_timeout = _SILENCE_SECONDS
    settings.watching.connect_timeout = 5
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = _LIST_BACKOFFS
    settings.queueing.idle_timeout = 1
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.persistence.progress_storage = _NoProgress()
    settings.process.ultimate_exiting_timeout = 10
    for group, plural in (("batch", "jobs"), ("", "pods"), ("apps", "deployments")):
        settings.watching.label_selectors[f"{plural}.{group}" if group else plural] = OURS
    return settings


def registry(controller: Controller, connection: kopf.ConnectionInfo) -> kopf.OperatorRegistry:
    """The handlers of one operator."""
    found = kopf.OperatorRegistry()

    @kopf.on.login(registry=found)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return connection

    feed = Feed(controller)
    ours = {names.LABEL_MANAGED_BY: names.MANAGED_BY}
    for group, version, plural, take, labels in (
        (names.GROUP, names.VERSION, names.JOBS, feed.job, None),
        (names.GROUP, names.VERSION, names.DATASETS, feed.dataset, None),
        (names.GROUP, names.VERSION, names.MODELS, feed.model, None),
        ("batch", "v1", "jobs", feed.batch, ours),
        ("", "v1", "pods", feed.pod, ours),
        ("apps", "v1", "deployments", feed.deployment, ours),
    ):
        kopf.on.event(group, version, plural, id=plural, labels=labels, registry=found)(_taking(take, controller))
    return found


def _taking(take: Callable[[dict[str, Any], bool], None], controller: Controller) -> Callable[..., Any]:
    async def handler(event: dict[str, Any], **_: Any) -> None:
        controller.watch_events += 1
        take(event["object"], event["type"] == "DELETED")

    return handler


class Feed:
    """Takes watch events: keeps what they show, and pokes whom it concerns."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._stores = controller.stores

    def job(self, body: dict[str, Any], deleted: bool) -> None:
        """An InstructionTuningJob."""
        view = Job.of(body)
        if self._controller.take_job(view, deleted=deleted):
            self._poke(view.id)

    def dataset(self, body: dict[str, Any], deleted: bool) -> None:
        """An InstructionDataset."""
        view = Prepared.of(body)
        if self._controller.take_dataset(view, deleted=deleted):
            self._poke(view.id)

    def batch(self, body: dict[str, Any], deleted: bool) -> None:
        """A batch Job of ours, or one that only carries our labels; that one has another owner and concerns nobody."""
        batch = Batch.of(body)
        changed = self._stores.put_batch(batch)
        if deleted:
            changed = self._stores.drop_batch(batch.id) is not None
        if changed:
            self._poke(self._stores.owner_of_batch(batch))

    def pod(self, body: dict[str, Any], deleted: bool) -> None:
        """A pod of a batch Job or an engine. A deleted one is kept in mind with its last words."""
        pod = Pod.of(body)
        changed = self._stores.put_pod(pod)
        if deleted:
            changed = self._stores.drop_pod(pod.id) is not None
        if changed and pod.engine:
            self._controller.serving.poke((pod.id.namespace, pod.engine))
        elif changed:
            self._poke(self._stores.owner_of_pod(pod))

    def model(self, body: dict[str, Any], deleted: bool) -> None:
        """A TunedModel: concerns its engine, the engine that it had, and the job that made it."""
        view = Served.of(body)
        if not self._controller.take_model(view, deleted=deleted):
            return
        wanted = Wanted.of(view)
        if wanted and wanted.spec.source.job:
            self._controller.jobs.poke((view.id.namespace, wanted.spec.source.job))

    def deployment(self, body: dict[str, Any], deleted: bool) -> None:
        """An engine's Deployment."""
        view = Deployed.of(body)
        shelf = self._stores.deployments
        if shelf.drop(view.id) if deleted else shelf.put(view):
            self._controller.serving.poke((view.id.namespace, view.id.name))

    def _poke(self, owner: Identity | None) -> None:
        if owner:
            self._controller.poke(owner)
