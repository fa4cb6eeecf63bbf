"""The layout of object storage, under the install's bucket and prefix. A folder without its manifest is absent."""

from typing import Final

MANIFEST: Final = "manifest.json"
REPORT: Final = "report.html"
REPORT_DATA: Final = "report.json"
STEP_DIGITS: Final = 8


def dataset_key(namespace: str, digest: str) -> str:
    """Prepared data, addressed by what it was made from."""
    return f"{namespace}/datasets/{digest}"


def job_key(namespace: str, uid: str) -> str:
    """Everything of one job."""
    return f"{namespace}/jobs/{uid}"


def checkpoints_key(namespace: str, uid: str) -> str:
    """The folder of a job's checkpoints."""
    return f"{job_key(namespace, uid)}/checkpoints"


def step_name(step: int) -> str:
    """The folder of one checkpoint; sorts by step."""
    return f"step-{step:0{STEP_DIGITS}d}"


def evaluation_key(namespace: str, uid: str) -> str:
    """The folder of what was measured of a job's model."""
    return f"{job_key(namespace, uid)}/evaluation"


def metrics_key(namespace: str, uid: str) -> str:
    """The folder of a job's metric history."""
    return f"{job_key(namespace, uid)}/metrics"


def model_key(namespace: str, name: str, version: str, form: str) -> str:
    """One form (adapter, merged) of one version of a tuned model."""
    return f"{namespace}/models/{name}/{version}/{form}"


def uri(bucket: str, prefix: str, key: str) -> str:
    """The ``s3://`` address of a key under the install's prefix."""
    return "s3://" + "/".join(part for part in (bucket, prefix.strip("/"), key) if part)
