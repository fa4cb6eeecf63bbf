"""One applied job becomes a tuned, published, answering model; it can be held, ended, and survives what clusters do to pods."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI, PermissionDeniedError

from tests.support.models import tiny_model
from tests.support.rows import alpaca_rows
from tests.support.stack import BUCKET, IMPATIENT, RELEASE, SYSTEM_NAMESPACE, Stack, cluster, wait_for
from tests.support.tenant import JOB_SECONDS, Tenant, a_job
from tunewright_crds import names, storage
from tunewright_crds.errors import ExitCode

LONG = 3000  # steps: nobody waits for the end of these jobs
KILLS = 10
OUTAGE_SECONDS = 120


@pytest.fixture
def inputs(tenant: Tenant) -> dict[str, str]:
    """A tiny model and 60 rows, uploaded."""
    return {
        "model": tenant.upload_folder("model", tiny_model("llama", chat_template=True)),
        "data": tenant.upload_rows("rows.jsonl", alpaca_rows(60)),
    }


def adapter_of(tenant: Tenant, uri: str) -> bytes:
    """The adapter's weights as they lie in storage."""
    key = uri.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    body: bytes = tenant.stack.s3().get_object(Bucket=BUCKET, Key=f"{key}/adapter_model.safetensors")["Body"].read()
    return body


def running_trainer(tenant: Tenant, name: str, *, but: str = "") -> dict[str, Any]:
    """The job's training pod whose container runs now, unless it is called ``but``; else nothing."""
    for pod in tenant.pods(name, names.Role.TRAIN):
        states = pod["status"].get("containerStatuses", [])
        if "deletionTimestamp" not in pod["metadata"] and any("running" in state["state"] for state in states):
            return pod if pod["metadata"]["name"] != but else {}
    return {}


def test_one_applied_job_becomes_an_answering_model(tenant: Tenant, inputs: dict[str, str], tmp_path: Path) -> None:
    deploy = {"enabled": True, "resources": {"cpu": "500m", "memory": "2Gi"}}
    job = a_job("main", **inputs, deploy=deploy, output={"modelName": "helper", "formats": ["adapter", "merged"]})
    job["spec"]["dataset"]["testFraction"] = 0.2
    job["spec"]["evaluation"] = {"maxNewTokens": 8, "require": [{"metric": "loss", "betterThanBase": True}]}
    tenant.apply(job)
    tenant.apply(a_job("upon", model="model://helper", data=inputs["data"], hyperparameters={"maxSteps": 2, "batchSize": 4}))
    tenant.wait("upon", "it waits", lambda status: "job main, which makes it, is" in str(status))
    status = tenant.wait_phase("main", "Succeeded")
    tenant.stack.kubectl("wait", "--for=condition=Complete", "itj/main", "-n", tenant.namespace, "--timeout=10s")
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Succeeded"]
    assert sum(status["dataset"].get(name, 0) for name in ("trainExamples", "validationExamples", "testExamples", "rejected")) == 60
    assert status["evaluation"]["examples"] == status["dataset"]["testExamples"] > 0
    found = {measured["metric"]: measured for measured in status["evaluation"]["metrics"]}
    assert found["loss"]["tuned"] < found["loss"]["base"]
    report = status["evaluation"]["reportUri"].removeprefix(f"s3://{BUCKET}/")
    assert b"Evaluation report" in tenant.stack.s3().get_object(Bucket=BUCKET, Key=report)["Body"].read()
    assert status["progress"]["step"] == status["progress"]["maxSteps"] == 8
    assert "Succeeded" in tenant.stack.kubectl("get", "itj", "-n", tenant.namespace)

    model = tenant.stack.kubectl.get("tm", "helper", "-n", tenant.namespace)
    assert {measured["metric"] for measured in model["spec"]["metrics"]} == set(found)
    assert model["spec"]["source"]["uid"] == tenant.job("main")["metadata"]["uid"]
    plain_peft_gives_finite_logits(tenant, model["spec"]["artifact"]["uri"], tmp_path)
    version = storage.model_key(tenant.namespace, "helper", model["spec"]["version"], "merged")
    assert [(form["kind"], form["uri"].endswith(version)) for form in model["spec"]["forms"]] == [("adapter", False), ("merged", True)]
    assert {"/manifest.json", "/model.safetensors", "/config.json"} <= tenant.keys(version)

    upon = tenant.wait_phase("upon", "Succeeded")
    assert [(taken["version"], taken["uri"].endswith(version)) for taken in upon["takenModels"]] == [(model["spec"]["version"], True)]
    made = tenant.stack.kubectl.get("tm", "upon", "-n", tenant.namespace)["spec"]
    assert (made["base"]["uri"], made["source"]["models"]) == (
        upon["takenModels"][0]["uri"],
        [f"model://helper@{model['spec']['version']}"],
    )

    tenant.stack.kubectl("wait", "--for=condition=Ready", "tm/helper", "-n", tenant.namespace, "--timeout=180s", timeout=200)
    asks_through_the_front_end(tenant)


