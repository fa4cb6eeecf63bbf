"""What the operator has seen, as small typed views of Kubernetes objects.

A view keeps what decisions need and drops the rest, so that ten thousand jobs fit into little memory. Children belong to an owner by the UID
in their ownerReferences; labels are for finding only, anybody can write them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, Final, Self, TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from tunewright_crds import names
from tunewright_crds.instruction_dataset import InstructionDatasetStatus
from tunewright_crds.status import JobStatus, PreparationStatus
from tunewright_operator.nodes import Node

Manifest = Mapping[str, Any]


def moment(text: str | None) -> datetime | None:
    """A Kubernetes time stamp; None where there is none or it is not one."""
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None


def owner_uid(body: Manifest) -> str:
    """UID of the controlling owner, or nothing."""
    references = body["metadata"].get("ownerReferences") or ()
    return next((reference["uid"] for reference in references if reference.get("controller")), "")


@dataclass(frozen=True, slots=True)
class Identity:
    """Which object a view is of, and how new the view is."""

    namespace: str
    name: str
    uid: str
    resource_version: int
    generation: int
    created: datetime
    deleting: bool
    kind: str = ""  # of our own resources
    held: bool = False  # by our finalizer

    @classmethod
    def of(cls, body: Manifest, *, kind: str = "") -> "Identity":
        """The identity in an object's metadata."""
        meta = body["metadata"]
        version = str(meta.get("resourceVersion", "0"))
        return cls(
            namespace=meta.get("namespace", ""),
            name=meta["name"],
            uid=meta.get("uid", ""),
            resource_version=int(version) if version.isdigit() else 0,
            generation=meta.get("generation", 0),
            created=moment(meta.get("creationTimestamp")) or datetime.fromtimestamp(0, UTC),
            deleting=bool(meta.get("deletionTimestamp")),
            kind=kind,
            held=names.FINALIZER in (meta.get("finalizers") or ()),
        )


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource of ours. Spec and status stay packed as JSON until they are needed."""

    KIND: ClassVar[str]

    id: Identity
    packed_spec: bytes
    packed_status: bytes

    @classmethod
    def of(cls, body: Manifest) -> Self:
        """The view of a manifest."""
        identity = Identity.of(body, kind=cls.KIND)
        return cls(identity, orjson.dumps(body.get("spec") or {}), orjson.dumps(body.get("status") or {}))

    @property
    def spec(self) -> dict[str, Any]:
        """As it was applied; may be anything that the CRD let pass."""
        spec: dict[str, Any] = orjson.loads(self.packed_spec)
        return spec

    @property
    def raw_status(self) -> dict[str, Any]:
        """As it is stored; empty where nobody has written one yet."""
        status: dict[str, Any] = orjson.loads(self.packed_status)
        return status


class Job(Resource):
    """An InstructionTuningJob."""

    KIND = "InstructionTuningJob"
    __slots__ = ()


class Prepared(Resource):
    """An InstructionDataset."""

    KIND = "InstructionDataset"
    __slots__ = ()

    @property
    def digest(self) -> str:
        """Of what it prepared; empty as long as that is not done."""
        return str((self.raw_status.get("dataset") or {}).get("digest", ""))


S = TypeVar("S", bound=PreparationStatus)
_FIELDS: Final[dict[type[PreparationStatus], dict[str, TypeAdapter[Any]]]] = {
    model: {(field.alias or name): TypeAdapter[Any](field.annotation or Any) for name, field in model.model_fields.items()}
    for model in (JobStatus, InstructionDatasetStatus)
}


def read_status(raw: Manifest) -> JobStatus:
    """The typed status of a job. A part that somebody spoilt is left out, so that one bad field never stops a job."""
    return _read(JobStatus, raw)


def read_dataset_status(raw: Manifest) -> InstructionDatasetStatus:
    """The typed status of an InstructionDataset, likewise."""
    return _read(InstructionDatasetStatus, raw)


def _read(model: type[S], raw: Manifest) -> S:
    try:
        return model.model_validate(raw)
    except ValidationError:
        return model.model_validate({name: value for name, value in raw.items() if _is_sound(model, name, value)})


def _is_sound(model: type[PreparationStatus], name: str, value: Any) -> bool:
    try:
        _FIELDS[model][name].validate_python(value)
    except (KeyError, ValidationError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch Job: the shards of a preparation, one preparation, or one training attempt."""

    id: Identity
    owner: str
    role: str
    attempt: int
    complete: bool
    failed: bool
    gone: bool = False  # a memory of a Job that was deleted

    @classmethod
    def of(cls, body: Manifest) -> "Batch":
        """The view of a manifest."""
        labels = body["metadata"].get("labels") or {}
        number = str(labels.get(names.LABEL_ATTEMPT, ""))
        held = {entry["type"] for entry in (body.get("status") or {}).get("conditions") or () if entry.get("status") == "True"}
        return cls(
            id=Identity.of(body),
            owner=owner_uid(body),
            role=labels.get(names.LABEL_ROLE, ""),
            attempt=int(number) if number.isdecimal() and len(number) < 10 else 0,
            complete="Complete" in held,
            failed="Failed" in held,
        )

    @property
    def finished(self) -> bool:
        """Whether the Job will never start a pod again."""
        return self.complete or self.failed or self.gone

    def remembered(self) -> "Batch":
        """The same Job after its deletion."""
        return replace(self, gone=True)


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a batch Job or an engine."""

    id: Identity
    owner: str
    engine: str
    phase: str
    ready: bool
    ip: str
    node: str
    reason: str  # of the pod itself: Evicted, NodeLost, UnexpectedAdmissionError, …
    message: str
    disruption: str  # reason of the condition DisruptionTarget
    unschedulable: str  # message of the scheduler
    claims: tuple[str, ...]  # PersistentVolumeClaims that it mounts
    waiting: str  # reason of the container
    waiting_message: str
    exit_code: int | None
    ended_by: str  # reason of the container's end: Completed, Error, OOMKilled, …
    last_words: str  # the termination message
    ended: datetime | None
    index: int = 0  # in an Indexed Job
    gone: bool = False  # a memory of a pod that was deleted

    @classmethod
    def of(cls, body: Manifest) -> "Pod":
        """The view of a manifest; of its containers the first one counts."""
        status = body.get("status") or {}
        conditions = {entry["type"]: entry for entry in status.get("conditions") or () if "type" in entry}
        volumes: Sequence[Manifest] = (body.get("spec") or {}).get("volumes") or ()
        disrupted = conditions.get("DisruptionTarget", {})
        scheduled = conditions.get("PodScheduled", {})
        containers: Sequence[Manifest] = status.get("containerStatuses") or ({},)
        state = containers[0].get("state") or {}
        waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
        number = str((body["metadata"].get("annotations") or {}).get(names.COMPLETION_INDEX, ""))
        return cls(
            id=Identity.of(body),
            owner=owner_uid(body),
            engine=(body["metadata"].get("labels") or {}).get(names.LABEL_ENGINE, ""),
            phase=status.get("phase", "Pending"),
            ready=conditions.get("Ready", {}).get("status") == "True",
            ip=status.get("podIP", ""),
            node=(body.get("spec") or {}).get("nodeName", ""),
            reason=status.get("reason", ""),
            message=status.get("message", ""),
            disruption=disrupted.get("reason", "") if disrupted.get("status") == "True" else "",
            unschedulable=scheduled.get("message", "") if scheduled.get("reason") == "Unschedulable" else "",
            claims=tuple(volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume),
            waiting=waiting.get("reason", ""),
            waiting_message=waiting.get("message", ""),
            exit_code=ended.get("exitCode"),
            ended_by=ended.get("reason", ""),
            last_words=ended.get("message", ""),
            ended=moment(ended.get("finishedAt")),
            index=int(number) if number.isdecimal() and len(number) < 10 else 0,
        )

    @property
    def finished(self) -> bool:
        """Whether its container will not run again."""
        return self.gone or self.exit_code is not None or self.phase in ("Succeeded", "Failed")

    def remembered(self) -> "Pod":
        """The same pod after its deletion."""
        return replace(self, gone=True)


class Served(Resource):
    """A TunedModel."""

    KIND = "TunedModel"
    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Deployed:
    """An engine's Deployment."""

    id: Identity
    digest: str  # of the manifest that we applied last
    available: int

    @classmethod
    def of(cls, body: Manifest) -> "Deployed":
        """The view of a manifest."""
        annotations = body["metadata"].get("annotations") or {}
        return cls(Identity.of(body), annotations.get(DIGEST_ANNOTATION, ""), (body.get("status") or {}).get("availableReplicas", 0))


