"""The front end against a real API server: it follows what happens there, and never writes to a job that is another."""

import httpx
import pytest

from tests.support.front_end import FrontEnd, front_end
from tests.support.stack import wait_for


def test_a_change_is_read_at_once_and_a_job_made_anew_is_another(tmp_path_factory: pytest.TempPathFactory) -> None:
    with front_end(tmp_path_factory.mktemp("front_end")) as front:
        namespace = front.make_tenant()
        token = front.kubectl.token("owner", namespace)
        uid = front.make_job(namespace, "job")
        front.wait_job(namespace, "job", uid, token)

        front.set_status(namespace, "job", phase="Training")
        wait_for("the phase is read", lambda: phase(front, namespace, token) == "Training", seconds=60, every=0.05)

        trainer = front.pod_token(namespace, "trainer", uid)
        front.kubectl("delete", "itj", "job", "-n", namespace)
        anew = front.make_job(namespace, "job")
        front.wait_job(namespace, "job", anew, token)
        front.set_status(namespace, "job", phase="Preparing")
        late = {"step": 9, "maxSteps": 10, "attempt": 1, "lastUpdated": "2026-01-02T03:04:05Z"}
        body = {"job": {"namespace": namespace, "name": "job", "uid": uid}, "progress": late}
        answer = httpx.post(f"{front.url}/internal/progress", json=body, headers={"Authorization": f"Bearer {trainer}"}, timeout=30)
        assert answer.status_code == 410
        assert front.status(namespace, "job") == {"phase": "Preparing"}

        front.kubectl("delete", "itj", "job", "-n", namespace)
        path = f"/apis/v1/namespaces/{namespace}/jobs/job"
        wait_for("the job is gone", lambda: front.get(path, token).status_code == 404, seconds=60, every=0.05)
        ages = httpx.get(f"{front.url}/healthz", timeout=30).json()["ageSeconds"]
        assert all(0 <= age < 120 for age in ages.values())


def phase(front: FrontEnd, namespace: str, token: str) -> str | None:
    """The job's phase as the front end reads it."""
    status = front.get(f"/apis/v1/namespaces/{namespace}/jobs/job", token).json().get("status", {})
    found: str | None = status.get("phase")
    return found
