"""What pods ask for."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from tunewright_crds.fields import Part, Quantity


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


class Sharding(StrEnum):
    AUTO = "auto"
    NONE = "none"
    FULL = "full"


class Resources(PodResources):
    """What a training pod asks for. Data preparation asks for the same processors and memory, and never for a GPU."""

    nodes: int = Field(
        1,
        ge=1,
        le=64,
        description="Pods that train together, each with the processors, memory and GPUs asked for here. They start, stop and are tried again as one.",
    )
    gpus_per_node: int = Field(
        0,
        alias="gpusPerNode",
        ge=0,
        le=16,
        description="GPUs of each training pod, each with a process of its own: 0 trains on processors, in one process a pod.",
    )
    sharding: Sharding = Field(
        Sharding.AUTO,
        description="Where several processes train: none gives each a copy of the model; full spreads the weights over all (FSDP2), for a model that would not fit "
        "(objectives sft and dpo, tuners full and lora). auto: full where every weight trains, else none.",
    )
    gpu_resource: str = Field(
        "nvidia.com/gpu",
        alias="gpuResource",
        pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$",
        max_length=128,
        description="Name of the GPU resource.",
    )
    ignore_memory_plan: bool = Field(
        False,
        alias="ignoreMemoryPlan",
        description="Train even where the memory plan says that it will not fit. The plan is still told in status.memory.",
    )
    priority_class_name: str = Field("", alias="priorityClassName", max_length=253, description="PriorityClass of the training pod.")

    @property
    def processes_per_node(self) -> int:
        """Training processes of each pod."""
        return max(1, self.gpus_per_node)

    @property
    def processes(self) -> int:
        """Training processes of all pods."""
        return self.nodes * self.processes_per_node


class ServingResources(Part):
    """What a serving pod asks for."""

    cpu: Quantity = Field("1", description="Processors asked for.")
    memory: Quantity = Field("4Gi", description="Memory: request and limit.")
    gpus: int = Field(0, ge=0, le=16, description="GPUs of a serving pod.")
