"""What every answer has, and the pages."""

import re
from collections.abc import AsyncIterator
from datetime import timedelta

import httpx
import pytest

from tests.support.front_end import FakeKube, a_model, in_process, thing
from tunewright_api.app import create_app
from tunewright_api.gateway import MAX_BODY
from tunewright_api.sessions import Sessions
from tunewright_api.settings import Settings
from tunewright_api.web import age, measured, summarise
from tunewright_crds import names

ANN = {"Authorization": "Bearer t"}
HOSTILE = '<script>alert("x")</script>'


def a_cluster() -> FakeKube:
    """Ann may list and get in team-a; team-b is someone else's."""
    kube = FakeKube(users={"t": {"username": "ann"}})
    kube.rights = {("ann", verb, resource, "team-a") for verb in ("get", "list") for resource in (names.JOBS, names.MODELS)}
    metrics = [{"name": "loss", "value": 0.25}]
    progress = {"step": 7, "maxSteps": 10, "percent": 70, "loss": "0.25", "remaining": "3m", "tokensPerSecond": 80.5, "metrics": metrics}
    kube.objects[names.JOBS] = [
        thing("running", status={"phase": "Training", "progress": progress}),
        thing("broken", status={"phase": "Failed", "error": {"code": "DataInvalid", "message": HOSTILE, "advice": "Mend the rows."}}),
        thing("secret", "team-b", status={"phase": "Training", "progress": progress}),
    ]
    kube.objects[names.MODELS] = [a_model("tuned"), a_model("hidden", "team-b"), a_model("elsewhere", endpoint="http://metadata.internal")]
    return kube


ANSWERS: dict[str, tuple[str, dict[str, str], int]] = {
    "a job": ("/apis/v1/namespaces/team-a/jobs/running", ANN, 200),
    "a model": ("/apis/v1/namespaces/team-a/models/tuned", ANN, 200),
    "no such job": ("/apis/v1/namespaces/team-a/jobs/none", ANN, 404),
    "no right, and it exists": ("/apis/v1/namespaces/team-b/jobs/secret", ANN, 403),
    "no right, and it does not exist": ("/apis/v1/namespaces/team-b/jobs/none", ANN, 403),
    "no token": ("/apis/v1/jobs", {}, 401),
    "another token": ("/apis/v1/jobs", {"Authorization": "Bearer u"}, 401),
    "a proxy's word": ("/apis/v1/jobs", {"X-Remote-User": "ann", "X-Forwarded-User": "ann", "Impersonate-User": "ann"}, 401),
    "too large a page": ("/apis/v1/jobs?limit=501", ANN, 422),
    "a forged position": ("/apis/v1/jobs?continue=%21", ANN, 422),
    "no such route": ("/apis/v2/jobs", ANN, 404),
    "a model by its id": ("/v1/models/team-a/tuned", ANN, 200),
    "a model by its encoded id": ("/v1/models/team-a%2Ftuned:base", ANN, 200),
    "a model of others": ("/v1/models/team-b/hidden", ANN, 403),
    "no model": ("/v1/models/team-a/none", ANN, 404),
    "no id": ("/v1/models/gpt-4", ANN, 404),
    "no token for models": ("/v1/models", {}, 401),
    "metrics without a right": ("/metrics", ANN, 403),
    "metrics without a token": ("/metrics", {}, 401),
}


async def test_answers() -> None:
    async with in_process(a_cluster()) as client:
        answers = {case: await client.get(path, headers=who | {"X-Request-Id": "asked-1"}) for case, (path, who, _) in ANSWERS.items()}
    assert {case: answer.status_code for case, answer in answers.items()} == {case: status for case, (_, _, status) in ANSWERS.items()}
    for answer in answers.values():
        assert answer.headers["x-request-id"] == "asked-1"
        if answer.is_error and answer.request.url.path.startswith("/v1/"):
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        elif answer.is_error:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["requestId"] == "asked-1"


async def test_a_refusal_does_not_tell_whether_a_name_exists() -> None:
    async with in_process(a_cluster()) as client:
        texts = {(await client.get(f"/apis/v1/namespaces/team-b/jobs/{name}", headers=ANN)).json()["detail"] for name in ("secret", "none")}
    assert len(texts) == 1


async def test_lists_hold_what_the_caller_may_see() -> None:
    async with in_process(a_cluster()) as client:
        jobs = (await client.get("/apis/v1/jobs", headers=ANN)).json()["items"]
        models = (await client.get("/v1/models", headers=ANN)).json()["data"]
    assert [one["metadata"]["name"] for one in jobs] == ["broken", "running"]
    assert {one["id"] for one in models if not one["id"].startswith("team-a/elsewhere")} == {"team-a/tuned", "team-a/tuned:base"}
    assert not [one for one in models if one["id"].startswith("team-b/")]


async def test_a_status_cannot_send_the_front_end_anywhere() -> None:
    called: list[str] = []
    engines = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: called.append(str(request.url)) or httpx.Response(200)))  # type: ignore[func-returns-value]
    async with in_process(a_cluster(), engines) as client:
        answer = await client.post("/v1/chat/completions", json={"model": "team-a/elsewhere"}, headers=ANN)
    assert answer.status_code == 503
    assert not called


