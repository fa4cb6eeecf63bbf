"""Attempts of several pods: they run, end and are tried again as one."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.builders import PREPARED, TRAINED, World, a_job, failure, stopped
from tunewright_crds import names
from tunewright_crds.errors import FailureCode
from tunewright_crds.names import Phase
from tunewright_operator.conditions import condition

JOB = "a-train-1"
PREEMPTED = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
LOST_PEER = failure(FailureCode.PEER_LOST, "connection closed by peer")


def gang(nodes: int = 3, **resources: Any) -> World:
    world = World(a_job().with_spec(resources={"nodes": nodes, **resources}))
    world.settle()
    world.finish("a-prepare", PREPARED).settle()
    return world


def test_an_attempt_is_one_indexed_job_with_a_meeting_point() -> None:
    world = gang(gpusPerNode=2, cpu="8")
    batch = world.batches[JOB]["spec"]
    assert (batch["completionMode"], batch["completions"], batch["parallelism"], batch["backoffLimit"]) == ("Indexed", 3, 3, 0)
    pod = batch["template"]["spec"]
    told = {entry["name"]: entry.get("value") or entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in pod["containers"][0]["env"]}
    assert told["MASTER_ADDR"] == f"{JOB}-0.{pod['subdomain']}"
    assert (told["NNODES"], told["NPROC_PER_NODE"], told["OMP_NUM_THREADS"]) == ("3", "2", "4")
    assert told["NODE_RANK"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    made = [body["kind"] for plan in world.plans for body in plan.create]
    assert made == ["ConfigMap", "Job", "Service", "NetworkPolicy", "Job"]
    (service, policy) = [body["spec"] for plan in world.plans for body in plan.create if body["kind"] in ("Service", "NetworkPolicy")]
    own = {"matchLabels": service["selector"]}
    assert service["selector"].items() <= batch["template"]["metadata"]["labels"].items()
    assert (policy["podSelector"], policy["ingress"]) == (own, [{"from": [{"podSelector": own}]}]), "the pods of this job, and nobody else"
    prepares = world.batches["a-prepare"]["spec"]["template"]["spec"]
    assert "subdomain" not in prepares
    assert names.NODES not in {entry["name"] for entry in prepares["containers"][0]["env"]}


@pytest.mark.parametrize("gpus", [0, 1, 4])
def test_the_processes_of_one_pod_need_no_meeting_point(gpus: int) -> None:
    world = gang(1, gpusPerNode=gpus)
    pod = world.batches[JOB]["spec"]["template"]["spec"]
    assert ("subdomain" in pod, "completions" in world.batches[JOB]["spec"]) == (False, False)
    assert {names.MASTER_ADDR, names.NODES}.isdisjoint(entry["name"] for entry in pod["containers"][0]["env"])
    assert [body["kind"] for plan in world.plans for body in plan.create] == ["ConfigMap", "Job", "Job"]


def test_it_runs_once_all_of_its_pods_do() -> None:
    world = gang()
    world.start(JOB, index=0).start(JOB, index=1).settle()
    told = condition(world.status.conditions, "Training")
    assert told is not None
    assert told.status == "False"
    waiting = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}]
    world.start(JOB, index=2, phase="Pending", conditions=waiting)
    del world.pods[f"{JOB}-2"]["spec"]["nodeName"]
    world.settle()
    told = condition(world.status.conditions, "Training")
    assert told is not None
    assert (told.reason, "0/2 nodes" in told.message) == ("Unschedulable", True)
    world.start(JOB, index=2).settle()
    told = condition(world.status.conditions, "Training")
    assert told is not None
    assert told.status == "True"


def test_it_succeeds_by_the_pod_that_published() -> None:
    world = gang()
    for index in (1, 2):
        world.end_pod(JOB, index=index)
    world.finish(JOB, TRAINED).settle()
    assert (world.status.phase, world.status.attempts[0].reached_step) == (Phase.SUCCEEDED, 100)


Story = Callable[[World], object]
ENDED: dict[str, tuple[Story, str, str]] = {
    "a pod that had to leave, and broke its peers": (
        lambda w: (
            w.end_pod(JOB, LOST_PEER, index=0, exit_code=76),
            w.end_pod(JOB, index=1, exit_code=137, conditions=PREEMPTED),
            w.end_pod(JOB, LOST_PEER, index=2, exit_code=76),
        ),
        "Preempted",
        "free",
    ),
    "a pod out of memory": (
        lambda w: (
            w.end_pod(JOB, LOST_PEER, index=0, exit_code=76),
            w.end_pod(JOB, index=1, exit_code=137, reason="OOMKilled"),
            w.end_pod(JOB, stopped(resumed=0, reached=7), index=2, exit_code=75),
        ),
        "OutOfMemory",
        "outOfMemory",
    ),
    "a pod that broke while another had ended well": (
        lambda w: (
            w.end_pod(JOB, index=0),
            w.end_pod(JOB, failure(FailureCode.STORAGE_UNAVAILABLE), index=1, exit_code=69),
            w.end_pod(JOB, stopped(resumed=0, reached=7), index=2, exit_code=75),
        ),
        "StorageUnavailable",
        "infrastructure",
    ),
    "a pod that broke for a reason of its own, and the others for want of it": (
        lambda w: (
            w.end_pod(JOB, LOST_PEER, index=0, exit_code=76),
            w.end_pod(JOB, LOST_PEER, index=1, exit_code=76),
            w.end_pod(JOB, failure(FailureCode.INTERNAL, "a fault"), index=2, exit_code=70),
        ),
        "Internal",
        "infrastructure",
    ),
    "a pod of which nothing is left": (
        lambda w: [w.end_pod(JOB, LOST_PEER, index=index, exit_code=76) for index in (0, 2)],
        "Stopped",
        "free",
    ),
    "a network that came apart": (
        lambda w: [w.end_pod(JOB, LOST_PEER, index=index, exit_code=76) for index in range(3)],
        "PeerLost",
        "infrastructure",
    ),
    "a pod that lost its peers without a word": (
        lambda w: (
            w.end_pod(JOB, index=0, exit_code=76),
            w.end_pod(JOB, index=1, exit_code=137),
            w.end_pod(JOB, index=2, exit_code=76),
        ),
        "Killed",
        "infrastructure",
    ),
    "all stopped together": (
        lambda w: [w.end_pod(JOB, stopped(resumed=0, reached=7), index=index, exit_code=75) for index in range(3)],
        "Stopped",
        "free",
    ),
}


@pytest.mark.parametrize(("story", "reason", "budget"), ENDED.values(), ids=ENDED)
def test_it_ends_as_one_and_is_tried_again_as_one(story: Story, reason: str, budget: str) -> None:
    world = gang()
    story(world)
    world.settle()
    assert list(world.batches) == ["a-prepare", JOB], "until the Job itself has ended, nothing is made"
    world.fail_batch(JOB).settle()
    world.pass_time(60).settle()
    spent = world.status.restarts.model_dump(by_alias=True)
    assert (world.status.attempts[0].reason, spent[budget], sum(spent.values())) == (reason, 1, 1)
    assert world.batches["a-train-2"]["spec"]["completions"] == 3
    assert world.most_active == 1


def test_what_no_retry_would_mend_fails_the_job_whatever_the_others_say() -> None:
    world = gang()
    world.end_pod(JOB, index=0, exit_code=137, conditions=PREEMPTED)
    world.end_pod(JOB, failure(FailureCode.LOSS_DIVERGED, "loss is NaN"), index=1, exit_code=65)
    world.end_pod(JOB, LOST_PEER, index=2, exit_code=76)
    world.fail_batch(JOB).settle()
    assert world.status.error is not None
    assert (world.status.error.code, world.status.error.message) == ("LossDiverged", "loss is NaN")


@pytest.mark.parametrize(("nodes", "gpus"), [(3, 4), (1, 2), (3, 0)])
def test_the_seconds_of_all_gpus_of_all_attempts_are_counted(nodes: int, gpus: int) -> None:
    world = gang(nodes, gpusPerNode=gpus)
    for attempt in (1, 2):
        world.pass_time(100)
        for index in range(nodes):
            world.end_pod(f"a-train-{attempt}", stopped(resumed=0, reached=7), index=index, exit_code=75)
        world.fail_batch(f"a-train-{attempt}").settle()
        world.pass_time(60).settle()
    assert 200 * nodes * gpus <= world.status.gpu_seconds <= 330 * nodes * gpus


def test_the_last_checkpoint_is_told_by_whoever_knows_it() -> None:
    world = gang(2)
    world.end_pod(JOB, index=0, exit_code=137, reason="OOMKilled")
    world.end_pod(JOB, stopped(resumed=0, reached=40), index=1, exit_code=75)
    world.fail_batch(JOB).settle()
    assert world.status.last_checkpoint is not None
    assert (world.status.last_checkpoint.step, world.status.attempts[0].exit_code) == (40, 137)
