"""InstructionTuningJob: the one resource that a person writes.

A field that is here has an effect; what is not here is refused by name.
"""

import json
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, Final

from pydantic import Field, model_validator

from tunewright_crds.dataset import MAX_TEMPLATE, DataFormat, Dataset, TrainOn
from tunewright_crds.evaluation import MEASURES, NO_ANSWERS, NO_TEST_ROWS, Evaluation, unfit, unmeasured
from tunewright_crds.fields import DNS_LABEL as DNS_LABEL_PATTERN
from tunewright_crds.fields import (
    MODEL_PINNED,
    NAME_MODEL,
    PIN_MODEL,
    TUNED_MODEL,
    TUNED_MODEL_NAMED,
    AutoCount,
    ModelUri,
    Part,
    Rules,
    SecretName,
    cel_list,
    claim_of,
    untouched,
)
from tunewright_crds.hyperparameters import BATCH_AT_ONCE, MISPLACED_GALORE, WITHIN_BACKWARD, Galore, Hyperparameters, Optimizer
from tunewright_crds.method import (
    APART,
    ARCHITECTURE,
    LEARNS_FROM,
    NEEDS_REWARDS,
    OPTIONS,
    REINFORCED,
    TUNER_OPTIONS,
    UNFIT,
    Examples,
    Method,
    Objective,
    Tuner,
    either,
    misplaced,
    misplaced_of_tuner,
)
from tunewright_crds.preference import DPO_RULES, KtoLoss
from tunewright_crds.resources import Resources, ServingResources, Sharding
from tunewright_crds.status import JobStatus
from tunewright_crds.tracking import Hub, Tracking, rules_of_destinations

MAX_CLAIMS: Final = 8  # volumes that a pod mounts


class Architecture(StrEnum):
    AUTO = "auto"
    CAUSAL = "causal"
    SEQ2SEQ = "seq2seq"


class OutputForm(StrEnum):
    ADAPTER = "adapter"
    LORA = "lora"
    MERGED = "merged"
    ONNX = "onnx"
    GGUF = "gguf"


_OWN_KEYS: Final = "a model:// lies in the platform's own storage and is read with its keys: leave credentialsSecret out"


class Model(
    Part,
    json_schema_extra=Rules(
        (f"!self.uri.startsWith('hf://') || (self.uri.matches('{MODEL_PINNED}') && !self.uri.startsWith('hf://datasets/'))", PIN_MODEL),
        (f"!self.uri.startsWith('{TUNED_MODEL}') || self.uri.matches('{TUNED_MODEL_NAMED}')", NAME_MODEL),
        (f"!self.uri.startsWith('{TUNED_MODEL}') || self.credentialsSecret == ''", _OWN_KEYS),
    ),
):
    """The base model."""

    uri: ModelUri = Field(
        description="Folder of the base model, with config.json, tokenizer files and *.safetensors: s3://bucket/path/, hf://org/name@revision, or pvc://claim/path; "
        "or model://<TunedModel>[@version], a whole model (merged or full) that another job of this namespace publishes, and for which this one waits."
    )
    architecture: Architecture = Field(
        Architecture.AUTO,
        description="Kind of model: causal (decoder only, as Llama), or seq2seq (an encoder reads the prompt and a decoder answers, as T5 and BART; objective sft only). `auto` reads it from config.json.",
    )
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

    @model_validator(mode="after")
    def _read_with_the_right_keys(self) -> "Model":
        if self.uri.startswith(TUNED_MODEL) and self.credentials_secret:
            raise ValueError(_OWN_KEYS)
        return self


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
        max_length=5,
        description="adapter (PEFT layout), lora (an adapter of another kind, converted to LoRA matrices, which is then the one that is served), merged (a whole "
        "model), and for other programs onnx (ONNX Runtime) and gguf (llama.cpp), each of the whole model. "
        "Tuner full and objective reward always publish the whole model; with other tuners the adapter is published unless merged is asked for.",
    )
    hub: Hub = Field(default_factory=Hub)


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


