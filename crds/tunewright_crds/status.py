"""What happened to a job, as its status tells."""

from datetime import datetime
from typing import Final, Literal

from pydantic import Field

from tunewright_crds.dataset import DatasetStatus
from tunewright_crds.evaluation import EvaluationStatus
from tunewright_crds.fields import MAX_MESSAGE, Part
from tunewright_crds.names import Phase

MAX_ATTEMPTS_TOLD: Final = 10
MAX_METRICS: Final = 32  # of a progress
MAX_HUB_ERROR: Final = 512
MAX_REQUEST: Final = 64  # characters of a request for a checkpoint


class ConditionStatus(Part):
    """One condition, as Kubernetes writes them."""

    type: str = Field(max_length=64, description="Type of the condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(max_length=64, description="One word why.")
    message: str = Field("", max_length=MAX_MESSAGE, description="A sentence for people.")
    observed_generation: int = Field(0, alias="observedGeneration", ge=0, description="metadata.generation that was seen.")
    last_transition_time: datetime = Field(alias="lastTransitionTime", description="When the status last changed.")


class Metric(Part):
    """One number of training."""

    name: str = Field(max_length=64, description="Trainer's name of it: loss, eval_loss, grad_norm, learning_rate, …")
    value: float = Field(description="Its last value.")


class Progress(Part):
    """How far training is; written by the front end from what the pod reports."""

    step: int = Field(0, ge=0, description="Optimizer steps done.")
    max_steps: int = Field(0, alias="maxSteps", ge=0, description="Optimizer steps in all.")
    epoch: float = Field(0.0, ge=0, description="Passes over the data done.")
    percent: int = Field(0, ge=0, le=100, description="Of the steps.")
    estimated_remaining_seconds: int | None = Field(None, alias="estimatedRemainingSeconds", ge=0, description="At the pace of late.")
    remaining: str = Field("", max_length=16, description="The same for people: 1h5m.")
    tokens: int = Field(0, ge=0, description="Tokens seen so far.")
    tokens_per_second: float = Field(0.0, alias="tokensPerSecond", ge=0, description="Pace of late.")
    loss: str = Field("", max_length=16, description="Last training loss, for people.")
    attempt: int = Field(0, ge=0, description="Attempt that reported.")
    resumed_from_step: int = Field(0, alias="resumedFromStep", ge=0, description="Step at which that attempt began.")
    metrics: list[Metric] = Field(default_factory=list, max_length=MAX_METRICS, description="Last values.")
    evaluated: int = Field(0, ge=0, description="While evaluating: prompts that base and tuned model have answered, and answers judged.")
    to_evaluate: int = Field(0, alias="toEvaluate", ge=0, description="How many there are in all.")
    last_updated: datetime = Field(alias="lastUpdated", description="When the pod reported.")


class CheckpointStatus(Part):
    """One checkpoint."""

    step: int = Field(ge=0, description="Optimizer step.")
    uri: str = Field("", max_length=2048, description="Its folder.")


class LastCheckpoint(CheckpointStatus):
    """What the next attempt goes on from."""

    request: str = Field(
        "",
        max_length=MAX_REQUEST,
        description="The last value of the annotation tunewright.dev/checkpoint that it, or one before, answers.",
    )


class BestCheckpoint(CheckpointStatus):
    """The best validation so far."""

    metric: str = Field("eval_loss", max_length=64, description="What was compared.")
    value: float = Field(description="Its value.")


class AttemptStatus(Part):
    """One training attempt."""

    number: int = Field(ge=1, description="Counts from 1.")
    start_time: datetime | None = Field(None, alias="startTime", description="When its Job was made.")
    end_time: datetime | None = Field(None, alias="endTime", description="When it ended.")
    reason: str = Field("", max_length=64, description="Why it ended; Running while it does not.")
    exit_code: int | None = Field(None, alias="exitCode", description="Of the trainer container.")
    node: str = Field("", max_length=253, description="Where it ran.")
    resumed_from_step: int | None = Field(None, alias="resumedFromStep", ge=0, description="Step of the checkpoint that it went on from.")
    reached_step: int | None = Field(None, alias="reachedStep", ge=0, description="Last step that it is known to have done.")
    lost_steps: int | None = Field(None, alias="lostSteps", ge=0, description="Steps done by it that the next attempt did again.")
    micro_batch_halvings: int = Field(0, alias="microBatchHalvings", ge=0, description="How often the micro-batch was halved for it.")
    rollbacks: int = Field(0, ge=0, description="How often training had gone back by its end, since the loss went astray.")


class PreparationRestarts(Part):
    """Pods made anew, by cause."""

    infrastructure: int = Field(0, ge=0, description="Storage away, killed, internal error.")
    free: int = Field(0, ge=0, description="Preempted, drained, node lost.")


class Restarts(PreparationRestarts):
    """Attempts tried again, by cause."""

    out_of_memory: int = Field(0, alias="outOfMemory", ge=0, description="Out of memory.")


class Requeue(Part):
    """A wait between attempts that survives a restart of the operator."""

    not_before: datetime | None = Field(None, alias="notBefore", description="When the next attempt may start.")


class PublishedForm(Part):
    """One form of a published model."""

    kind: str = Field(max_length=16, description="adapter, merged, full or reward.")
    uri: str = Field(max_length=2048, description="Folder of the artefact.")
    digest: str = Field(max_length=128, description="Hash of the artefact's manifest.")
    servability: str = Field("", max_length=16, description="Who can serve it: see TunedModel's forms.")


class HubCopy(Part):
    """The copy of a published model on the Hugging Face hub."""

    uri: str = Field("", max_length=512, description="hf://org/name@commit; empty where there is none.")
    error: str = Field("", max_length=MAX_HUB_ERROR, description="Why there is none.")


class ModelStatus(Part):
    """What was published."""

    name: str = Field("", max_length=253, description="Name of the TunedModel.")
    version: str = Field("", max_length=63, description="Its version.")
    uri: str = Field("", max_length=2048, description="Folder of the artefact.")
    kind: str = Field("", max_length=16, description="adapter, merged, full or reward.")
    digest: str = Field("", max_length=128, description="Hash of the artefact's manifest.")
    base: str = Field("", max_length=2048, description="The model that was tuned; of the hub's at the commit that was read.")
    forms: list[PublishedForm] = Field(default_factory=list, max_length=8, description="Every form that was published.")
    hub: HubCopy | None = Field(None, description="Its copy on the Hugging Face hub, where output.hub asks for one.")
    step: int = Field(0, ge=0, description="Optimizer step that training ended with.")


class MemoryPart(Part):
    """Memory for one purpose."""

    name: str = Field(max_length=32, description="weights, adapter, gradients, optimizer, activations, logits, checkpoint, libraries, …")
    bytes: int = Field(ge=0, description="How much.")


class MemoryStatus(Part):
    """What training will take, counted before it starts."""

    fits: Literal["yes", "tight", "no", "unknown"] = Field(
        description="Whether it fits: tight is near the limit, unknown where the limit, or the model's family, is not known."
    )
    bytes: int = Field(0, ge=0, description="At the moment that takes most.")
    limit: int = Field(0, ge=0, description="What there is: the pod's memory, or the GPU's; 0 where nobody knows.")
    moment: str = Field("", max_length=32, description="That moment: training or publishing.")
    micro_batch_tokens: int = Field(
        0, alias="microBatchTokens", ge=0, description="Tokens of the largest micro-batch that it was counted for."
    )
    micro_batch_halvings: int = Field(
        0, alias="microBatchHalvings", ge=0, description="How often the automatic micro-batch is halved from the start, in order to fit."
    )
    parts: list[MemoryPart] = Field(default_factory=list, max_length=16, description="By purpose, at that moment.")
    advice: str = Field("", max_length=MAX_MESSAGE, description="Single changes with which it would fit, or why nothing is known.")


class ErrorStatus(Part):
    """Why the job failed, with what to do."""

    code: str = Field(max_length=64, description="One of the failure codes.")
    message: str = Field(max_length=MAX_MESSAGE, description="What went wrong, and where.")
    param: str = Field("", max_length=1024, description="The field, file or object to blame.")
    advice: str = Field("", max_length=MAX_MESSAGE, description="What to do.")


class TakenModel(Part):
    """A tuned model that the spec names, as it was when it was taken."""

    field: str = Field(max_length=256, description="Field that names it.")
    name: str = Field(max_length=253, description="Name of the TunedModel.")
    version: str = Field(max_length=63, description="Its version then.")
    uri: str = Field(max_length=2048, description="Folder of its artefact.")
    digest: str = Field("", max_length=128, description="Hash of the artefact's manifest.")


class PreparationStatus(Part):
    """What a job and an InstructionDataset both tell of: their data, and what stands in its way."""

    observed_generation: int = Field(0, alias="observedGeneration", ge=0, description="metadata.generation that this status answers.")
    conditions: list[ConditionStatus] = Field(
        default_factory=list,
        max_length=16,
        description="The state in detail.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    start_time: datetime | None = Field(None, alias="startTime", description="When the operator took it up.")
    completion_time: datetime | None = Field(None, alias="completionTime", description="When it ended.")
    taken_models: list[TakenModel] = Field(
        default_factory=list,
        alias="takenModels",
        max_length=4,
        description="The tuned models that the spec names, as they were taken: preparing, training and every retry use these.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["field"]},
    )
    dataset: DatasetStatus | None = Field(None, description="What was prepared.")
    restarts: PreparationRestarts = Field(default_factory=PreparationRestarts, description="Pods made anew, by cause.")
    requeue: Requeue | None = Field(None, description="Waiting until the next attempt.")
    error: ErrorStatus | None = Field(None, description="Why it failed.")


class JobStatus(PreparationStatus):
    """What happened."""

    phase: Phase = Field(Phase.PENDING, description="The state in one word.")
    suspended_since: datetime | None = Field(None, alias="suspendedSince", description="Since when it is suspended.")
    suspended_seconds: int = Field(
        0, alias="suspendedSeconds", ge=0, description="Time spent suspended before; the deadline does not count it."
    )
    progress: Progress | None = Field(None, description="How far training is.")
    last_checkpoint: LastCheckpoint | None = Field(None, alias="lastCheckpoint", description="What the next attempt goes on from.")
    answered_request: str = Field(
        "",
        alias="answeredRequest",
        max_length=MAX_REQUEST,
        description="The last request for a checkpoint whose answer an event has told.",
    )
    best_checkpoint: BestCheckpoint | None = Field(None, alias="bestCheckpoint", description="The best validation so far.")
    attempts: list[AttemptStatus] = Field(
        default_factory=list, max_length=MAX_ATTEMPTS_TOLD, description="The last attempts, oldest first."
    )
    gpu_seconds: int = Field(
        0,
        alias="gpuSeconds",
        ge=0,
        description="GPUs of all pods times the seconds of their attempts, from when the pods were made; of attempts that have ended.",
    )
    restarts: Restarts = Field(default_factory=Restarts, description="Attempts tried again, by cause.")
    memory: MemoryStatus | None = Field(None, description="What training will take, counted before it starts.")
    model: ModelStatus | None = Field(None, description="What was trained and lies in storage; the TunedModel is made once it is measured.")
    evaluation: EvaluationStatus | None = Field(None, description="What was measured of the model.")
