"""Progress reports: who may send them, what they may hold, and how few of them become writes."""

import copy
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.front_end import FakeKube, in_process, thing
from tunewright_api.progress import Pace, read_report
from tunewright_api.web import row
from tunewright_crds import names
from tunewright_crds.pod import MAX_PROGRESS_BYTES
from tunewright_crds.status import LastCheckpoint

META = {"namespace": "team-a", "name": "job", "uid": "uid-1", "creationTimestamp": "2026-01-01T00:00:00Z"}
REPORT: dict[str, Any] = {
    "job": {"namespace": "team-a", "name": "job", "uid": "uid-1"},
    "progress": {"step": 5, "maxSteps": 10, "attempt": 1, "percent": 50, "loss": "1.5", "lastUpdated": "2026-01-02T03:04:05Z"},
}


def report(path: str = "", value: Any = None) -> dict[str, Any]:
    """A good report, with one field set."""
    whole = copy.deepcopy(REPORT)
    if path:
        *parents, last = path.split(".")
        node = whole
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return whole


def a_pod(
    name: str = "pod", *, uid: str = "pod-uid", job: str = "uid-1", namespace: str = "team-a"
) -> dict[tuple[str, str], dict[str, Any]]:
    return {(namespace, name): {"metadata": {"uid": uid, "labels": {names.LABEL_JOB_UID: job}}}}


def a_token(
    *, namespace: str = "team-a", pod: str = "pod", uid: str = "pod-uid", audience: str = names.PROGRESS_AUDIENCE
) -> dict[str, Any]:
    extra = {"authentication.kubernetes.io/pod-name": [pod], "authentication.kubernetes.io/pod-uid": [uid]} if pod else {}
    return {"username": f"system:serviceaccount:{namespace}:default", "extra": extra, "audience": audience}


def a_job(**status: Any) -> dict[str, Any]:
    return thing("job", status=status)


SENT: dict[str, tuple[dict[str, Any], int]] = {
    "a pod of the job": ({}, 202),
    "no such token": ({"token": None}, 401),
    "a token for another audience": ({"token": a_token(audience="elsewhere")}, 401),
    "a token of a person": ({"token": {"username": "ann", "audience": names.PROGRESS_AUDIENCE}}, 403),
    "a token that is bound to no pod": ({"token": a_token(pod="")}, 403),
    "a pod of another namespace": ({"token": a_token(namespace="team-b"), "pods": a_pod(namespace="team-b")}, 403),
    "a pod of another job": ({"pods": a_pod(job="uid-2")}, 403),
    "a pod that is gone": ({"pods": {}}, 403),
    "a later pod of the same name": ({"pods": a_pod(uid="another")}, 403),
    "a job that is gone": ({"jobs": []}, 410),
    "a job made anew": ({"jobs": [thing("job", uid="uid-2")]}, 410),
    "a job that has ended": ({"jobs": [a_job(phase="Succeeded")]}, 410),
    "an attempt that was replaced": ({"jobs": [a_job(phase="Training", progress={"attempt": 2})]}, 409),
    "a write that meets another": ({"patch_status": 409}, 409),
    "a job made anew that the cache has not seen": ({"patch_status": 422}, 409),
    "a job deleted that the cache has not seen": ({"patch_status": 404}, 410),
    "an API server that is overloaded": ({"patch_status": 429}, 503),
    "an API server that is away": ({"down": True}, 503),
    "not a report": ({"body": {"job": "x"}}, 422),
    "too long a body": ({"body": {"job": "x" * MAX_PROGRESS_BYTES}}, 413),
}


@pytest.mark.parametrize("case", SENT)
async def test_who_may_report(case: str) -> None:
    given, status = SENT[case]
    token = given.get("token", a_token())
    kube = FakeKube(users={"t": token} if token else {}, pods=given.get("pods", a_pod()), down=given.get("down", False))
    kube.objects[names.JOBS] = given.get("jobs", [a_job(phase="Training")])
    kube.patch_status = given.get("patch_status", 200)
    async with in_process(kube) as client:
        answer = await client.post("/internal/progress", json=given.get("body", REPORT), headers={"Authorization": "Bearer t"})
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    assert bool(kube.patches) == (status == 202 or "patch_status" in given)
    for operations in kube.patches:
        assert operations[0] == {"op": "test", "path": "/metadata/uid", "value": "uid-1"}
        assert {operation["path"] for operation in operations[1:]} == {"/status/progress"}


BAD: dict[str, bytes] = {
    "NaN": b'{"progress": {"epoch": NaN}}',
    "infinity": b'{"progress": {"epoch": Infinity}}',
    "beyond a double": b'{"progress": {"epoch": 1e999}}',
    "not JSON": b"{",
    "not an object": b"[]",
    "nested to exhaust the stack": b'{"progress": ' + b"[" * 900 + b"]" * 900 + b"}",
    "not UTF-8": b'{"progress": "\xff"}',
}