_REF_HAS_CONVERSATIONS: Final = (
    "an InstructionDataset holds conversations: with another objective than sft, name the sources in the job itself"
)
_ANSWERS_ONLY: Final = "with another objective than sft only answers count: trainOn is response or last-response"
_OTHER_SMOOTHING: Final = "hyperparameters.labelSmoothing is for objective sft; dpo has method.dpo.labelSmoothing"
_SEQ2SEQ_SHOTS: Final = "an encoder-decoder (seq2seq) is measured without examples: leave evaluation.fewShot at [0]"
_NOT_SERVED: Final = "a reward model judges answers and gives none: leave deploy out"
_EMPTY_MINI_BATCHES: Final = "method.ppo.miniBatches is above batchSize: some would be empty"
_NOTHING_TO_COMPARE: Final = (
    "objective kto compares each answer with the others of its batch: set batchSize above 1, or method.kto.loss: apo_zero_unpaired"
)
_TEXT_ANSWERS_NOTHING: Final = f"objective {either(REINFORCED)} answers prompts, and format text has none"
# The formats of which only these examples can be.
OWN_FORMATS: Final = {
    Examples.PREFERENCES: (DataFormat.PREFERENCE,),
    Examples.UNPAIRED: (DataFormat.UNPAIRED,),
    Examples.PROMPTS: (DataFormat.PROMPT,),
}
_LISTS: Final = ("output.formats",)  # fields that hold several values
# The formats whose rows tell an instruction and its input apart.
INSTRUCTED: Final = (DataFormat.AUTO, DataFormat.ALPACA, DataFormat.DOLLY, DataFormat.NATURAL_INSTRUCTIONS, DataFormat.SELF_INSTRUCT)
_INSTRUCTED_ONLY: Final = (
    f"tuner hint learns from rows that tell instruction and input apart: sources of format {either(INSTRUCTED)}, no template, and no ref"
)
_PAIRED: Final = (DataFormat.AUTO, DataFormat.PREFERENCE, DataFormat.OASST)
# The formats that hold these examples.
_FORMATS: Final = {Examples.PREFERENCES: _PAIRED, Examples.UNPAIRED: (*_PAIRED, DataFormat.UNPAIRED)}


def _objectives(examples: Examples) -> list[str]:
    return [objective.value for objective, learned in LEARNS_FROM.items() if learned is examples]


def _foreign(examples: Examples) -> str:
    formats, objectives = OWN_FORMATS[examples], _objectives(examples)
    return f"format {either(formats)} is for objective {either(objectives)}: set method.objective: {objectives[0]}, or name the column of the answer to learn"


def _only(examples: Examples) -> str:
    return f"with objective {either(_objectives(examples))} every source holds {examples.value}: format {either(_FORMATS[examples])}, and no template"


def _rules_of_objectives() -> Iterator[tuple[str, str]]:
    """What the API server is told of objectives, their options and their data; `JobSpec` says the same in Python."""
    for field, objectives in OPTIONS.items():
        left_out = " && ".join(untouched(Method, only=field, at="self.method"))
        yield f"self.method.objective in {cel_list(objectives)} || ({left_out})", misplaced(field)
    for examples, formats in _FORMATS.items():
        learns = f"self.method.objective in {cel_list(_objectives(examples))}"
        yield f"!({learns}) || self.dataset.sources.all(s, s.template == '' && s.format in {cel_list(formats)})", _only(examples)
    for examples, formats in OWN_FORMATS.items():
        learns = f"self.method.objective in {cel_list(_objectives(examples))}"
        yield f"{learns} || self.dataset.sources.all(s, !(s.format in {cel_list(formats)}))", _foreign(examples)
    of_conversations = f"self.method.objective in {cel_list(_objectives(Examples.CONVERSATIONS))}"
    yield f"{of_conversations} || self.dataset.ref == ''", _REF_HAS_CONVERSATIONS
    yield f"{of_conversations} || self.dataset.trainOn != 'all'", _ANSWERS_ONLY
    yield f"{of_conversations} || self.hyperparameters.labelSmoothing == 0.0", _OTHER_SMOOTHING
    yield from ((rule.cel, rule.said) for rule in DPO_RULES)
    reinforced = f"self.method.objective in {cel_list(_objectives(Examples.PROMPTS))}"
    yield f"!({reinforced}) || self.dataset.sources.all(s, s.format != 'text')", _TEXT_ANSWERS_NOTHING
    yield f"!({reinforced}) || self.method.rewards.size() > 0 || self.method.rewardModel != ''", NEEDS_REWARDS
    yield f"!self.method.rewardModel.startsWith('hf://') || self.method.rewardModel.matches('{MODEL_PINNED}')", PIN_MODEL
    yield "self.method.objective != 'ppo' || self.method.ppo.miniBatches <= self.hyperparameters.batchSize", _EMPTY_MINI_BATCHES
    compares = "self.method.objective == 'kto' && self.method.kto.loss == 'kto'"
    yield f"!({compares}) || self.hyperparameters.batchSize > 1", _NOTHING_TO_COMPARE
    for (objective, tuner), why in UNFIT.items():
        yield f"self.method.objective != '{objective}' || self.method.tuner != '{tuner}'", why


