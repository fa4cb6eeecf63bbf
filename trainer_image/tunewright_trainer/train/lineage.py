"""What the base model was when the data was prepared for it."""

from typing import Any

from tunewright_crds.pod import PodConfig


def commit_of(config: PodConfig, manifest: dict[str, Any]) -> str:
    """The hub's commit of the job's model that the data with this manifest was prepared for; empty where there is none."""
    prepared = manifest.get("model", {})
    return str(prepared["commit"]) if prepared.get("uri") == config.spec.model.uri else ""