@pytest.mark.parametrize("case", BAD)
async def test_a_body_that_no_status_can_hold_is_refused(case: str) -> None:
    kube = FakeKube(users={"t": a_token()}, pods=a_pod())
    async with in_process(kube) as client:
        answer = await client.post("/internal/progress", content=BAD[case], headers={"Authorization": "Bearer t"})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


WRONG = {
    "an unknown field": ("progress.speed", 1, "progress.speed"),
    "a negative step": ("progress.step", -1, "progress.step"),
    "a step beyond every reader": ("progress.step", 2**60, "whole numbers"),
    "more than all": ("progress.percent", 101, "progress.percent"),
    "a long text": ("progress.remaining", "x" * 17, "progress.remaining"),
    "too many metrics": ("progress.metrics", [{"name": "a", "value": 1}] * 33, "progress.metrics"),
    "no time": ("progress.lastUpdated", "soon", "progress.lastUpdated"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(case: str) -> None:
    path, value, told = WRONG[case]
    with pytest.raises(Exception, match="(?i)" + told.replace(".", r"\.")):
        read_report(report(path, value))


def test_texts_lose_their_control_characters() -> None:
    assert read_report(report("progress.loss", "1.5\x1b[31m\n")).progress.loss == "1.5 [31m"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_long_attempt_costs_one_write_in_fifteen_seconds_and_its_ends_are_told_at_once() -> None:
    clock = Clock()
    pace = Pace(15, clock=clock)
    written = []
    for second in range(0, 61, 5):
        clock.now = 1000.0 + second
        if pace.admit(read_report(report("progress.step", 9 if second < 55 else 10))):
            written.append(second)
    assert written == [0, 15, 30, 45, 55]
    assert pace.admit(read_report(report("progress.attempt", 2)))


def test_a_checkpoint_is_written_although_its_own_report_is_not() -> None:
    clock = Clock()
    pace = Pace(15, clock=clock)
    assert pace.admit(read_report(report())) is True
    clock.now += 5
    assert pace.admit(read_report(report("last_checkpoint", {"step": 4, "uri": "s3://b/c"}))) is False
    clock.now += 10
    assert pace.admit(read_report(report())) == LastCheckpoint(step=4, uri="s3://b/c")


def test_an_answer_to_a_request_is_written_at_once_and_once() -> None:
    pace = Pace(15, clock=Clock())
    answered = report("last_checkpoint", {"step": 4, "uri": "s3://b/c", "request": "now"})
    assert pace.admit(read_report(report())) is True
    assert pace.admit(read_report(answered)) == LastCheckpoint(step=4, uri="s3://b/c", request="now")
    assert pace.admit(read_report(answered)) is False


@pytest.mark.parametrize(
    ("annotations", "asked"),
    [({}, ""), ({names.CHECKPOINT_ANNOTATION: "now"}, "now"), ({names.CHECKPOINT_ANNOTATION: "x" * 99}, "x" * 63 + "…")],
)
async def test_a_pod_is_told_that_a_checkpoint_is_wanted(annotations: dict[str, str], asked: str) -> None:
    kube = FakeKube(users={"t": a_token()}, pods=a_pod())
    kube.objects[names.JOBS] = [a_job(phase="Training")]
    kube.objects[names.JOBS][0]["metadata"]["annotations"] = annotations
    async with in_process(kube) as client:
        for written in (True, False):
            answer = await client.post("/internal/progress", json=REPORT, headers={"Authorization": "Bearer t"})
            assert answer.json() == {"written": written, "checkpoint": asked}


async def test_a_body_that_does_not_tell_its_length_is_cut_off() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    async with in_process(FakeKube()) as client:
        answer = await client.post("/internal/progress", content=pieces(), headers={"Authorization": "Bearer t"})
    assert answer.status_code == 413


async def test_an_evaluation_adds_to_what_training_told() -> None:
    trained = {"step": 10, "maxSteps": 10, "attempt": 3, "percent": 100, "loss": "0.5", "lastUpdated": "2026-01-02T03:04:05Z"}
    kube = FakeKube(users={"t": a_token()}, pods=a_pod())
    kube.objects[names.JOBS] = [a_job(phase="Evaluating", progress=trained)]
    sent = REPORT | {"progress": {"evaluated": 40, "toEvaluate": 200, "lastUpdated": "2026-01-02T04:00:00Z"}}
    async with in_process(kube) as client:
        answer = await client.post("/internal/progress", json=sent, headers={"Authorization": "Bearer t"})
    assert answer.status_code == 202, answer.text
    (operations,) = kube.patches
    assert operations[1]["value"] == trained | {"evaluated": 40, "toEvaluate": 200, "lastUpdated": "2026-01-02T04:00:00Z"}
    shown = row(a_job(phase="Evaluating", progress=operations[1]["value"]) | {"metadata": META})
    assert (shown["percent"], shown["evaluating"]) == (20, "evaluating 40 of 200")
    assert row(a_job(phase="Succeeded", progress=operations[1]["value"]) | {"metadata": META})["evaluating"] == ""
