"""TunedModel: a published model with its lineage, registered or served."""

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, model_validator

from tunewright_crds.evaluation import MAX_METRICS, Measured
from tunewright_crds.fields import Part, Rules, SecretName
from tunewright_crds.resources import ServingResources
from tunewright_crds.status import ConditionStatus


class Kind(StrEnum):
    ADAPTER = "adapter"
    MERGED = "merged"
    FULL = "full"
    REWARD = "reward"


NOT_SERVED: Final = "a reward model judges answers and gives none: it cannot be served"


Address = Annotated[str, Field(pattern=r"^s3://", max_length=2048)]


class Base(Part):
    """The model that was tuned."""

    uri: Annotated[str, Field(pattern=r"^(s3|hf|pvc)://", max_length=2048)] = Field(description="Its folder.")
    credentials_secret: SecretName = Field("", alias="credentialsSecret", description="Secret of this namespace to read it with.")


class Artifact(Part):
    """What was published."""

    uri: Address = Field(description="Folder of the artefact; its manifest.json names every file with its hash.")
    digest: str = Field("", max_length=128, description="Hash of the manifest.")


class Form(Artifact):
    """One form of the model."""

    kind: Kind = Field(description="adapter, merged, full or reward.")


class ModelSource(Part):
    """Where the model comes from."""

    job: str = Field("", max_length=253, description="InstructionTuningJob that made it.")
    uid: str = Field("", max_length=64, description="UID of that job.")
    step: int = Field(0, ge=0, description="Optimizer step of the weights.")
    dataset_digest: str = Field("", alias="datasetDigest", max_length=128, description="Address of the prepared data.")
    models: list[Annotated[str, Field(max_length=512)]] = Field(
        default_factory=list, max_length=4, description="Tuned models that the job was made from, as model://<TunedModel>@<version>."
    )
    licenses: list[Annotated[str, Field(max_length=128)]] = Field(default_factory=list, max_length=64, description="Licences of the data.")


class Serving(Part):
    """Whether and how the model is served."""

    enabled: bool = Field(
        False, description="Serve the model. Adapters over the same base share their pods and are loaded while these run."
    )
    replicas: int = Field(1, ge=1, le=100, description="Serving pods; models that share them get the most that any asks for.")
    resources: ServingResources = Field(default_factory=ServingResources, description="What a serving pod asks for.")


class TunedModelSpec(Part, json_schema_extra=Rules(("self.kind != 'reward' || !self.serving.enabled", NOT_SERVED))):
    """What is wanted."""

    base: Base = Field(description="The model that was tuned.")
    kind: Kind = Field(
        description="adapter (needs its base), merged (an adapter merged into its base), full (every weight was tuned), reward (a whole model that judges answers)."
    )
    artifact: Artifact = Field(description="What was published.")
    forms: list[Form] = Field(
        default_factory=list,
        max_length=8,
        description="Every form that was published, kind and artifact among them. A job that names the model takes the one that fits.",
    )
    version: str = Field(max_length=63, description="Version of the model; a later job under the same name publishes another.")
    source: ModelSource = Field(default_factory=ModelSource, description="Where the model comes from.")
    metrics: list[Measured] = Field(
        default_factory=list, max_length=MAX_METRICS, description="What was measured of it on the test rows, beside its base."
    )
    serving: Serving = Field(default_factory=Serving, description="Whether and how it is served.")

    @model_validator(mode="after")
    def _served_models_answer(self) -> "TunedModelSpec":
        if self.kind is Kind.REWARD and self.serving.enabled:
            raise ValueError(NOT_SERVED)
        return self

    @property
    def all_forms(self) -> list[Form]:
        """Every form; of a model that does not tell them the one that it has."""
        return self.forms or [Form(kind=self.kind, uri=self.artifact.uri, digest=self.artifact.digest)]

    @property
    def served_uri(self) -> str:
        """The model that a serving pod starts with: the base of an adapter, otherwise the artefact itself."""
        return self.base.uri if self.kind is Kind.ADAPTER else self.artifact.uri


class TunedModelStatus(Part):
    """What happened."""

    observed_generation: int = Field(0, alias="observedGeneration", ge=0, description="metadata.generation that this status answers.")
    conditions: list[ConditionStatus] = Field(
        default_factory=list,
        max_length=8,
        description="Loaded: every serving pod holds this version. Ready: at least one answers with it.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    endpoint: str = Field("", max_length=512, description="Where it answers inside the cluster.")
    served_version: str = Field("", alias="servedVersion", max_length=63, description="Version that answers now.")
    message: str = Field("", max_length=1024, description="What stands in the way, if anything.")


class TunedModel(Part):
    """A tuned model: lineage, artefact, and whether it is served."""

    spec: TunedModelSpec = Field(description="What is wanted.")
    status: TunedModelStatus | None = Field(None, description="What happened.")