def _rules_of_requirements() -> Iterator[tuple[str, str]]:
    """What the API server is told of `evaluation.require` beside objective and data; `JobSpec` says the same in Python."""
    of_rows = "self.evaluation.require.all(r, r.task != '')"
    yield (
        f"{of_rows} || self.dataset.ref != '' || self.dataset.testFraction > 0.0 || self.dataset.sources.exists(s, s.split == 'test')",
        NO_TEST_ROWS,
    )
    for objective, measured in MEASURES.items():
        can = f"self.evaluation.require.all(r, r.task != '' || r.metric in {cel_list(measured)})"
        yield f"self.method.objective != '{objective}' || {can}", unmeasured(objective)
    asked = "self.evaluation.rules.size() > 0 || self.evaluation.tasks.size() > 0 || self.evaluation.judge.endpoint != ''"
    yield f"self.method.objective != 'reward' || !({asked})", NO_ANSWERS


def _rules_of_tuners() -> Iterator[tuple[str, str]]:
    """What the API server is told of tuners, and of fields that do not go together. It cannot look into `method.options`."""
    for field, tuners in TUNER_OPTIONS.items():
        left_out = " && ".join(untouched(type(getattr(Method(), field)), at=f"self.method.{field}"))
        yield f"self.method.tuner in {cel_list(tuners)} || ({left_out})", misplaced_of_tuner(field)
    instructed = f"self.dataset.ref == '' && self.dataset.sources.all(s, s.template == '' && s.format in {cel_list(INSTRUCTED)})"
    yield f"self.method.tuner != 'hint' || ({instructed})", _INSTRUCTED_ONLY
    galore = " && ".join(untouched(Galore, at="self.hyperparameters.galore"))
    yield f"self.hyperparameters.optimizer == '{Optimizer.GALORE}' || ({galore})", MISPLACED_GALORE
    at_once = "self.hyperparameters.microBatchSize == 'auto' || self.hyperparameters.microBatchSize == self.hyperparameters.batchSize"
    yield f"!(self.hyperparameters.optimizer in {cel_list(WITHIN_BACKWARD)}) || {at_once}", BATCH_AT_ONCE
    for pair in APART:
        yield f"!({_is_among(pair.field, pair.values)} && {_is_among(pair.other, pair.others)})", pair.because


def _is_among(field: str, values: Iterable[str | bool]) -> str:
    if field in _LISTS:
        return f"self.{field}.exists(one, one in {cel_list(values)})"
    if all(isinstance(value, bool) for value in values):
        return f"self.{field} in {json.dumps(list(values))}"
    return f"self.{field} in {cel_list(values)}"


def _found(spec: "JobSpec", field: str) -> list[Any]:
    """The values of a field: all of a list's."""
    node: Any = spec
    for alias in field.split("."):
        node = getattr(node, next(name for name, info in type(node).model_fields.items() if alias in (name, info.alias)))
    return node if isinstance(node, list) else [node]


