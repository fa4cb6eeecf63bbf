"""Every name that more than one component must spell the same way.

Labels, annotations, conditions, reasons, field managers, file paths inside pods and the names of children live here and nowhere else.
"""

import hashlib
from enum import StrEnum
from typing import Final

GROUP: Final = "tunewright.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
JOBS: Final = "instructiontuningjobs"
MODELS: Final = "tunedmodels"
DATASETS: Final = "instructiondatasets"

# Who writes which part of an object (server-side apply): the operator owns what it makes and the status, the front end only the progress.
OPERATOR_MANAGER: Final = "tunewright-operator"
PROGRESS_MANAGER: Final = "tunewright-api"

# Labels on children. The UID label, not the name, says whose child it is: a job may be deleted and made anew under the same name.
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "tunewright"
LABEL_JOB: Final = f"{GROUP}/job"
LABEL_JOB_UID: Final = f"{GROUP}/job-uid"
LABEL_DATASET: Final = f"{GROUP}/dataset"
LABEL_DATASET_UID: Final = f"{GROUP}/dataset-uid"
LABEL_ROLE: Final = f"{GROUP}/role"
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
# On an InstructionDataset whose prepared data goes with it: kept until that is done.
FINALIZER: Final = f"{GROUP}/prepared-data"
LABEL_ENGINE: Final = f"{GROUP}/engine"

# What the pods' projected token is good for: reporting progress, and nothing else.
PROGRESS_AUDIENCE: Final = "tunewright-progress"

# Where a pod finds what it is given.
CONFIG_FILE: Final = "/etc/tunewright/job.json"
CONFIG_KEY: Final = "job.json"
# On a job whose owner wants a checkpoint now: each new value asks for one.
CHECKPOINT_ANNOTATION: Final = f"{GROUP}/checkpoint"
CONFIG_ANNOTATION: Final = f"{GROUP}/config"  # of a pod that outlives its owner's ConfigMap
STORAGE_CREDENTIALS: Final = "/var/run/tunewright/storage"
MODEL_CREDENTIALS: Final = "/var/run/tunewright/model-credentials"
DATASET_CREDENTIALS: Final = "/var/run/tunewright/dataset-credentials"
JUDGE_CREDENTIALS: Final = "/var/run/tunewright/judge-credentials"
MLFLOW_CREDENTIALS: Final = "/var/run/tunewright/mlflow-credentials"
WANDB_CREDENTIALS: Final = "/var/run/tunewright/wandb-credentials"
HUB_CREDENTIALS: Final = "/var/run/tunewright/hub-credentials"
PROGRESS_TOKEN: Final = "/var/run/tunewright/progress/token"
SCRATCH: Final = "/scratch"
VOLUMES: Final = "/volumes"
TERMINATION_MESSAGE: Final = "/dev/termination-log"

ENGINE_PORT: Final = 8000

# How the processes of one training attempt find one another: torch's own names, as its static rendezvous and its launchers use them.
MASTER_ADDR: Final = "MASTER_ADDR"
MASTER_PORT: Final = "MASTER_PORT"
NODES: Final = "NNODES"
NODE_RANK: Final = "NODE_RANK"
PROCESSES_PER_NODE: Final = "NPROC_PER_NODE"
RENDEZVOUS_PORT: Final = 29500
COMPLETION_INDEX: Final = "batch.kubernetes.io/job-completion-index"  # annotation of a pod of an Indexed Job

MAX_LABEL: Final = 63  # bytes of a label's value, and of a DNS label (RFC 1035)


class Role(StrEnum):
    """What a child of a job or model does."""

    SHARD = "shard"
    PREPARE = "prepare"
    TRAIN = "train"
    EVALUATE = "evaluate"
    SERVE = "serve"
    DISCARD = "discard"


class Phase(StrEnum):
    """The one word that ``kubectl get itj`` shows; conditions tell the details."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"

    @property
    def terminal(self) -> bool:
        """Whether a job in this phase is never touched again."""
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


class DatasetPhase(StrEnum):
    """The one word that ``kubectl get ids`` shows."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    READY = "Ready"
    FAILED = "Failed"


class Condition(StrEnum):
    """Types of conditions on our resources."""

    MODEL_READY = "ModelReady"
    DATA_READY = "DataReady"
    TRAINING = "Training"
    EVALUATED = "Evaluated"
    ARTIFACT_PUBLISHED = "ArtifactPublished"
    DEPLOYED = "Deployed"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"
    LOADED = "Loaded"
    READY = "Ready"


