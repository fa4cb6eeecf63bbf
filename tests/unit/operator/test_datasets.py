"""What becomes of an InstructionDataset, and of the jobs that name one, told as stories."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.builders import PREPARED, TRAINED, DatasetWorld, World, a_dataset, a_job, failure
from tunewright_crds.dataset import DatasetStatus
from tunewright_crds.errors import FailureCode
from tunewright_crds.names import DatasetPhase, Phase
from tunewright_crds.pod import PodConfig
from tunewright_operator.builders import Manifest
from tunewright_operator.conditions import condition, holds
from tunewright_operator.observed import owner_uid

PREPARING = "d-prepare-dataset"


def config_of(manifests: list[Manifest]) -> PodConfig:
    """What the ConfigMap among them tells the pods."""
    (found,) = [manifest for manifest in manifests if manifest["kind"] == "ConfigMap"]
    return PodConfig.model_validate_json(found["data"]["job.json"])


def test_it_is_prepared_once_by_a_pod_like_that_of_a_job() -> None:
    world = DatasetWorld(spec={"seed": 7, "resources": {"cpu": "3"}, "model": {"uri": "s3://models/base/", "chatTemplate": "{{ x }}"}})
    world.settle()
    batch = world.batches[PREPARING]
    assert (world.status.phase, owner_uid(batch)) == (DatasetPhase.PREPARING, "12345678-aaaa")
    assert batch["metadata"]["ownerReferences"][0]["kind"] == "InstructionDataset"
    assert batch["spec"]["template"]["spec"]["containers"][0]["args"][0] == "prepare"
    told = config_of(world.plans[0].create)
    assert (told.job.name, told.spec.hyperparameters.seed, told.spec.resources.cpu, told.spec.model.chat_template) == (
        "d",
        7,
        "3",
        "{{ x }}",
    )
    world.finish(PREPARING, PREPARED).settle()
    status = world.status
    assert (status.phase, status.dataset and status.dataset.digest, status.completion_time) == (DatasetPhase.READY, "d1", world.now)
    assert holds(status.conditions, "Ready")
    world.batches.clear()
    world.pods.clear()
    world.settle()
    assert (world.status.phase, world.batches) == (DatasetPhase.READY, {}), "and never again"


def test_no_job_can_have_a_child_of_the_same_name() -> None:
    dataset = DatasetWorld(name="a")
    dataset.settle()
    for name in ("a", "a-prepare", "a-prepare-dataset"):
        job = World(a_job(name))
        job.settle()
        assert not set(job.batches) & set(dataset.batches)


FAILED: dict[str, tuple[Callable[[DatasetWorld], object], FailureCode, int]] = {
    "bad rows fail it at once": (
        lambda w: w.finish(PREPARING, failure(FailureCode.DATA_INVALID, "row 3"), exit_code=65),
        FailureCode.DATA_INVALID,
        0,
    ),
    "memory that is too small fails it at once": (
        lambda w: w.finish(PREPARING, exit_code=137, reason="OOMKilled"),
        FailureCode.OUT_OF_MEMORY,
        0,
    ),
    "storage that is away is tried again until the budget is spent": (
        lambda w: w.finish(PREPARING, failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69),
        FailureCode.STORAGE_UNAVAILABLE,
        1,
    ),
}


@pytest.mark.parametrize(("story", "code", "retries"), FAILED.values(), ids=FAILED)
def test_failures(story: Callable[[DatasetWorld], object], code: FailureCode, retries: int) -> None:
    world = DatasetWorld(spec={"retries": {"infrastructure": 1}})
    world.settle()
    for number in range(retries + 1):
        assert world.status.restarts.infrastructure == number
        story(world)
        world.settle()
        world.collect().pass_time(400).settle()
    status = world.status
    assert (status.phase, status.error and status.error.code, status.restarts.infrastructure) == (DatasetPhase.FAILED, code.value, retries)
    assert (holds(status.conditions, "Failed"), holds(status.conditions, "Ready")) == (True, False)
    world.pass_time(10_000).settle()
    assert world.batches == {}


def test_a_preempted_pod_is_free() -> None:
    world = DatasetWorld(spec={"retries": {"infrastructure": 0}})
    world.settle()
    disrupted = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
    world.finish(PREPARING, exit_code=137, conditions=disrupted).settle()
    world.collect().settle()
    world.finish(PREPARING, PREPARED).settle()
    assert (world.status.phase, world.status.restarts.free) == (DatasetPhase.READY, 1)


def test_a_spec_that_the_schema_should_not_have_let_pass_fails_it_by_name() -> None:
    world = DatasetWorld(spec={"dataset": {"ref": "other"}})
    world.settle()
    assert world.status.error is not None
    assert (world.status.phase, world.status.error.param) == (DatasetPhase.FAILED, "spec.dataset")


def test_it_goes_when_no_unfinished_job_has_named_it_for_as_long_as_its_owner_said() -> None:
    world = DatasetWorld(spec={"ttlSecondsAfterLastUse": 100})
    world.settle()
    world.users = 1  # waits
    world.pass_time(1000).settle()
    assert world.status.users == 1
    assert not world.plans[-1].delete_owner
    world.finish(PREPARING, PREPARED).settle()
    world.pass_time(1000).settle()
    assert not world.plans[-1].delete_owner, "it is used"
    world.users = 0
    world.settle()
    assert (world.status.users, world.status.last_used) == (0, world.now)
    assert world.plans[-1].wake_at is not None
    world.pass_time(99).settle()
    assert not world.plans[-1].delete_owner
    world.pass_time(1).settle()
    assert world.plans[-1].delete_owner


def test_without_a_time_to_live_it_stays() -> None:
    world = DatasetWorld()
    world.settle()
    world.finish(PREPARING, PREPARED).settle()
    world.pass_time(10**9).settle()
    assert not world.plans[-1].delete_owner


# Jobs that name one


def dataset(phase: str = "Ready", **status: Any) -> Manifest:
    """The InstructionDataset ``d`` as a job sees it."""
    body = a_dataset("d", dataset={"sources": [{"uri": "s3://data/rows.jsonl"}], "maxLength": 77, "packing": False})
    told = (
        {"phase": phase, "dataset": {"digest": "d9", "trainExamples": 10, "validationExamples": 2}}
        if phase == "Ready"
        else {"phase": phase}
    )
    return body | {"status": told | status}


def naming(**spec: Any) -> World:
    """A job that names ``d``."""
    return World(a_job().with_spec(dataset={"ref": "d"}, **spec))


@pytest.mark.parametrize(("own", "told"), [("", "theirs"), ("own", "own")])
def test_pods_are_told_the_chat_template_that_the_data_was_prepared_with(own: str, told: str) -> None:
    """The trainer refuses one of the job's own that is another."""
    world = naming(model={"uri": "s3://models/base/", "chatTemplate": own})
    body = dataset()
    body["spec"]["model"]["chatTemplate"] = "theirs"
    world.dataset = body
    assert config_of(world.reconcile().create).spec.model.chat_template == told


