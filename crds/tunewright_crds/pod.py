"""What passes between the operator and the pods: the config down, the termination message and progress up."""

import re
from typing import Final

from pydantic import Field

from tunewright_crds.dataset import DatasetStatus
from tunewright_crds.errors import FailureCode
from tunewright_crds.evaluation import EvaluationStatus
from tunewright_crds.fields import MAX_MESSAGE, Part
from tunewright_crds.job import JobSpec
from tunewright_crds.status import BestCheckpoint, HubCopy, LastCheckpoint, MemoryStatus, Progress, PublishedForm

MAX_TERMINATION_BYTES: Final = 4096  # the kubelet keeps no more
MAX_PROGRESS_BYTES: Final = 65_536
_SHORTEST: Final = MAX_MESSAGE // 2  # a message that says what is wrong
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class JobIdentity(Part):
    """Which job a pod works for."""

    namespace: str
    name: str
    uid: str


class StorageSettings(Part):
    """The install's object storage; the keys are mounted as files or come from the environment, never from here."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""  # empty: the client's default, AWS
    region: str = "us-east-1"


class PodConfig(Part):
    """The whole input of ``prepare`` and ``train``: the job's spec with the install's settings."""

    job: JobIdentity
    spec: JobSpec
    storage: StorageSettings
    version: str = Field(description="Version under which the model is published.")
    progress_url: str = ""  # empty: nobody asks
    gpu_memory: int = Field(0, ge=0, description="Bytes of the largest GPU that training may get; 0: there is none, or nobody knows.")

    @property
    def model_name(self) -> str:
        """Name of the TunedModel."""
        return self.spec.output.model_name or self.job.name


class Failed(Part):
    """Why a verb ended without success."""

    code: FailureCode
    message: str
    param: str = ""


class Published(Part):
    """What ``train`` published: the form that is served, and all that there are."""

    kind: str
    uri: str
    digest: str
    base: str = Field("", description="The model that was tuned; of the hub's at the commit that was read.")
    forms: list[PublishedForm] = Field(default_factory=list, description="Every form that was published, the served one first.")
    hub: HubCopy | None = None


class Outcome(Part):
    """The termination message. ``bounded`` keeps it within what the kubelet stores."""

    error: Failed | None = None
    dataset: DatasetStatus | None = None
    memory: MemoryStatus | None = None
    attempt: int = 0
    resumed_from_step: int | None = None
    reached_step: int | None = None
    rollbacks: int = 0
    last_checkpoint: LastCheckpoint | None = None
    best_checkpoint: BestCheckpoint | None = None
    artifact: Published | None = None
    evaluation: EvaluationStatus | None = None

    def bounded(self) -> str:
        """JSON of at most ``MAX_TERMINATION_BYTES`` bytes, without control characters; long messages are cut, then the last metrics and the memory plan left out."""
        room = MAX_MESSAGE
        while True:
            copy = self.model_copy(deep=True)
            if copy.error:
                copy.error.message = clean(copy.error.message, limit=room)
                copy.error.param = clean(copy.error.param, limit=min(room, 512))
            if copy.memory:
                copy.memory.advice = clean(copy.memory.advice, limit=room)
                copy.memory = copy.memory if room > 64 else None
            text = copy.model_dump_json(exclude_none=True, by_alias=False)
            if len(text.encode()) <= MAX_TERMINATION_BYTES:
                return text
            if room <= _SHORTEST and self.evaluation and self.evaluation.metrics:
                kept = self.evaluation.model_copy(update={"metrics": self.evaluation.metrics[:-1]})
                return self.model_copy(update={"evaluation": kept}).bounded()
            room //= 2


class ProgressReport(Part):
    """One report of a training pod to the front end."""

    job: JobIdentity
    progress: Progress
    last_checkpoint: LastCheckpoint | None = None


class ProgressAnswer(Part):
    """The front end's answer to a report. ``checkpoint`` is the last value of the job's annotation that asks for one, or nothing."""

    written: bool
    checkpoint: str = ""


def clean(text: str, *, limit: int = MAX_MESSAGE) -> str:
    """``text`` as it may stand in a status: without control characters and lone surrogates, cut to ``limit`` characters."""
    plain = _CONTROL.sub(" ", text).strip()
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"