class JobSpec(
    Part,
    json_schema_extra=Rules(
        *_rules_of_objectives(),
        *_rules_of_requirements(),
        *_rules_of_tuners(),
        *rules_of_destinations(),
        ("self.method.objective != 'reward' || !self.deploy.enabled", _NOT_SERVED),
        ("self.model.architecture != 'seq2seq' || self.evaluation.fewShot.all(shots, shots == 0)", _SEQ2SEQ_SHOTS),
    ),
):
    """What is wanted."""

    model: Model = Field(description="The base model.")
    dataset: Dataset = Field(description="The instruction data and how it is prepared.")
    method: Method = Field(default_factory=Method)
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="Numbers of the optimisation.")
    resources: Resources = Field(default_factory=Resources, description="What the pods ask for.")
    checkpointing: Checkpointing = Field(default_factory=Checkpointing, description="What a killed job goes on from.")
    evaluation: Evaluation = Field(default_factory=Evaluation)
    output: Output = Field(default_factory=Output, description="What is published.")
    tracking: Tracking = Field(default_factory=Tracking)
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
        examples, sources = self.method.examples, self.dataset.sources
        for others, formats in OWN_FORMATS.items():
            if others is not examples and any(source.format in formats for source in sources):
                raise ValueError(_foreign(others))
        if examples is Examples.CONVERSATIONS:
            return self
        if self.dataset.ref:
            raise ValueError(_REF_HAS_CONVERSATIONS)
        if examples in _FORMATS and any(source.template or source.format not in _FORMATS[examples] for source in sources):
            raise ValueError(_only(examples))
        if examples is Examples.PROMPTS and any(source.format is DataFormat.TEXT for source in sources):
            raise ValueError(_TEXT_ANSWERS_NOTHING)
        if self.method.objective is Objective.PPO and self.method.ppo.mini_batches > self.hyperparameters.batch_size:
            raise ValueError(_EMPTY_MINI_BATCHES)
        if self.method.objective is Objective.KTO and self.method.kto.loss is KtoLoss.KTO and self.hyperparameters.batch_size < 2:
            raise ValueError(_NOTHING_TO_COMPARE)
        if self.dataset.train_on is TrainOn.ALL:
            raise ValueError(_ANSWERS_ONLY)
        if self.hyperparameters.label_smoothing:
            raise ValueError(_OTHER_SMOOTHING)
        return self

    @model_validator(mode="after")
    def _fields_go_together(self) -> "JobSpec":
        for pair in APART:
            if not {*pair.values}.isdisjoint(_found(self, pair.field)) and not {*pair.others}.isdisjoint(_found(self, pair.other)):
                raise ValueError(pair.because)
        return self

    @model_validator(mode="after")
    def _measured_without_examples(self) -> "JobSpec":
        if self.model.architecture is Architecture.SEQ2SEQ and any(self.evaluation.few_shot):
            raise ValueError(_SEQ2SEQ_SHOTS)
        return self

    @model_validator(mode="after")
    def _served_models_answer(self) -> "JobSpec":
        if self.method.objective is Objective.REWARD and self.deploy.enabled:
            raise ValueError(_NOT_SERVED)
        return self

    @model_validator(mode="after")
    def _data_fits_the_tuner(self) -> "JobSpec":
        told_apart = not self.dataset.ref and all(not one.template and one.format in INSTRUCTED for one in self.dataset.sources)
        if self.method.tuner is Tuner.HINT and not told_apart:
            raise ValueError(_INSTRUCTED_ONLY)
        return self

    @model_validator(mode="after")
    def _early_stopping_has_validation(self) -> "JobSpec":
        if self.hyperparameters.early_stopping.enabled and not (self.dataset.ref or self.dataset.has_validation):
            raise ValueError("earlyStopping needs validation rows: set validationFraction, or a source with split: validation")
        return self

    @property
    def shards_model(self) -> bool:
        """Whether several processes spread the weights over themselves, rather than each having a copy."""
        automatic = self.method.tuner is Tuner.FULL and self.method.objective is Objective.SFT
        return self.resources.sharding is Sharding.FULL or (self.resources.sharding is Sharding.AUTO and automatic)

    @model_validator(mode="after")
    def _requirements_can_be_met(self) -> "JobSpec":
        if self.evaluation.needs_rows and not (self.dataset.ref or self.dataset.has_test):
            raise ValueError(NO_TEST_ROWS)
        if why := unfit(self.evaluation, self.method.objective):
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _mountable(self) -> "JobSpec":
        if len(claims := {*self.dataset.claims, claim_of(self.model.uri)} - {""}) > MAX_CLAIMS:
            raise ValueError(
                f"sources and model lie on {len(claims)} volumes ({', '.join(sorted(claims))}); a pod mounts at most {MAX_CLAIMS}"
            )
        return self


def seq2seq_mistake(spec: JobSpec) -> tuple[str, str] | None:
    """The field that an encoder-decoder cannot follow, and why; None where there is none. Whether the model is one, `auto` leaves to its config.json."""
    for pair in APART:
        if pair.field == ARCHITECTURE and Architecture.SEQ2SEQ in pair.values and not {*pair.others}.isdisjoint(_found(spec, pair.other)):
            return f"spec.{pair.other}", pair.because
    return ("spec.evaluation.fewShot", _SEQ2SEQ_SHOTS) if any(spec.evaluation.few_shot) else None


class InstructionTuningJob(
    Part,
    json_schema_extra=Rules(
        (f"{_STARTED} || self.spec.model == oldSelf.spec.model", f"spec.model {_FROZEN}"),
        (f"{_STARTED} || self.spec.dataset == oldSelf.spec.dataset", f"spec.dataset {_FROZEN}"),
        (f"{_STARTED} || self.spec.method == oldSelf.spec.method", f"spec.method {_FROZEN}"),
        (f"{_STARTED} || self.spec.hyperparameters == oldSelf.spec.hyperparameters", f"spec.hyperparameters {_FROZEN}"),
        (f"{_STARTED} || self.spec.resources == oldSelf.spec.resources", f"spec.resources {_FROZEN}"),
        (f"{_STARTED} || self.spec.checkpointing == oldSelf.spec.checkpointing", f"spec.checkpointing {_FROZEN}"),
        (f"{_STARTED} || self.spec.evaluation == oldSelf.spec.evaluation", f"spec.evaluation {_FROZEN}"),
        (f"{_STARTED} || self.spec.output == oldSelf.spec.output", f"spec.output {_FROZEN}"),
        (f"{_STARTED} || self.spec.tracking == oldSelf.spec.tracking", f"spec.tracking {_FROZEN}"),
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
