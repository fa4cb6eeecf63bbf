"""A tenant of the platform: a namespace with storage, people's rights, uploads and jobs."""

import copy
import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.stack import BUCKET, Stack, wait_for
from tunewright_crds import names

JOB_SECONDS = 300
UPLOADS = "uploads"


@dataclass(frozen=True)
class Tenant:
    """One namespace, with ``restricted`` pods only, and a folder of uploads of its own."""

    stack: Stack
    namespace: str = field(default_factory=lambda: f"tenant-{uuid.uuid4().hex[:8]}")

    def arrive(self) -> "Tenant":
        """Makes the namespace, the storage Secret, and a person ``owner`` who may edit in it."""
        self.stack.make_namespace(self.namespace, account="owner", role="edit")
        self.stack.make_bucket(UPLOADS)
        return self

    def leave(self) -> None:
        """Removes the namespace with everything in it."""
        self.stack.kubectl("delete", "namespace", self.namespace, "--wait=false", "--ignore-not-found")

    @property
    def token(self) -> str:
        """The owner's token."""
        return self.stack.kubectl.token("owner", self.namespace)

    def upload(self, key: str, content: bytes) -> str:
        """Uploads a file; returns its address."""
        self.stack.s3().put_object(Bucket=UPLOADS, Key=f"{self.namespace}/{key}", Body=content)
        return f"s3://{UPLOADS}/{self.namespace}/{key}"

    def upload_rows(self, key: str, rows: Iterable[dict[str, Any]]) -> str:
        """Uploads JSON lines; returns their address."""
        return self.upload(key, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def upload_folder(self, key: str, folder: Path) -> str:
        """Uploads a folder; returns its address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.upload(f"{key}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{UPLOADS}/{self.namespace}/{key}/"

    def apply(self, job: dict[str, Any]) -> str:
        """Applies a job, or another resource of ours, in this namespace."""
        job = copy.deepcopy(job)
        job["metadata"]["namespace"] = self.namespace
        return self.stack.kubectl.apply(job)

    def dataset(self, name: str) -> dict[str, Any]:
        """The InstructionDataset as it is; empty where there is none."""
        found: dict[str, Any] | None = self.stack.kubectl.find("ids", name, "-n", self.namespace)
        return found or {}

    def keys(self, prefix: str) -> set[str]:
        """The keys in the platform's bucket under a prefix, without it."""
        listed = self.stack.s3().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return {item["Key"].removeprefix(prefix) for item in listed.get("Contents", [])}

    def patch(self, name: str, spec: dict[str, Any]) -> None:
        """Changes a job's spec."""
        self.stack.kubectl("patch", "itj", name, "-n", self.namespace, "--type=merge", "-p", json.dumps({"spec": spec}))

    def job(self, name: str) -> dict[str, Any]:
        """The job as it is."""
        found: dict[str, Any] = self.stack.kubectl.get("itj", name, "-n", self.namespace)
        return found

    def status(self, name: str) -> dict[str, Any]:
        """The job's status; empty while it has none."""
        found: dict[str, Any] = self.job(name).get("status", {})
        return found

    def wait(self, name: str, what: str, holds: Callable[[dict[str, Any]], Any], *, seconds: float = JOB_SECONDS) -> dict[str, Any]:
        """The status as soon as ``holds(status)``; a job that ended otherwise is told at once."""

        def look() -> dict[str, Any] | None:
            status = self.status(name)
            if holds(status):
                return status
            assert not names.Phase(status.get("phase", "Pending")).terminal, f"{name} ended before {what}: {self.story(name)}"
            return None

        found = wait_for(f"{name}: {what}", look, seconds=seconds, every=0.3, context=lambda: self.story(name))
        assert found
        return found

    def wait_phase(self, name: str, phase: str, *, seconds: float = JOB_SECONDS) -> dict[str, Any]:
        """The status as soon as the job is in a phase."""
        return self.wait(name, phase, lambda status: status.get("phase") == phase, seconds=seconds)

    def pods(self, name: str, role: str) -> list[dict[str, Any]]:
        """The job's pods of a role, those that end included."""
        selector = f"{names.LABEL_JOB}={name},{names.LABEL_ROLE}={role}"
        found: list[dict[str, Any]] = self.stack.kubectl.get("pods", "-n", self.namespace, "-l", selector)["items"]
        return found

    def story(self, name: str) -> str:
        """What a person would look at when a job goes wrong: status, events, the end of the logs."""
        lines = [json.dumps(self.status(name), indent=1)[-6000:]]
        for arguments in (
            ("get", "pods,jobs", "-n", self.namespace, "-o", "wide"),
            ("get", "events", "-n", self.namespace, "--sort-by=.lastTimestamp"),
            ("logs", "-n", self.namespace, "-l", f"{names.LABEL_JOB}={name}", "--tail=40", "--all-containers", "--prefix"),
            ("logs", "-n", "tunewright-system", "deployment/tunewright-operator", "--tail=30"),
        ):
            try:
                lines.append(self.stack.kubectl(*arguments)[-6000:])
            except AssertionError as error:
                lines.append(str(error)[-1000:])
        return "\n".join(lines)


def a_dataset(name: str, *, model: str, data: str, **spec: Any) -> dict[str, Any]:
    """A small InstructionDataset; ``spec`` adds to it or replaces parts of it."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": "InstructionDataset",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": model},
            "dataset": {"sources": [{"uri": data}], "maxLength": 128},
            "resources": {"cpu": "500m", "memory": "3Gi", "scratch": "2Gi"},
        }
        | spec,
    }


def a_job(name: str, *, model: str, data: str, **spec: Any) -> dict[str, Any]:
    """A small job; ``spec`` adds to it or replaces parts of it."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": "InstructionTuningJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": model},
            "dataset": {"sources": [{"uri": data}], "maxLength": 128},
            "hyperparameters": {"maxSteps": 8, "batchSize": 4, "learningRate": 0.01},
            "resources": {"cpu": "500m", "memory": "3Gi", "scratch": "2Gi"},
        }
        | spec,
    }