DIGEST_ANNOTATION = f"{names.GROUP}/applied"


@dataclass(frozen=True, slots=True)
class Awaited:
    """A tuned model that a resource names and has not taken yet. ``makers``: jobs, ended ones too, that publish under its name."""

    model: Served | None = None
    makers: tuple[Job, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """A resource with its children, at one moment.

    Children that were deleted stay as memories (``gone``) until what they said is in the status: a stopped pod names its last checkpoint
    in the moment before it vanishes.
    """

    owner: Resource
    now: datetime
    batches: tuple[Batch, ...] = ()
    pods: tuple[Pod, ...] = ()
    confirmed: bool = False  # read live just now: what is absent here is absent
    obstacles: Mapping[str, str] = field(default_factory=dict)  # children that could not be made: name, why
    awaited: Mapping[str, Awaited] = field(default_factory=dict)  # tuned models that it has yet to take, by name
    nodes: tuple[Node, ...] = ()  # that have devices; looked at when a job on GPUs is about to begin

    def pods_of(self, batch: Batch) -> list[Pod]:
        """The pods of a batch Job, oldest first."""
        return sorted((pod for pod in self.pods if pod.owner == batch.id.uid), key=lambda pod: pod.id.created)

    def gang_of(self, batch: Batch) -> list[Pod]:
        """The last pod of each index of a batch Job, in their order; one pod where the Job is not Indexed."""
        return [pod for _, pod in sorted({pod.index: pod for pod in self.pods_of(batch)}.items())]

    def pod_of(self, batch: Batch) -> Pod | None:
        """The last pod of a batch Job."""
        return next(reversed(self.pods_of(batch)), None)

    @property
    def shards(self) -> Batch | None:
        """The Indexed Job that reads the data in parts, before it is prepared."""
        return next((batch for batch in self.batches if batch.role == names.Role.SHARD), None)

    @property
    def preparation(self) -> Batch | None:
        """The Job that prepares the data."""
        return next((batch for batch in self.batches if batch.role == names.Role.PREPARE), None)


@dataclass(frozen=True, slots=True)
class Observed(Family):
    """One job with what belongs to it."""

    model: Served | None = None
    named: Prepared | None = None  # the InstructionDataset that it names

    @property
    def job(self) -> Resource:
        """The job itself."""
        return self.owner

    @property
    def evaluation(self) -> Batch | None:
        """The Job that measures the tuned model."""
        return next((batch for batch in self.batches if batch.role == names.Role.EVALUATE), None)

    @property
    def attempts(self) -> tuple[Batch, ...]:
        """The training Jobs, oldest first."""
        found = (batch for batch in self.batches if batch.role == names.Role.TRAIN and batch.attempt > 0)
        return tuple(sorted(found, key=lambda batch: batch.attempt))


@dataclass(frozen=True, slots=True)
class ObservedDataset(Family):
    """One InstructionDataset with what belongs to it."""

    users: int = 0  # unfinished jobs that name it
    trainees: int = 0  # unfinished jobs, of any data set, that train on the same prepared data
    twins: int = 0  # other InstructionDatasets with the same prepared data; counted once this one is deleted
    discard: Batch | None = None  # the Job that removes its data