class Reason(StrEnum):
    """Reasons of conditions, attempts and Events that are not failures (those are ``errors.FailureCode``)."""

    VALIDATING_DATA = "ValidatingData"
    DATA_PREPARED = "DataPrepared"
    DELETING = "Deleting"
    DATA_DISCARDED = "DataDiscarded"
    DATA_STAYS = "DataStays"
    MEMORY_TIGHT = "MemoryTight"
    NOT_ON_THE_HUB = "NotOnTheHub"
    WAITING_FOR_DATASET = "WaitingForDataset"
    WAITING_FOR_MODEL = "WaitingForModel"
    MODEL_TAKEN = "ModelTaken"
    ATTEMPT_STARTED = "AttemptStarted"
    ATTEMPT_ENDED = "AttemptEnded"
    EVALUATING = "Evaluating"
    EVALUATED = "Evaluated"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    CHECKPOINT_SAVED = "CheckpointSaved"
    PUBLISHED = "Published"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    CANCELLED = "Cancelled"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL = "ImagePull"
    BACK_OFF = "BackOff"
    STARTING = "Starting"
    STOPPED = "Stopped"
    NODE_LOST = "NodeLost"
    PREEMPTED = "Preempted"
    KILLED = "Killed"
    LOADED = "Loaded"
    READY = "Ready"
    NOT_READY = "NotReady"
    NOT_WANTED = "NotWanted"


def child_name(owner: str, suffix: str, *, limit: int = MAX_LABEL) -> str:
    """The name of a child: ``<owner>-<suffix>``, or with a hash in the middle where that is longer than ``limit`` or the owner's name has dots.

    A pod of an Indexed Job has its Job's name as its hostname, which holds no dots.
    Deterministic, so that a creation that happened before a crash answers 409 afterwards instead of making a twin.
    """
    plain = f"{owner}-{suffix}"
    if len(plain) <= limit and "." not in owner:
        return plain
    digest = hashlib.sha256(owner.encode()).hexdigest()[:8]
    keep = limit - len(suffix) - len(digest) - 2
    return f"{owner[:keep].replace('.', '-').rstrip('-')}-{digest}-{suffix}"


# A pod's name is its Job's plus "-<index>-<5 random>"; the Job's own name must leave room for that.
_POD_SUFFIX = 8


def prepare_name(job: str) -> str:
    """The batch Job that prepares the data of ``job``."""
    return child_name(job, "prepare", limit=MAX_LABEL - _POD_SUFFIX)


def dataset_prepare_name(dataset: str) -> str:
    """The batch Job that prepares an InstructionDataset. No child of a job ends like that, whatever the job is called."""
    return child_name(dataset, "prepare-dataset", limit=MAX_LABEL - _POD_SUFFIX)


def shards_name(job: str) -> str:
    """The Indexed batch Job whose pods read the data of ``job`` side by side."""
    return child_name(job, "shards", limit=MAX_LABEL - _POD_SUFFIX)


def dataset_shards_name(dataset: str) -> str:
    """The same for an InstructionDataset."""
    return child_name(dataset, "shards-dataset", limit=MAX_LABEL - _POD_SUFFIX)


def discard_name(dataset: str, uid: str) -> str:
    """The batch Job that removes the prepared data of an InstructionDataset. It belongs to nobody, so the UID is in its name."""
    return child_name(dataset, f"discard-{uid[:8]}", limit=MAX_LABEL - _POD_SUFFIX)


def attempt_name(job: str, number: int) -> str:
    """The batch Job of training attempt ``number`` (from 1) of ``job``."""
    return child_name(job, f"train-{number}", limit=MAX_LABEL - _POD_SUFFIX)


def peers_name(uid: str) -> str:
    """The Service under which the pods of a job find one another. Not made of the job's name: a Service's may not begin with a digit."""
    return f"peers-{hashlib.sha256(uid.encode()).hexdigest()[:12]}"


def evaluate_name(job: str) -> str:
    """The batch Job that measures what ``job`` has tuned."""
    return child_name(job, "evaluate", limit=MAX_LABEL - _POD_SUFFIX)


def volume_path(claim: str) -> str:
    """Where a pod finds the volume of a PersistentVolumeClaim."""
    return f"{VOLUMES}/{claim}"


def config_name(job: str, uid: str) -> str:
    """The immutable ConfigMap with the job's resolved config. The UID is in the name: a job made anew gets a config of its own."""
    return child_name(job, f"config-{uid[:8]}")


def engine_name(base_uri: str) -> str:
    """The Deployment and Service that serve one base model of a namespace, with every adapter over it."""
    return f"engine-{hashlib.sha256(base_uri.encode()).hexdigest()[:12]}"


# Served under the OpenAI front end: "<namespace>/<model>" is the tuned model, "<namespace>/<model>:base" the model that it was tuned from.
# A colon cannot occur in a Kubernetes name, so no model can be called like that.
BASE_SUFFIX: Final = ":base"
# The id under which an engine serves its base model itself. Adapters are served as "<tuned model>", which never holds a colon.
ENGINE_BASE_ID: Final = ":base"
