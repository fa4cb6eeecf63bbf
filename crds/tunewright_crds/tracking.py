"""Where results go beside the platform's own storage: a tenant's experiment trackers, and its repositories on the Hugging Face hub."""

from collections.abc import Iterator
from typing import Final

from pydantic import Field, model_validator

from tunewright_crds.fields import Part, SecretName, untouched

_HTTP: Final = r"^$|^https?://[^\s/]+(/\S*)?$"
_REPOSITORY: Final = r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
_NO_SERVER: Final = "tracking.mlflow is sent to a server: set its uri"
_NO_PROJECT: Final = "tracking.wandb is sent to a project: set its project"
_NO_REPOSITORY: Final = "output.hub is sent to a repository: set its repository"


class Mlflow(Part):
    """An MLflow server."""

    uri: str = Field("", max_length=1024, pattern=_HTTP, description="Address of the server, such as https://mlflow.example. Empty: none.")
    experiment: str = Field(
        "", max_length=256, description="Experiment that the run belongs to, made where it is missing. Default: the job's namespace."
    )
    credentials_secret: SecretName = Field(
        "",
        alias="credentialsSecret",
        description="Secret of this namespace with MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. Default: none.",
    )

    @model_validator(mode="after")
    def _sent_somewhere(self) -> "Mlflow":
        if not self.uri and self != Mlflow.model_construct():
            raise ValueError(_NO_SERVER)
        return self


class Wandb(Part):
    """A project of Weights & Biases."""

    project: str = Field("", max_length=128, pattern=r"^[^/\\#?%:]*$", description="Project that the run belongs to. Empty: none.")
    entity: str = Field("", max_length=128, pattern=r"^[^/\\#?%:]*$", description="User or team. Default: that of the API key.")
    base_url: str = Field(
        "", alias="baseUrl", max_length=1024, pattern=_HTTP, description="Address of a server of your own. Default: https://api.wandb.ai."
    )
    credentials_secret: SecretName = Field(
        "",
        alias="credentialsSecret",
        description="Secret of this namespace with WANDB_API_KEY. Default: none, which only a server of your own may take.",
    )

    @model_validator(mode="after")
    def _sent_somewhere(self) -> "Wandb":
        if not self.project and self != Wandb.model_construct():
            raise ValueError(_NO_PROJECT)
        return self


class Tracking(Part):
    """Experiment trackers that are told the job's spec and metrics while it trains. One that does not answer delays nothing, and fails nothing."""

    mlflow: Mlflow = Field(default_factory=Mlflow, description="An MLflow server.")
    wandb: Wandb = Field(default_factory=Wandb, description="A project of Weights & Biases.")


class Hub(Part):
    """A repository of the Hugging Face hub that the published model is copied to."""

    repository: str = Field(
        "",
        max_length=193,
        pattern=_REPOSITORY,
        description="Repository (org/name), made where it is missing. It gets the form that is served, with its model card, as one commit. Empty: none.",
    )
    private: bool = Field(True, description="Whether a repository that is made is private; one that is there stays as it is.")
    credentials_secret: SecretName = Field(
        "",
        alias="credentialsSecret",
        description="Secret of this namespace with HF_TOKEN, which may write, and, for a mirror, HF_ENDPOINT.",
    )

    @model_validator(mode="after")
    def _sent_somewhere(self) -> "Hub":
        if not self.repository and self != Hub.model_construct():
            raise ValueError(_NO_REPOSITORY)
        return self


def rules_of_destinations() -> Iterator[tuple[str, str]]:
    """What the API server is told; the models say the same in Python."""
    for model, field, at, said in (
        (Mlflow, "uri", "self.tracking.mlflow", _NO_SERVER),
        (Wandb, "project", "self.tracking.wandb", _NO_PROJECT),
        (Hub, "repository", "self.output.hub", _NO_REPOSITORY),
    ):
        yield f"{at}.{field} != '' || ({' && '.join(untouched(model, but=field, at=at))})", said
