"""The front end against a real API server: it follows what happens there, and never writes to a job that is another."""

from typing import Any

import httpx
import pytest

from tests.support.front_end import FrontEnd, front_end
from tests.support.stack import wait_for
from tunewright_crds import names


def test_a_change_is_read_at_once_and_a_job_made_anew_is_another(tmp_path_factory: pytest.TempPathFactory) -> None:
    with front_end(tmp_path_factory.mktemp("front_end")) as front:
        namespace = front.make_tenant()
        token = front.kubectl.token("owner", namespace)
        uid = front.make_job(namespace, "job")
        front.wait_job(namespace, "job", uid, token)

        front.set_status(namespace, "job", phase="Training")
        wait_for("the phase is read", lambda: phase(front, namespace, token) == "Training", seconds=60, every=0.05)

        trainer = front.pod_token(namespace, "trainer", uid)
        saved = {"step": 4, "uri": "s3://bucket/step-4", "request": "now"}
        body = {"job": {"namespace": namespace, "name": "job", "uid": uid}, "progress": LATE, "last_checkpoint": saved}
        front.kubectl("annotate", "itj", "job", "-n", namespace, f"{names.CHECKPOINT_ANNOTATION}=now")
        wait_for("the pod is asked", lambda: report(front, body, trainer).json().get("checkpoint") == "now", seconds=60, every=0.05)
        assert front.status(namespace, "job")["lastCheckpoint"] == saved

        front.kubectl("delete", "itj", "job", "-n", namespace)
        anew = front.make_job(namespace, "job")
        front.wait_job(namespace, "job", anew, token)
        front.set_status(namespace, "job", phase="Preparing")
        assert report(front, body, trainer).status_code == 410
        assert front.status(namespace, "job") == {"phase": "Preparing"}

        front.kubectl("delete", "itj", "job", "-n", namespace)
        path = f"/apis/v1/namespaces/{namespace}/jobs/job"
        wait_for("the job is gone", lambda: front.get(path, token).status_code == 404, seconds=60, every=0.05)
        ages = httpx.get(f"{front.url}/healthz", timeout=30).json()["ageSeconds"]
        assert all(0 <= age < 120 for age in ages.values())


LATE = {"step": 9, "maxSteps": 10, "attempt": 1, "lastUpdated": "2026-01-02T03:04:05Z"}


def report(front: FrontEnd, body: dict[str, Any], token: str) -> httpx.Response:
    """What the front end answers a pod."""
    return httpx.post(f"{front.url}/internal/progress", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=30)


def phase(front: FrontEnd, namespace: str, token: str) -> str | None:
    """The job's phase as the front end reads it."""
    status = front.get(f"/apis/v1/namespaces/{namespace}/jobs/job", token).json().get("status", {})
    found: str | None = status.get("phase")
    return found