def plain_peft_gives_finite_logits(tenant: Tenant, uri: str, folder: Path) -> None:
    """The artefact is what the field's own libraries load."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prefix = uri.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    for key in tenant.keys(prefix):
        (folder / key.strip("/")).write_bytes(tenant.stack.s3().get_object(Bucket=BUCKET, Key=prefix + key)["Body"].read())
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama", chat_template=True))
    before = base(torch.arange(8)[None]).logits.detach().clone()
    after = PeftModel.from_pretrained(base, str(folder))(torch.arange(8)[None]).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


def asks_through_the_front_end(tenant: Tenant) -> None:
    """The official client gets answers, streamed and whole; another namespace's person gets none."""
    stranger = Tenant(tenant.stack).arrive()
    model = f"{tenant.namespace}/helper"
    question: Any = [{"role": "user", "content": "Say red 1."}]
    try:
        with tenant.stack.front_end() as address:
            client = OpenAI(base_url=f"{address}/v1", api_key=tenant.token, timeout=60, max_retries=2)
            assert {model, f"{model}:base"} <= {listed.id for listed in client.models.list()}
            whole = client.chat.completions.create(model=model, messages=question, max_tokens=12, temperature=0)
            pieces = client.chat.completions.create(model=model, messages=question, max_tokens=12, temperature=0, stream=True)
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole.choices[0].message.content
            assert whole.usage
            assert whole.usage.completion_tokens > 0
            base = client.chat.completions.create(model=f"{model}:base", messages=question, max_tokens=12, temperature=0)
            assert base.choices[0].message.content != whole.choices[0].message.content

            with pytest.raises(PermissionDeniedError):
                OpenAI(base_url=f"{address}/v1", api_key=stranger.token, max_retries=0).chat.completions.create(
                    model=model, messages=question
                )
            theirs = httpx.get(
                f"{address}/apis/v1/namespaces/{tenant.namespace}/jobs", headers={"Authorization": f"Bearer {stranger.token}"}
            )
            assert theirs.status_code == 403
    finally:
        stranger.leave()


def test_a_held_job_goes_on_at_its_exact_step_and_a_cancelled_one_ends(tenant: Tenant, inputs: dict[str, str]) -> None:
    steps = {"maxSteps": LONG, "batchSize": 4}
    tenant.apply(a_job("held", **inputs, hyperparameters=steps))
    tenant.wait("held", "training is under way", lambda status: status.get("progress", {}).get("step", 0) >= 3)
    tenant.patch("held", {"suspend": True})
    held = tenant.wait_phase("held", "Suspended")
    saved = held["lastCheckpoint"]["step"]
    assert saved >= 3
    wait_for("no pod is left", lambda: not tenant.pods("held", names.Role.TRAIN), seconds=90)

    tenant.patch("held", {"suspend": False})
    resumed = tenant.wait("held", "it goes on", lambda status: status["progress"]["attempt"] == 2 and status["progress"]["step"] > saved)
    assert resumed["progress"]["resumedFromStep"] == saved
    assert not any(resumed["restarts"].get(kind) for kind in ("infrastructure", "outOfMemory"))

    tenant.patch("held", {"cancel": True})
    cancelled = tenant.wait_phase("held", "Cancelled")
    assert [(attempt["reason"], attempt.get("lostSteps", 0)) for attempt in cancelled["attempts"]] == [("Suspended", 0), ("Cancelled", 0)]
    wait_for("no pod is left", lambda: not tenant.pods("held", names.Role.TRAIN), seconds=90)
    assert tenant.stack.kubectl.find("tm", "held", "-n", tenant.namespace) is None