def test_what_is_ready_is_taken_and_trained_on_in_the_same_pass() -> None:
    world = naming()
    world.dataset = dataset()
    plan = world.reconcile()
    assert [manifest["kind"] for manifest in plan.create] == ["ConfigMap", "Job"]
    assert plan.create[1]["spec"]["template"]["spec"]["containers"][0]["args"][-2:] == ["--dataset", "d9"]
    told = config_of(plan.create).spec.dataset
    assert (told.ref, told.max_length, told.packing) == ("", 77, False)
    status = world.status
    assert (status.phase, status.dataset) == (
        Phase.TRAINING,
        DatasetStatus(digest="d9", train_examples=10, validation_examples=2, reused=True),
    )
    assert holds(status.conditions, "DataReady")
    world.finish("a-train-1", TRAINED).settle()
    assert world.model is not None
    assert (world.status.phase, world.model["spec"]["source"]["datasetDigest"]) == (Phase.SUCCEEDED, "d9")


WAITING: dict[str, tuple[Manifest | None, str]] = {
    "for one that is not there": (None, "there is no InstructionDataset d in this namespace: apply it"),
    "for one that nobody has looked at": (a_dataset("d"), "InstructionDataset d is pending"),
    "for one that is being prepared": (
        dataset(
            "Preparing",
            conditions=[
                {
                    "type": "Ready",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": "no node",
                    "lastTransitionTime": "2026-03-01T12:00:00Z",
                }
            ],
        ),
        "InstructionDataset d is preparing: no node",
    ),
    "for one that is being deleted": (
        dataset() | {"metadata": {"name": "d", "namespace": "ns", "deletionTimestamp": "2026-03-01T12:00:00Z"}},
        "InstructionDataset d is being deleted",
    ),
}


