"""Two tenants and their pods on a real API server, with the rights that the chart gives: nobody reads or writes the other's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.support.front_end import FrontEnd, front_end
from tests.support.stack import wait_for
from tunewright_crds import names
from tunewright_crds.pod import MAX_PROGRESS_BYTES


@dataclass(frozen=True)
class Town:
    """A front end with two tenants; each has a job named ``mine``."""

    front: FrontEnd
    ours: str
    theirs: str
    our_job: str
    their_job: str
    token: str


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    with front_end(tmp_path_factory.mktemp("front_end")) as front:
        ours, theirs = front.make_tenant(), front.make_tenant()
        uids = front.make_job(ours, "mine"), front.make_job(theirs, "mine")
        tokens = [front.kubectl.token("owner", namespace) for namespace in (ours, theirs)]
        for namespace, uid, token in zip((ours, theirs), uids, tokens, strict=True):
            front.set_status(namespace, "mine", phase="Training")
            front.wait_job(namespace, "mine", uid, token)
        yield Town(front, ours, theirs, *uids, tokens[0])


READS = [
    "/apis/v1/namespaces/{}/jobs",
    "/apis/v1/namespaces/{}/jobs/mine",
    "/apis/v1/namespaces/{}/jobs/none",
    "/apis/v1/namespaces/{}/models",
    "/apis/v1/namespaces/{}/models/none",
    "/v1/models/{}/none",
    "/v1/models/{}/none:base",
]


@pytest.mark.parametrize("path", READS)
def test_a_tenants_token_opens_its_own_namespace_only(town: Town, path: str) -> None:
    assert town.front.get(path.format(town.ours), town.token).status_code in (200, 404)
    answer = town.front.get(path.format(town.theirs), town.token, **{"X-Remote-User": "admin", "Impersonate-User": "admin"})
    assert answer.status_code == 403
    assert town.their_job not in answer.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_tenants_token_asks_its_own_models_only(town: Town, path: str) -> None:
    for namespace, status in ((town.ours, 404), (town.theirs, 403)):
        body = {"model": f"{namespace}/none", "messages": [], "prompt": ""}
        answer = httpx.post(town.front.url + path, json=body, headers={"Authorization": f"Bearer {town.token}"}, timeout=30)
        assert answer.status_code == status


def test_lists_over_all_namespaces_hold_ones_own(town: Town) -> None:
    items = town.front.get("/apis/v1/jobs", town.token).json()["items"]
    assert [one["metadata"]["uid"] for one in items] == [town.our_job]
    assert town.front.get("/metrics", town.token).status_code == 403


def report(namespace: str, uid: str, step: int, **more: Any) -> dict[str, Any]:
    progress = {"step": step, "maxSteps": 10, "attempt": 1, "percent": step * 10, "loss": "0.5", "lastUpdated": "2026-01-02T03:04:05Z"}
    return {"job": {"namespace": namespace, "name": "mine", "uid": uid}, "progress": progress} | more


def send(town: Town, token: str, body: Any) -> int:
    """Sends a report, again where the answer says to; the status at last."""
    seen = 0

    def sent() -> bool:
        nonlocal seen
        seen = httpx.post(
            f"{town.front.url}/internal/progress", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=30
        ).status_code
        return seen not in (409, 503)

    wait_for("the report is answered", sent, seconds=60)
    return seen


def test_a_pods_report_reaches_its_own_job(town: Town) -> None:
    token = town.front.pod_token(town.ours, "trainer", town.our_job)
    checkpoint = {"step": 3, "uri": "s3://bucket/step-00000003"}
    assert send(town, token, report(town.ours, town.our_job, 3, last_checkpoint=checkpoint)) == 202
    status = town.front.status(town.ours, "mine")
    assert (status["progress"]["step"], status["lastCheckpoint"], status["phase"]) == (3, checkpoint | {"request": ""}, "Training")
    managers = town.front.kubectl.get("itj", "mine", "-n", town.ours, "--show-managed-fields")["metadata"]["managedFields"]
    assert names.PROGRESS_MANAGER in {one["manager"] for one in managers}


def test_a_pod_cannot_report_for_another_job_or_namespace_or_with_another_token(town: Town) -> None:
    before = [town.front.status(namespace, "mine") for namespace in (town.ours, town.theirs)]
    own = town.front.pod_token(town.ours, "honest", town.our_job)
    stranger = town.front.pod_token(town.ours, "stranger", "another-uid")
    pretender = town.front.pod_token(town.ours, "pretender", town.their_job)
    general = town.front.pod_token(town.ours, "general", town.our_job, audience="https://kubernetes.default.svc")
    cases = {
        "a pod of another job": (stranger, report(town.ours, town.our_job, 9), 403),
        "a pod labelled as another tenant's": (pretender, report(town.theirs, town.their_job, 9), 403),
        "another job's UID": (own, report(town.ours, town.their_job, 9), 403),
        "another namespace": (own, report(town.theirs, town.our_job, 9), 403),
        "a token of another audience": (general, report(town.ours, town.our_job, 9), 401),
        "a person's token": (town.token, report(town.ours, town.our_job, 9), 401),
        "an unknown token": ("nobody", report(town.ours, town.our_job, 9), 401),
        "too long a body": (own, {"job": "x" * MAX_PROGRESS_BYTES}, 413),
    }
    answers = {case: send(town, token, body) for case, (token, body, _) in cases.items()}
    assert answers == {case: status for case, (_, _, status) in cases.items()}
    assert [town.front.status(namespace, "mine") for namespace in (town.ours, town.theirs)] == before


def test_a_progress_token_opens_nothing_else(town: Town) -> None:
    token = town.front.pod_token(town.ours, "curious", town.our_job)
    assert town.front.get("/apis/v1/jobs", token).status_code == 401
    assert town.front.get(f"/v1/models/{town.ours}/none", token).status_code == 401