def kill_at_once(pod: dict[str, Any]) -> None:
    """SIGKILL, unannounced, to the trainer's process: found by the pod's control group, since the node is this machine."""
    uid = pod["metadata"]["uid"]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if uid in (process / "cgroup").read_text() and b"tunewright-trainer" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def test_a_trainer_killed_ten_times_ends_with_the_very_same_adapter(tenant: Tenant, inputs: dict[str, str]) -> None:
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed {seed}")
    chance = random.Random(seed)
    job: dict[str, Any] = {
        "hyperparameters": {"maxSteps": 800, "batchSize": 4, "learningRate": 0.003},
        "checkpointing": {"everySteps": 10},
        "retries": {"infrastructure": 50},
    }
    tenant.apply(a_job("killed", **inputs, **job))
    tenant.wait("killed", "its data is prepared", lambda status: "trainExamples" in status.get("dataset", {}))
    tenant.apply(a_job("calm", **inputs, **job))
    before = ""
    for kill in range(KILLS):
        pod = wait_for("a new pod runs", lambda: running_trainer(tenant, "killed", but=before), seconds=120)  # noqa: B023
        before = pod["metadata"]["name"]
        if kill % 2:  # while it starts, or a little later
            time.sleep(chance.uniform(0, 5))
        else:  # while it trains
            number = kill + 1
            tenant.wait("killed", f"attempt {number} trains", lambda status: status.get("progress", {}).get("attempt") == number)  # noqa: B023
            time.sleep(chance.uniform(0, 1))
        if chance.random() < 0.5:
            tenant.stack.kubectl("delete", "pod", before, "-n", tenant.namespace, "--wait=false")
        else:
            kill_at_once(pod)
    survived = tenant.wait_phase("killed", "Succeeded", seconds=2 * JOB_SECONDS)
    attempts = survived["attempts"]
    print(json.dumps(attempts))
    assert attempts[-1]["number"] == KILLS + 1, "each kill ended one attempt"
    assert attempts[-1]["resumedFromStep"] > 0
    told_to_stop = [attempt for attempt in attempts if attempt.get("exitCode") == ExitCode.STOPPED]
    assert all(attempt["lostSteps"] == 0 for attempt in told_to_stop), "it saved before it went"

    calm = tenant.wait_phase("calm", "Succeeded", seconds=2 * JOB_SECONDS)
    assert calm["dataset"]["reused"]
    assert adapter_of(tenant, survived["model"]["uri"]) == adapter_of(tenant, calm["model"]["uri"])


def test_training_outlives_two_minutes_without_object_storage(tenant: Tenant, inputs: dict[str, str]) -> None:
    tenant.apply(a_job("outage", **inputs, hyperparameters={"maxSteps": 400, "batchSize": 4}, checkpointing={"everySteps": 10}))
    tenant.wait("outage", "a checkpoint", lambda status: status.get("progress", {}).get("step", 0) >= 15)
    cluster("stop", "s3", "--name", "test", timeout=60)
    try:
        time.sleep(OUTAGE_SECONDS)
        published = tenant.stack.kubectl.find("tm", "outage", "-n", tenant.namespace)
    finally:
        cluster("start", "s3", "--name", "test", timeout=60)
    assert published is None
    done = tenant.wait_phase("outage", "Succeeded", seconds=2 * JOB_SECONDS)
    uid = tenant.job("outage")["metadata"]["uid"]
    assert adapter_of(tenant, done["model"]["uri"])
    folders = tenant.keys(storage.checkpoints_key(tenant.namespace, uid) + "/")
    assert {key.split("/")[0] for key in folders} == {key.split("/")[0] for key in folders if key.endswith(storage.MANIFEST)}


def test_a_release_changes_and_leaves_while_a_job_runs(stack: Stack, tenant: Tenant, inputs: dict[str, str]) -> None:
    tenant.apply(a_job("lasting", **inputs, hyperparameters={"maxSteps": LONG, "batchSize": 4}))
    tenant.wait("lasting", "training is under way", lambda status: status.get("progress", {}).get("step", 0) >= 3)
    pod = running_trainer(tenant, "lasting")["metadata"]["uid"]
    stack.install(IMPATIENT | {"operator.settings.resyncSeconds": "120"})
    stack.helm("uninstall", RELEASE, "-n", SYSTEM_NAMESPACE, "--wait")
    left = stack.kubectl(
        "get",
        "deployments,services,serviceaccounts,roles,rolebindings,secrets",
        "-n",
        SYSTEM_NAMESPACE,
        "-l",
        f"app.kubernetes.io/instance={RELEASE}",
        "-o",
        "name",
    )
    assert left.strip() == ""
    assert tenant.job("lasting")["metadata"]["name"] == "lasting", "definitions and jobs stay unless told otherwise"
    assert running_trainer(tenant, "lasting")["metadata"]["uid"] == pod, "the pod goes on without the platform"

    stack.install(IMPATIENT)
    again = tenant.wait("lasting", "progress is told again", lambda status: status["progress"]["step"] >= 10)
    assert [attempt["number"] for attempt in again["attempts"]] == [1]
    assert running_trainer(tenant, "lasting")["metadata"]["uid"] == pod
    tenant.stack.kubectl("delete", "itj", "lasting", "-n", tenant.namespace)
    wait_for("its pods stop", lambda: not tenant.pods("lasting", names.Role.TRAIN), seconds=90)