async def test_metrics_tell_running_jobs_and_routes_without_names() -> None:
    kube = a_cluster()
    async with in_process(kube, open_metrics=True) as client:
        await client.get("/apis/v1/namespaces/team-a/jobs/running", headers=ANN)
        await client.get("/apis/v1/namespaces/team-a/jobs/" + "x" * 30, headers=ANN)
        await client.get("/nowhere/" + "x" * 30)
        text = (await client.get("/metrics")).text
    assert 'tunewright_job_step{job="running",namespace="team-a"} 7.0' in text
    assert 'tunewright_job_train_loss{job="running",namespace="team-a"} 0.25' in text
    assert 'job="broken"' not in text
    assert re.search(r'tunewright_api_requests_total\{.*route="/apis/v1/namespaces/\{namespace\}/jobs/\{name\}",status="200"\} 1\.0', text)
    assert 'route="unmatched",status="404"' in text
    assert "xxxx" not in text


async def log_in(client: httpx.AsyncClient, token: str, *, csrf: str | None = None) -> httpx.Response:
    """Logs in as a browser does; with ``csrf``, as a forged form does."""
    page = await client.get("/login")
    found = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert found
    return await client.post("/login", data={"token": token, "csrf": found[1] if csrf is None else csrf})


async def test_the_page_shows_the_jobs_that_one_may_list_and_nothing_that_runs() -> None:
    async with in_process(a_cluster()) as client:
        assert (await client.get("/")).headers["location"] == "/login"
        assert (await client.get("/fragments/jobs")).headers["hx-redirect"] == "/login"
        answer = await log_in(client, "t\n")
        cookie = answer.headers["set-cookie"]
        assert answer.status_code == 303
        assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Secure"))
        page = await client.get("/")
        text = page.text
        assert "running" in text
        assert "7 of 10" in text
        assert "secret" not in text
        assert HOSTILE not in text
        assert "&lt;script&gt;" in text
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<script(?! src)|\son\w+=|style=", text)
        only = await client.get("/fragments/jobs", params={"phase": "Failed"})
        assert "broken" in only.text
        assert "running" not in only.text.split("<input")[0]
        seen = re.search(r'id="seen" name="seen" value="(\w+)"', only.text)
        assert seen
        assert (await client.get("/fragments/jobs", params={"phase": "Failed", "seen": seen[1]})).status_code == 204
        assert (await client.get("/apis/v1/jobs")).status_code == 401, "cookies are for pages only"


@pytest.mark.parametrize(("token", "csrf", "status"), [("u", None, 401), ("", None, 401), ("t", "", 403), ("t", "forged.sign", 403)])
async def test_a_login_that_is_wrong_or_forged_sets_no_session(token: str, csrf: str | None, status: int) -> None:
    async with in_process(a_cluster()) as client:
        answer = await log_in(client, token, csrf=csrf)
        assert answer.status_code == status
        assert "tunewright_session" not in client.cookies


async def test_a_forged_session_is_none() -> None:
    async with in_process(a_cluster()) as client:
        forged = Sessions(b"another key of the right length!", seconds=3600, secure=False)
        value = forged._session.sign("t").decode()
        assert (await client.get("/", headers={"Cookie": f"tunewright_session={value}"})).headers["location"] == "/login"
        assert (await client.get("/", headers={"Cookie": "tunewright_session=t"})).headers["location"] == "/login"


async def test_reads_wait_for_the_first_list_and_health_says_so() -> None:
    kube = a_cluster()
    kube.objects = {}  # every list fails
    app = create_app(Settings(), kube=kube.client(), engines=httpx.AsyncClient())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://front.test") as client:
        answer = await client.get("/apis/v1/jobs", headers=ANN)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert (await client.get("/readyz")).status_code == 503
        health = await client.get("/healthz")
        assert (health.status_code, health.json()["ageSeconds"]) == (200, {names.JOBS: None, names.MODELS: None})


SPANS = [(timedelta(seconds=-5), "0s"), (timedelta(seconds=59), "50s"), (timedelta(minutes=59), "59m"), (timedelta(hours=25), "1d")]


@pytest.mark.parametrize(("span", "text"), SPANS)
def test_ages_as_kubectl_tells_them(span: timedelta, text: str) -> None:
    assert age(span) == text


def test_what_was_measured_stands_side_by_side() -> None:
    metrics = [
        {"task": "test", "metric": "loss", "base": 5.61234, "tuned": 0.05},
        {"task": "test", "metric": "preference_accuracy", "tuned": 1},
    ]
    assert measured({"metrics": metrics}) == [
        {"metric": "test: loss", "base": "5.612", "tuned": "0.05"},
        {"metric": "test: preference_accuracy", "base": "–", "tuned": "1"},
    ]
    assert measured({}) == []


def test_a_summary_counts_phases_in_the_order_of_a_jobs_life() -> None:
    assert summarise(["Failed", "Pending", "Failed"]) == "3 jobs: 1 pending, 2 failed"
    assert summarise([]) == "No jobs yet."


async def test_a_form_that_never_ends_is_cut_off() -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 2**16
            yield b"token=" + b"x" * 2**16

    async with in_process(a_cluster()) as client:
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = await client.post("/login", content=pieces(), headers=kind)
    assert answer.status_code in (400, 413)
    assert sent < 2 * MAX_BODY
