"""InstructionTuningJob: the one resource that a person writes.

A field that is here has an effect; what is not here is refused by name.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from tunewright_crds.dataset import MAX_TEMPLATE, DataFormat, Dataset, DatasetStatus, TrainOn
from tunewright_crds.fields import DNS_LABEL as DNS_LABEL_PATTERN
from tunewright_crds.fields import (
    MAX_MESSAGE,
    MODEL_PINNED,
    PIN_MODEL,
    AutoCount,
    AutoRate,
    ModelUri,
    Part,
    Quantity,
    Rules,
    SecretName,
    claim_of,
    untouched,
)
from tunewright_crds.names import Phase

MAX_CLAIMS: Final = 8  # volumes that a pod mounts
MAX_ATTEMPTS_TOLD: Final = 10


class Architecture(StrEnum):
    AUTO = "auto"
    CAUSAL = "causal"


class Objective(StrEnum):
    SFT = "sft"
    DPO = "dpo"


class Tuner(StrEnum):
    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"


class OutputForm(StrEnum):
    ADAPTER = "adapter"
    MERGED = "merged"


class Precision(StrEnum):
    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class Scheduler(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Model(
    Part,
    json_schema_extra=Rules(
        (f"!self.uri.startsWith('hf://') || (self.uri.matches('{MODEL_PINNED}') && !self.uri.startsWith('hf://datasets/'))", PIN_MODEL)
    ),
):
    """The base model."""

    uri: ModelUri = Field(
        description="Folder of the base model, with config.json, tokenizer files and *.safetensors: s3://bucket/path/, hf://org/name@revision, or pvc://claim/path."
    )
    architecture: Architecture = Field(Architecture.AUTO, description="Kind of model; `auto` reads it from config.json.")
    chat_template: str = Field(
        "",
        alias="chatTemplate",
        max_length=MAX_TEMPLATE,
        description="Jinja chat template. Default: the model's own, else a plain one of Tunewright.",
    )
    credentials_secret: SecretName = Field(
        "",
        alias="credentialsSecret",
        description="Secret of this namespace with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if need be, AWS_ENDPOINT_URL and AWS_REGION, "
        "to read the model with; for hf:// with HF_TOKEN and, for a mirror, HF_ENDPOINT. Default: the keys of the platform's own storage; for hf:// none.",
    )


class Lora(Part):
    """Options of the LoRA tuners (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the adapter matrices.")
    alpha: float = Field(
        32, gt=0, le=65_536, description="Scale: the adapter's output is multiplied by alpha / rank (alpha / sqrt(rank) with rslora)."
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    target_modules: str = Field(
        "all-linear",
        alias="targetModules",
        max_length=1024,
        pattern=r"^[A-Za-z0-9_.-]+(,[A-Za-z0-9_.-]+)*$",
        description="Which layers get an adapter: `all-linear` (all but the output head), or names joined by commas such as q_proj,v_proj.",
    )
    rslora: bool = Field(False, description="Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732).")


class Dpo(Part):
    """Options of objective dpo (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: float = Field(
        0.1,
        gt=0,
        le=100,
        description="How strongly the model is held to what it was: the lower, the further it may go for the sake of the preferences.",
    )
    label_smoothing: float = Field(
        0.0,
        alias="labelSmoothing",
        ge=0,
        le=0.5,  # the API server compares a whole number, such as 0, with the bound's whole part
        description="Share of the pairs that are expected to be the wrong way round (conservative DPO: Mitchell 2023).",
    )


_DPO_ALONE: Final = "dpo holds options of objective dpo: set objective: dpo, or leave them out"
_NEEDS_ADAPTER: Final = (
    "objective dpo needs tuner lora or qlora: what the model was before is itself without its adapter; full would need a second copy of it"
)


class Method(Part):
    """How the model is tuned.

    The tuner decides which weights change. lora, the default, trains a small adapter beside the frozen base; the base is shared by
    all adapters where they are served. qlora does the same over a base held in 4 bits, for models that would not fit otherwise; it
    needs a GPU. full trains every weight, needs about eight times the memory, and publishes a whole model.

    lora.rank sets the adapter's size and lora.alpha / lora.rank its scale: more rank for tasks far from what the base knows.
    lora.targetModules takes all linear layers but the output head; lora.dropout helps against small data being learned by heart.
    The objective is what is optimised. sft, supervised fine-tuning: the responses are learned, the prompts only read (see
    spec.dataset.trainOn). dpo, direct preference optimisation: from pairs of a chosen and a rejected answer to one prompt, to prefer the chosen
    one, without going further than need be from what the model was; usually done with a model that sft has tuned.
    """

    objective: Objective = Field(
        Objective.SFT,
        description="What is optimised: sft (supervised fine-tuning on the responses), or dpo (preferring the chosen answer of a pair to the rejected one; lora and qlora only).",
    )
    tuner: Tuner = Field(
        Tuner.LORA,
        description="Which weights change: full (all), lora (an adapter), qlora (an adapter over a base in 4 bits; needs a GPU).",
    )
    lora: Lora = Field(default_factory=Lora, description="Options of lora and qlora.")
    dpo: Dpo = Field(default_factory=Dpo, description="Options of objective dpo.")

    @model_validator(mode="after")
    def _fit_together(self) -> "Method":
        if self.objective is not Objective.DPO and self.dpo != Dpo():
            raise ValueError(_DPO_ALONE)
        if self.objective is Objective.DPO and self.tuner is Tuner.FULL:
            raise ValueError(_NEEDS_ADAPTER)
        return self


class EarlyStopping(Part):
    """Stop when validation no longer improves, and return the best weights seen."""

    enabled: bool = Field(False, description="Needs validation rows.")
    patience: int = Field(3, ge=1, le=1000, description="So many evaluations in a row without improvement.")
    min_delta: float = Field(0.0, alias="minDelta", ge=0, description="An evaluation loss lower by more than this counts as improvement.")


class Hyperparameters(Part):
    """Numbers of the optimisation."""

    epochs: float = Field(3.0, gt=0, le=10_000, description="Passes over the train rows. maxSteps wins where it is set.")
    max_steps: int | None = Field(None, alias="maxSteps", ge=1, le=100_000_000, description="Optimizer steps, instead of epochs.")
    learning_rate: AutoRate = Field(
        "auto",
        alias="learningRate",
        description="Peak learning rate: a number above 0 and at most 1, or auto (2e-4 for adapters, 2e-5 for full; with objective dpo 5e-6).",
    )
    batch_size: int = Field(
        16,
        alias="batchSize",
        ge=1,
        le=65_536,
        description="Sequences per optimizer step, whatever fits into memory at once (with packing: packed sequences; with objective dpo: pairs).",
    )
    micro_batch_size: AutoCount = Field(
        "auto",
        alias="microBatchSize",
        description="Sequences per forward pass; must divide batchSize. auto: as many as keep within about 4,096 tokens.",
    )
    scheduler: Scheduler = Field(Scheduler.COSINE, description="How the learning rate falls after the warm-up.")
    warmup_ratio: float = Field(
        0.03, alias="warmupRatio", ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0."
    )
    weight_decay: float = Field(0.0, alias="weightDecay", ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, alias="maxGradNorm", gt=0, le=1000, description="Gradients are clipped to this norm.")
    label_smoothing: float = Field(
        0.0, alias="labelSmoothing", ge=0, lt=1, description="Share of the target spread evenly over the vocabulary (objective sft)."
    )
    precision: Precision = Field(
        Precision.AUTO, description="Numbers of the forward pass: bf16, fp32, or auto (bf16 where the hardware is fast at it)."
    )
    gradient_checkpointing: bool = Field(
        False, alias="gradientCheckpointing", description="Recompute activations in the backward pass: less memory, about a third slower."
    )
    seed: int = Field(
        42, ge=0, le=2**31 - 1, description="Seed of split, order, initialisation and dropout: the same seed and data give the same model."
    )
    early_stopping: EarlyStopping = Field(
        default_factory=EarlyStopping, alias="earlyStopping", description="Stop when validation no longer improves."
    )
    evaluations_per_epoch: float = Field(
        1.0, alias="evaluationsPerEpoch", gt=0, le=1000, description="How often the validation loss is measured."
    )

    @model_validator(mode="after")
    def _micro_batch(self) -> "Hyperparameters":
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            raise ValueError(f"microBatchSize {self.micro_batch_size} does not divide batchSize {self.batch_size}")
        return self


class Toleration(Part):
    """A Kubernetes toleration."""

    key: str = Field("", max_length=317, description="Taint key; empty with operator Exists matches all.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How key and value are compared.")
    value: str = Field("", max_length=63, description="Taint value.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field("", description="Taint effect; empty matches all.")
    toleration_seconds: int | None = Field(
        None, alias="tolerationSeconds", ge=0, le=31_536_000, description="How long a NoExecute taint is tolerated."
    )


class PodResources(Part):
    """What a preparing pod asks for."""

    cpu: Quantity = Field("2", description="Processors asked for.")
    memory: Quantity = Field("8Gi", description="Memory: request and limit.")
    scratch: Quantity = Field("20Gi", description="Size limit of the pod's scratch volume: model, data and local checkpoints.")
    image: str = Field("", max_length=512, description="Trainer image instead of the install's own.")
    node_selector: dict[Annotated[str, Field(max_length=317)], Annotated[str, Field(max_length=63)]] = Field(
        default_factory=dict, alias="nodeSelector", max_length=16, description="Labels that a node must have."
    )
    tolerations: list[Toleration] = Field(default_factory=list, max_length=16, description="Taints that the pods tolerate.")
    service_account_name: str = Field(
        "",
        alias="serviceAccountName",
        max_length=253,
        description="ServiceAccount of the pods, for workload identity. Default: the namespace's default.",
    )


class Resources(PodResources):
    """What a training pod asks for. Data preparation asks for the same processors and memory, and never for a GPU."""

    gpus: int = Field(0, ge=0, le=1, description="GPUs of the training pod: 0 trains on processors.")
    gpu_resource: str = Field(
        "nvidia.com/gpu",
        alias="gpuResource",
        pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$",
        max_length=128,
        description="Name of the GPU resource.",
    )
    priority_class_name: str = Field("", alias="priorityClassName", max_length=253, description="PriorityClass of the training pod.")


class Checkpointing(Part):
    """What a killed job goes on from."""

    every_steps: AutoCount = Field(
        "auto", alias="everySteps", description="Steps between checkpoints; auto: about twenty in a job, and at most 500 steps apart."
    )
    keep: int = Field(2, ge=1, le=100, description="Complete checkpoints kept.")


class Output(Part):
    """What is published."""

    model_name: str = Field(
        "",
        alias="modelName",
        pattern=r"^$|" + DNS_LABEL_PATTERN,
        max_length=63,
        description="Name of the TunedModel; default: the job's name.",
    )
    formats: list[OutputForm] = Field(
        default_factory=lambda: [OutputForm.ADAPTER],
        min_length=1,
        max_length=2,
        description="adapter (PEFT layout) and merged (a whole model). Tuner full always publishes the whole model.",
    )


class ServingResources(Part):
    """What a serving pod asks for."""

    cpu: Quantity = Field("1", description="Processors asked for.")
    memory: Quantity = Field("4Gi", description="Memory: request and limit.")
    gpus: int = Field(0, ge=0, le=16, description="GPUs of a serving pod.")


class Deploy(Part):
    """Serve the tuned model once it is published."""

    enabled: bool = Field(False, description="Serve the model; models over the same base share their pods.")
    replicas: int = Field(1, ge=1, le=100, description="Serving pods.")
    resources: ServingResources = Field(default_factory=ServingResources, description="What a serving pod asks for.")


class PreparationRetries(Part):
    """How often preparing is tried again, by what ended it before. Preemption and lost nodes are free."""

    infrastructure: int = Field(5, ge=0, le=100, description="Storage away, container killed, internal error.")


class Retries(PreparationRetries):
    """How often a training attempt is tried again, by what ended the one before. Preemption and lost nodes are free."""

    out_of_memory: int = Field(
        2, alias="outOfMemory", ge=0, le=10, description="Each with the micro-batch halved, the effective batch unchanged."
    )


_FROZEN = "is fixed once the job has started; apply a new job for another one"
_STARTED = "!has(oldSelf.status) || !has(oldSelf.status.startTime)"


_REF_HAS_NO_PAIRS: Final = "an InstructionDataset holds no preferences yet: with objective dpo, name the sources in the job itself"
_PAIRS_ONLY: Final = "with objective dpo every source holds preferences: format auto, preference or oasst, and no template"
_CONVERSATIONS_ONLY: Final = "format preference is for objective dpo: set method.objective: dpo, or name the column of the answer to learn"
_ANSWERS_ONLY: Final = "with objective dpo only answers are compared: trainOn is response or last-response"
_OTHER_SMOOTHING: Final = "hyperparameters.labelSmoothing is for objective sft; dpo has method.dpo.labelSmoothing"
_PAIR_FORMATS: Final = (DataFormat.AUTO, DataFormat.PREFERENCE, DataFormat.OASST)


class JobSpec(
    Part,
    json_schema_extra=Rules(
        (f"self.method.objective == 'dpo' || ({' && '.join(untouched(Dpo, at='self.method.dpo'))})", _DPO_ALONE),
        ("self.method.objective != 'dpo' || self.method.tuner != 'full'", _NEEDS_ADAPTER),
        ("self.method.objective != 'dpo' || self.dataset.ref == ''", _REF_HAS_NO_PAIRS),
        (
            "self.method.objective != 'dpo' || self.dataset.sources.all(s, s.template == '' && (s.format == 'auto' || s.format == 'preference' || s.format == 'oasst'))",
            _PAIRS_ONLY,
        ),
        ("self.method.objective == 'dpo' || self.dataset.sources.all(s, s.format != 'preference')", _CONVERSATIONS_ONLY),
        ("self.method.objective != 'dpo' || self.dataset.trainOn != 'all'", _ANSWERS_ONLY),
        ("self.method.objective != 'dpo' || self.hyperparameters.labelSmoothing == 0.0", _OTHER_SMOOTHING),
    ),
):
    """What is wanted."""

    model: Model = Field(description="The base model.")
    dataset: Dataset = Field(description="The instruction data and how it is prepared.")
    method: Method = Field(default_factory=Method)
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="Numbers of the optimisation.")
    resources: Resources = Field(default_factory=Resources, description="What the pods ask for.")
    checkpointing: Checkpointing = Field(default_factory=Checkpointing, description="What a killed job goes on from.")
    output: Output = Field(default_factory=Output, description="What is published.")
    deploy: Deploy = Field(default_factory=Deploy, description="Serve the tuned model once it is published.")
    suspend: bool = Field(False, description="Stop with a checkpoint and hold; false goes on at the exact step.")
    cancel: bool = Field(False, description="End the job for good. Checkpoints stay; no model is published.")
    active_deadline_seconds: int | None = Field(
        None,
        alias="activeDeadlineSeconds",
        ge=1,
        le=31_536_000,
        description="Fail the job after so many seconds since its start; time spent suspended does not count.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None,
        alias="ttlSecondsAfterFinished",
        ge=0,
        le=31_536_000,
        description="Delete the finished job after so many seconds. Models and artefacts stay.",
    )
    retries: Retries = Field(default_factory=Retries, description="How often a training attempt is tried again.")

    @model_validator(mode="after")
    def _data_fits_the_objective(self) -> "JobSpec":
        sources = self.dataset.sources
        if self.method.objective is not Objective.DPO:
            if any(source.format is DataFormat.PREFERENCE for source in sources):
                raise ValueError(_CONVERSATIONS_ONLY)
            return self
        if self.dataset.ref:
            raise ValueError(_REF_HAS_NO_PAIRS)
        if any(source.template or source.format not in _PAIR_FORMATS for source in sources):
            raise ValueError(_PAIRS_ONLY)
        if self.dataset.train_on is TrainOn.ALL:
            raise ValueError(_ANSWERS_ONLY)
        if self.hyperparameters.label_smoothing:
            raise ValueError(_OTHER_SMOOTHING)
        return self

    @model_validator(mode="after")
    def _early_stopping_has_validation(self) -> "JobSpec":
        if self.hyperparameters.early_stopping.enabled and not (self.dataset.ref or self.dataset.has_validation):
            raise ValueError("earlyStopping needs validation rows: set validationFraction, or a source with split: validation")
        return self

    @model_validator(mode="after")
    def _mountable(self) -> "JobSpec":
        if len(claims := {*self.dataset.claims, claim_of(self.model.uri)} - {""}) > MAX_CLAIMS:
            raise ValueError(
                f"sources and model lie on {len(claims)} volumes ({', '.join(sorted(claims))}); a pod mounts at most {MAX_CLAIMS}"
            )
        return self


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
    metrics: list[Metric] = Field(default_factory=list, max_length=32, description="Last values.")
    last_updated: datetime = Field(alias="lastUpdated", description="When the pod reported.")


class CheckpointStatus(Part):
    """One checkpoint."""

    step: int = Field(ge=0, description="Optimizer step.")
    uri: str = Field("", max_length=2048, description="Its folder.")


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


class ModelStatus(Part):
    """What was published."""

    name: str = Field("", max_length=253, description="Name of the TunedModel.")
    version: str = Field("", max_length=63, description="Its version.")
    uri: str = Field("", max_length=2048, description="Folder of the artefact.")


class ErrorStatus(Part):
    """Why the job failed, with what to do."""

    code: str = Field(max_length=64, description="One of the failure codes.")
    message: str = Field(max_length=MAX_MESSAGE, description="What went wrong, and where.")
    param: str = Field("", max_length=1024, description="The field, file or object to blame.")
    advice: str = Field("", max_length=MAX_MESSAGE, description="What to do.")


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
    last_checkpoint: CheckpointStatus | None = Field(None, alias="lastCheckpoint", description="What the next attempt goes on from.")
    best_checkpoint: BestCheckpoint | None = Field(None, alias="bestCheckpoint", description="The best validation so far.")
    attempts: list[AttemptStatus] = Field(
        default_factory=list, max_length=MAX_ATTEMPTS_TOLD, description="The last attempts, oldest first."
    )
    restarts: Restarts = Field(default_factory=Restarts, description="Attempts tried again, by cause.")
    model: ModelStatus | None = Field(None, description="What was published.")


class InstructionTuningJob(
    Part,
    json_schema_extra=Rules(
        (f"{_STARTED} || self.spec.model == oldSelf.spec.model", f"spec.model {_FROZEN}"),
        (f"{_STARTED} || self.spec.dataset == oldSelf.spec.dataset", f"spec.dataset {_FROZEN}"),
        (f"{_STARTED} || self.spec.method == oldSelf.spec.method", f"spec.method {_FROZEN}"),
        (f"{_STARTED} || self.spec.hyperparameters == oldSelf.spec.hyperparameters", f"spec.hyperparameters {_FROZEN}"),
        (f"{_STARTED} || self.spec.resources == oldSelf.spec.resources", f"spec.resources {_FROZEN}"),
        (f"{_STARTED} || self.spec.checkpointing == oldSelf.spec.checkpointing", f"spec.checkpointing {_FROZEN}"),
        (f"{_STARTED} || self.spec.output == oldSelf.spec.output", f"spec.output {_FROZEN}"),
        (
            "!has(oldSelf.spec.cancel) || !oldSelf.spec.cancel || self.spec.cancel",
            "a cancelled job cannot be taken back; apply a new one",
        ),
    ),
):
    """Tunes a language model on instruction data, and publishes and serves the result."""

    spec: JobSpec = Field(description="What is wanted.")
    status: JobStatus | None = Field(None, description="What happened.")


def read_spec(spec: dict[str, Any], *, local: bool = False) -> JobSpec:
    """The typed spec of a manifest; raises ``pydantic.ValidationError``. ``local`` also admits paths of this machine."""
    return JobSpec.model_validate(spec, context={"local": local})
