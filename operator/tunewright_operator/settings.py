"""The operator's settings, read from the environment (``TUNEWRIGHT_STORAGE_BUCKET=…``)."""

import socket
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from tunewright_crds.pod import StorageSettings


class Settings(BaseSettings):
    """Every field: its unit, default and reason. Frozen: what holds at the start holds until the end."""

    model_config = SettingsConfigDict(env_prefix="TUNEWRIGHT_", frozen=True, extra="ignore")

    trainer_image: str = Field(description="Image of data preparation, training and serving; a job may name its own for the first two.")
    trainer_image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = Field("", description="Empty: the cluster's default.")
    trainer_runtime_class: str = Field("", description="runtimeClassName of the trainer image's pods. Empty: none.")
    gpu_runtime_class: str = Field("", description="The same for pods that ask for GPUs, such as nvidia. Empty: as for the others.")

    storage_bucket: str = Field(description="The platform's bucket.")
    storage_prefix: str = Field("", description="Folder within it.")
    storage_endpoint: str = Field("", description="Address of the object storage. Empty: AWS.")
    storage_region: str = Field("us-east-1", description="Region of the bucket.")
    storage_secret: str = Field("tunewright-storage", description="Secret of the job's namespace with the storage's keys; may be absent.")
    progress_url: str = Field("", description="Where training pods report progress. Empty: nowhere.")

    namespaces: str = Field("", description="Namespaces to work in, joined by commas. Empty: all.")
    lease_namespace: str = Field(
        "tunewright", description="The platform's own namespace: the Lease lives there, and engines admit its pods."
    )
    lease_name: str = Field("tunewright-operator", description="Name of the Lease that makes one replica the leader.")
    identity: str = Field(default_factory=socket.gethostname, description="Name of this replica in the Lease. Default: the pod's name.")

    grace_seconds: int = Field(120, ge=1, le=3600, description="What a stopped training pod has to save a checkpoint.")
    backoff_base_seconds: float = Field(30, ge=0, description="Wait before the first retry; doubles with each.")
    backoff_cap_seconds: float = Field(300, ge=0, description="Longest wait between retries.")
    resync_seconds: float = Field(300, gt=0, description="Seconds between two full comparisons with the API server, ±10 %.")
    pending_seconds: float = Field(600, gt=0, description="How long a pod may wait for its image before the attempt fails.")
    stall_seconds: float = Field(0, ge=0, description="An attempt whose progress is older is tried again. 0: never.")
    health_seconds: float = Field(120, gt=0, description="/healthz fails when nothing was heard from the API server for so long.")
    lease_seconds: int = Field(30, ge=5, description="A leader that renewed nothing for so long may be replaced.")
    port: int = Field(8080, ge=0, le=65535, description="Probes and metrics. 0: any free port, told in the log.")

    @property
    def watched_namespaces(self) -> tuple[str, ...]:
        """The namespaces to work in; none: all of them."""
        return tuple(name for part in self.namespaces.split(",") if (name := part.strip()))

    def runtime_class(self, gpus: int) -> str:
        """runtimeClassName of a pod that asks for so many GPUs; empty: none."""
        return (gpus and self.gpu_runtime_class) or self.trainer_runtime_class

    @property
    def storage(self) -> StorageSettings:
        """What every pod is told of the storage."""
        return StorageSettings(
            bucket=self.storage_bucket, prefix=self.storage_prefix, endpoint=self.storage_endpoint, region=self.storage_region
        )
