"""Data that several pods read side by side: for jobs and for InstructionDatasets alike."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.builders import PREPARED, DatasetWorld, World, a_job, failure, stopped
from tunewright_crds.errors import FailureCode, user_exit_codes
from tunewright_crds.names import Phase
from tunewright_operator.conditions import condition

SHARDED = {"sources": [{"uri": "s3://data/*.jsonl"}], "shards": 3}
OWNERS: dict[str, tuple[Callable[[], World | DatasetWorld], str, str]] = {
    "a job": (lambda: World(a_job().with_spec(dataset=SHARDED)), "a-shards", "a-prepare"),
    "an InstructionDataset": (lambda: DatasetWorld(spec={"dataset": SHARDED}), "d-shards-dataset", "d-prepare-dataset"),
}


@pytest.mark.parametrize(("build", "shards", "prepare"), OWNERS.values(), ids=OWNERS)
def test_the_parts_are_read_and_then_joined(build: Callable[[], World | DatasetWorld], shards: str, prepare: str) -> None:
    world = build()
    world.settle()
    assert list(world.batches) == [shards]
    spec = world.batches[shards]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"], spec["backoffLimitPerIndex"]) == ("Indexed", 3, 3, 3)
    assert "backoffLimit" not in spec
    container = spec["template"]["spec"]["containers"][0]
    assert container["args"] == ["prepare", "--config", "/etc/tunewright/job.json", "--shard"]
    ignored, fails = spec["podFailurePolicy"]["rules"]
    assert (ignored["action"], ignored["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget", "status": "True"}])
    assert (fails["action"], fails["onExitCodes"]["values"], fails["onExitCodes"]["containerName"]) == (
        "FailJob",
        [64, 65, 66, 77, 79],
        container["name"],
    )
    world.finish(shards).settle()
    assert list(world.batches) == [shards, prepare]
    world.finish(prepare, PREPARED).settle()
    assert world.status.dataset is not None
    assert world.status.phase in ("Training", "Ready")


def test_exit_codes_that_no_retry_would_mend() -> None:
    assert user_exit_codes() == [64, 65, 66, 77, 79]


def sharded() -> World:
    """A job whose data is being read."""
    world = World(a_job().with_spec(dataset=SHARDED, retries={"infrastructure": 1}))
    world.settle()
    return world


def test_of_the_pods_that_broke_the_one_that_names_the_fault_is_heard() -> None:
    world = sharded()
    world.end_pod("a-shards", failure(FailureCode.STORAGE_UNAVAILABLE, "slow"), index=0, exit_code=69)
    world.end_pod("a-shards", failure(FailureCode.DATA_INVALID, "b.jsonl: line 3"), index=1, exit_code=65)
    world.end_pod("a-shards", stopped(resumed=0, reached=0), index=2, exit_code=75)  # told to stop since another one broke
    world.fail_batch("a-shards").settle()
    assert world.status.error is not None
    assert (world.status.phase, world.status.error.code, world.status.error.message) == (Phase.FAILED, "DataInvalid", "b.jsonl: line 3")


def test_parts_that_broke_for_no_lasting_reason_are_read_again_within_the_budget() -> None:
    world = sharded()
    for number in (0, 1):
        assert world.status.restarts.infrastructure == number
        world.end_pod("a-shards", index=0)
        world.end_pod("a-shards", failure(FailureCode.STORAGE_UNAVAILABLE), index=1, exit_code=69)
        world.fail_batch("a-shards").settle()
        world.collect()
        world.pods.clear()
        world.pass_time(60).settle()
    assert world.status.error is not None
    assert world.status.error.code == "StorageUnavailable"
    assert world.batches == {}


def test_what_was_read_is_not_read_again_when_joining_it_breaks() -> None:
    world = sharded()
    world.finish("a-shards").settle()
    world.finish("a-prepare", failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69).settle()
    world.collect().pass_time(60).settle()
    made = [body["metadata"]["name"] for plan in world.plans for body in plan.create if body["kind"] == "Job"]
    assert made == ["a-shards", "a-prepare", "a-prepare"]


def test_a_pod_without_a_node_is_told_whichever_it_is() -> None:
    world = sharded()
    unschedulable: list[dict[str, Any]] = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no memory"}]
    world.start("a-shards", index=1, phase="Pending", conditions=unschedulable)
    world.pods["a-shards-1"]["spec"] = {}
    world.start("a-shards", index=2).settle()
    told = condition(world.status.conditions, "DataReady")
    assert told is not None
    assert (told.reason, told.message) == ("Unschedulable", "no memory")


def test_a_cancelled_job_stops_its_readers() -> None:
    world = sharded()
    world.change(cancel=True).settle()
    world.collect().settle()
    assert (world.status.phase, world.batches) == (Phase.CANCELLED, {})
