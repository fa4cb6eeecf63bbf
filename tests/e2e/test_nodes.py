"""A job of two pods: they train together, one of them has to leave, and both are tried again as one."""

from tests.support.models import tiny_model
from tests.support.rows import alpaca_rows
from tests.support.stack import CommandFailed, wait_for
from tests.support.tenant import JOB_SECONDS, Tenant, a_job
from tunewright_crds import names
from tunewright_crds.errors import ExitCode

STEPS = 250


def log_of(tenant: Tenant, pod: str) -> str:
    """What a pod has said; nothing before it runs."""
    try:
        return tenant.stack.kubectl("logs", pod, "-n", tenant.namespace)
    except CommandFailed:
        return ""


def test_a_pod_that_has_to_leave_costs_no_step_and_both_go_on_together(tenant: Tenant) -> None:
    inputs = {
        "model": tenant.upload_folder("model", tiny_model("llama", chat_template=True)),
        "data": tenant.upload_rows("rows.jsonl", alpaca_rows(60)),
    }
    job = a_job("gang", **inputs, hyperparameters={"maxSteps": STEPS, "batchSize": 4}, checkpointing={"everySteps": 50})
    job["spec"]["resources"] |= {"nodes": 2}
    tenant.apply(job)
    wait_for("two pods", lambda: len(tenant.pods("gang", names.Role.TRAIN)) == 2, seconds=JOB_SECONDS)
    leader, other = sorted(pod["metadata"]["name"] for pod in tenant.pods("gang", names.Role.TRAIN))
    wait_for("a step", lambda: f"step 1/{STEPS}" in log_of(tenant, leader), seconds=JOB_SECONDS, context=lambda: tenant.story("gang"))
    tenant.stack.kubectl("delete", "pod", other, "-n", tenant.namespace, "--wait=false")

    done = tenant.wait_phase("gang", "Succeeded")
    first, second = done["attempts"]
    assert (first["reason"], first["exitCode"], first["lostSteps"]) == ("Stopped", ExitCode.STOPPED, 0)
    assert 1 <= first["reachedStep"] == second["resumedFromStep"] < second["reachedStep"] == STEPS
    assert second["reason"] == "Succeeded"
    assert not any(done["restarts"].get(kind) for kind in ("user", "infrastructure", "outOfMemory"))
    assert tenant.stack.kubectl.get("tm", "gang", "-n", tenant.namespace)["spec"]["artifact"]["uri"] == done["model"]["uri"]
    for kind in ("service", "networkpolicy"):
        (peers,) = tenant.stack.kubectl.get(kind, "-n", tenant.namespace)["items"]
        assert peers["metadata"]["ownerReferences"][0]["name"] == "gang"