@pytest.mark.parametrize(("named", "message"), WAITING.values(), ids=WAITING)
def test_a_job_waits(named: Manifest | None, message: str) -> None:
    world = naming(activeDeadlineSeconds=100_000)
    world.dataset = named
    world.settle()
    world.pass_time(50_000).settle()
    told = condition(world.status.conditions, "DataReady")
    assert told is not None
    assert (told.status, told.reason, told.message) == ("False", "WaitingForDataset", message)
    assert (world.status.phase, world.batches, world.status.requeue) == (Phase.PENDING, {}, None)
    assert world.status.restarts.model_dump() == {"infrastructure": 0, "free": 0, "out_of_memory": 0}
    world.pass_time(50_001).settle()
    assert world.status.error is not None
    assert world.status.error.code == "DeadlineExceeded", "the deadline counts"


def test_a_job_fails_with_the_instruction_dataset_that_it_names() -> None:
    world = naming()
    world.dataset = dataset("Failed", error={"code": "DataEmpty", "message": "no row is left"})
    world.settle()
    error = world.status.error
    assert error is not None
    assert (world.status.phase, error.code, error.param) == (Phase.FAILED, "DataEmpty", "spec.dataset.ref")
    assert error.message == "InstructionDataset d failed: no row is left"
    assert error.advice


def test_early_stopping_needs_validation_rows_of_the_instruction_dataset() -> None:
    world = naming(hyperparameters={"earlyStopping": {"enabled": True}})
    world.dataset = dataset(dataset={"digest": "d9", "trainExamples": 10})
    world.settle()
    assert world.status.error is not None
    assert (world.status.error.code, world.status.error.param) == ("ConfigInvalid", "spec.hyperparameters.earlyStopping")
    world = naming(hyperparameters={"earlyStopping": {"enabled": True}})
    world.dataset = dataset()
    world.settle()
    assert world.status.phase is Phase.TRAINING


def test_a_suspended_job_takes_nothing_before_it_is_resumed() -> None:
    world = naming(suspend=True)
    world.dataset = dataset()
    world.settle()
    assert (world.status.phase, world.status.dataset) == (Phase.SUSPENDED, None)
    world.change(suspend=False).settle()
    assert world.status.phase is Phase.TRAINING


@pytest.mark.parametrize("after", [None, dataset() | {"status": {"phase": "Ready", "dataset": {"digest": "other"}}}])
def test_a_job_that_took_its_data_goes_on_without_the_instruction_dataset(after: Manifest | None) -> None:
    """Its digest is in its status, its config in its ConfigMap; another one of the same name does not matter."""
    world = naming()
    world.dataset = dataset()
    world.settle()
    world.dataset = after
    world.finish("a-train-1", failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69).settle()
    world.pass_time(60).settle()
    (made,) = [plan for plan in world.plans if any(body["metadata"]["name"] == "a-train-2" for body in plan.create)]
    assert (made.needs, [body["kind"] for body in made.create]) == ("a-config-12345678", ["Job"])
    assert world.batches["a-train-2"]["spec"]["template"]["spec"]["containers"][0]["args"][-1] == "d9"
    world.finish("a-train-2", failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69).settle()
    world.foreign.add("a-config-12345678")  # what the operator is told when the ConfigMap is gone too
    world.pass_time(600).settle()
    told = condition(world.status.conditions, "Training")
    assert told is not None
    assert (told.reason, "stands in the way" in told.message) == ("Starting", True)
