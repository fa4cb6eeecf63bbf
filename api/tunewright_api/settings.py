"""Settings of the front end, from the environment (``TUNEWRIGHT_…``)."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def _in_cluster_url() -> str:
    """The API server as Kubernetes tells every pod."""
    host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


class Settings(BaseSettings):
    """Every setting with its unit, default and reason."""

    model_config = SettingsConfigDict(env_prefix="TUNEWRIGHT_", frozen=True, extra="ignore")

    host: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104 - a pod is reached through its own address
    port: int = Field(8000, ge=0, le=65_535, description="Port of everything, also of probes and metrics.")
    namespaces: Annotated[tuple[str, ...], NoDecode] = Field((), description="Namespaces to show, joined by commas; empty: all.")
    audience: str = Field("", description="Audience that people's tokens must carry; empty: the API server's own.")
    progress_seconds: float = Field(
        15, gt=0, description="Seconds between two status writes of a job's progress: etcd is no time series database."
    )
    session_key_file: Path | None = Field(
        None, description="File with the key that signs session cookies; none: cookies end with the process."
    )
    session_seconds: int = Field(8 * 3600, ge=60, description="Seconds that a browser's session lasts, if its token lasts as long.")
    secure_cookies: bool = Field(True, description="Cookies for https (and localhost) only.")
    open_metrics: bool = Field(False, description="Give /metrics without a token; it names jobs and models of every namespace.")
    grace_seconds: int = Field(60, ge=1, description="Seconds that requests in flight get to end after SIGTERM.")
    engine_seconds: float = Field(600, gt=0, description="Longest silence of a serving pod while it generates, in seconds.")
    kube_url: str = Field(default_factory=_in_cluster_url, description="The API server.")
    kube_token_file: Path = Field(_SERVICE_ACCOUNT / "token", description="Token of the front end; read again as it rotates.")
    kube_ca_file: Path = Field(_SERVICE_ACCOUNT / "ca.crt", description="Authority of the API server's certificate.")

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
