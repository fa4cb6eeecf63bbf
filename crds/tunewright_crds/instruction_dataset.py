"""InstructionDataset: instruction data that is prepared once and named by many jobs."""

from datetime import datetime
from enum import StrEnum

from pydantic import Field, field_validator

from tunewright_crds.dataset import Dataset
from tunewright_crds.fields import Part, Rules, cel_list
from tunewright_crds.job import OWN_FORMATS, Model, PreparationRetries
from tunewright_crds.method import either
from tunewright_crds.names import DatasetPhase
from tunewright_crds.resources import PodResources
from tunewright_crds.status import PreparationStatus

_FIXED = "is fixed: apply an InstructionDataset of another name, such as support-v2"
_OWN = "an InstructionDataset names its own sources: leave ref out"
_OTHER_FORMATS = [form for forms in OWN_FORMATS.values() for form in forms]
_CONVERSATIONS = f"an InstructionDataset holds conversations only: name a source of format {either(_OTHER_FORMATS)} in a job"


class DeletionPolicy(StrEnum):
    RETAIN = "Retain"
    DELETE = "Delete"


class InstructionDatasetSpec(
    Part,
    json_schema_extra=Rules(
        ("self.dataset.ref == ''", _OWN),
        (f"self.dataset.sources.all(s, !(s.format in {cel_list(_OTHER_FORMATS)}))", _CONVERSATIONS),
        *((f"self.{field} == oldSelf.{field}", f"spec.{field} {_FIXED}") for field in ("model", "dataset", "seed", "resources", "retries")),
    ),
):
    """What is wanted. Only ttlSecondsAfterLastUse and deletionPolicy may change: a name means the same data for ever."""

    model: Model = Field(description="The base model, whose tokenizer and chat template the data is prepared with.")
    dataset: Dataset = Field(description="The instruction data and how it is prepared.")
    seed: int = Field(42, ge=0, le=2**31 - 1, description="Seed of the split: as hyperparameters.seed of a job.")
    resources: PodResources = Field(default_factory=PodResources, description="What the preparing pod asks for.")
    retries: PreparationRetries = Field(default_factory=PreparationRetries, description="How often preparing is tried again.")
    ttl_seconds_after_last_use: int | None = Field(
        None,
        alias="ttlSecondsAfterLastUse",
        ge=0,
        le=315_360_000,
        description="Delete the InstructionDataset when no unfinished job has named it for so many seconds. Default: never.",
    )
    deletion_policy: DeletionPolicy = Field(
        DeletionPolicy.RETAIN,
        alias="deletionPolicy",
        description="What becomes of the prepared data when the InstructionDataset is deleted: Retain leaves it in storage, Delete removes it "
        "as soon as no unfinished job trains on it, unless another InstructionDataset has the same.",
    )

    @field_validator("dataset")
    @classmethod
    def _own_sources(cls, dataset: Dataset) -> Dataset:
        if dataset.ref:
            raise ValueError(_OWN)
        if any(source.format in _OTHER_FORMATS for source in dataset.sources):
            raise ValueError(_CONVERSATIONS)
        return dataset


class InstructionDatasetStatus(PreparationStatus):
    """What happened."""

    phase: DatasetPhase = Field(DatasetPhase.PENDING, description="The state in one word.")
    users: int = Field(0, ge=0, description="Unfinished jobs that name it.")
    last_used: datetime | None = Field(None, alias="lastUsed", description="When a job that names it last came or ended.")


class InstructionDataset(Part):
    """Instruction data that is prepared once; jobs take it by name, with spec.dataset.ref."""

    spec: InstructionDatasetSpec = Field(description="What is wanted.")
    status: InstructionDatasetStatus | None = Field(None, description="What happened.")
