"""What the operator decides, told as stories: a world, what happened in it, and what a user then sees."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.builders import ARTIFACT, PREPARED, TRAINED, JobBuilder, World, a_job, a_prepared_world, failure, stopped
from tunewright_crds.errors import ADVICE, FailureCode
from tunewright_crds.names import Phase
from tunewright_crds.status import HubCopy, MemoryPart, MemoryStatus
from tunewright_operator.conditions import condition, holds

JOB = "a-train-1"


def test_a_job_goes_from_applied_to_succeeded_with_one_pod_of_each_kind() -> None:
    world = World()
    world.settle()
    assert (world.status.phase, list(world.batches)) == (Phase.PREPARING, ["a-prepare"])
    world.finish("a-prepare", PREPARED).settle()
    assert (world.status.phase, list(world.batches)) == (Phase.TRAINING, ["a-prepare", JOB])
    assert world.status.dataset is not None
    assert world.status.dataset.digest == "d1"
    world.start(JOB).settle()
    assert holds(world.status.conditions, "Training")
    assert not holds(world.status.conditions, "Complete")
    world.finish(JOB, TRAINED).settle()
    status = world.status
    assert (status.phase, status.attempts[0].reason, status.attempts[0].reached_step) == (Phase.SUCCEEDED, "Succeeded", 100)
    assert holds(status.conditions, "Complete")
    assert holds(status.conditions, "ArtifactPublished")
    assert not holds(status.conditions, "Training")
    assert world.model is not None
    assert world.model["spec"]["version"] == "20260301-12345678"
    assert status.model is not None
    assert status.model.name == world.model["metadata"]["name"] == "a"
    written = sum(1 for plan in world.plans for _ in plan.create) + (world.model is not None)
    assert written == 4, "a ConfigMap, two Jobs and a TunedModel"


def test_a_finished_job_never_runs_again_although_its_children_are_gone() -> None:
    world = a_prepared_world().finish(JOB, TRAINED)
    world.settle()
    world.batches.clear()
    world.pods.clear()
    world.settle()
    assert (world.status.phase, world.batches) == (Phase.SUCCEEDED, {})


def test_a_checkpoint_that_was_asked_for_is_told_once() -> None:
    world = a_prepared_world().start(JOB).progress(attempt=1, step=5)
    for step, request in ((5, ""), (6, "now"), (9, "now"), (12, "again")):
        world.job["status"]["lastCheckpoint"] = {"step": step, "uri": f"s3://b/step-{step}", "request": request}
        world.settle()
    told = [event.message for plan in world.plans for event in plan.events if event.reason == "CheckpointSaved"]
    assert told == ["request now: step 6 is saved at s3://b/step-6", "request again: step 12 is saved at s3://b/step-12"]
    assert world.status.answered_request == "again"


PodStory = Callable[[World], object]
TRIED_AGAIN = {
    "out of memory is tried again with the micro-batch halved": (
        lambda w: w.finish(JOB, exit_code=137, reason="OOMKilled"),
        ("OutOfMemory", "outOfMemory", ["--halvings", "1"]),
    ),
    "out of memory that the trainer caught, likewise": (
        lambda w: w.finish(JOB, exit_code=78),
        ("OutOfMemory", "outOfMemory", ["--halvings", "1"]),
    ),
    "a container killed from outside draws from the infrastructure's budget": (
        lambda w: w.finish(JOB, exit_code=137, reason="Error"),
        ("Killed", "infrastructure", []),
    ),
    "storage that is away draws from the infrastructure's budget": (
        lambda w: w.finish(JOB, failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69),
        ("StorageUnavailable", "infrastructure", []),
    ),
    "a traceback instead of last words is an internal error": (
        lambda w: w.finish(JOB, "Traceback \x1b[31m…", exit_code=1),
        ("Internal", "infrastructure", []),
    ),
    "success without an artefact is none": (lambda w: w.finish(JOB), ("Internal", "infrastructure", [])),
    "a preempted attempt is free": (
        lambda w: w.finish(
            JOB, exit_code=137, conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
        ),
        ("Preempted", "free", []),
    ),
    "a lost node is free": (
        lambda w: w.finish(
            JOB, exit_code=137, conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}]
        ),
        ("NodeLost", "free", []),
    ),
    "a drained pod that stopped with a checkpoint is free": (
        lambda w: w.finish(JOB, stopped(resumed=0, reached=40), exit_code=75),
        ("Stopped", "free", []),
    ),
    "a pod that the kubelet did not admit is free": (
        lambda w: w.start(JOB, phase="Failed", reason="OutOfcpu").fail_batch(JOB),
        ("Preempted", "free", []),
    ),
    "a pod deleted by hand is free": (lambda w: w.start(JOB).lose_pod(JOB), ("Stopped", "free", [])),
    "a Job deleted by hand is free": (lambda w: (w.start(JOB), w.delete_batch(JOB), w.collect()), ("Stopped", "free", [])),
}


@pytest.mark.parametrize(("story", "told"), TRIED_AGAIN.values(), ids=TRIED_AGAIN.keys())
def test_ended_attempts_that_are_tried_again(story: PodStory, told: tuple[str, str, list[str]]) -> None:
    reason, budget, flags = told
    world = a_prepared_world()
    story(world)
    world.settle()
    world.pass_time(60).settle()
    first, second = world.status.attempts
    spent = world.status.restarts.model_dump(by_alias=True)
    assert (first.reason, spent, second.reason) == (reason, {"infrastructure": 0, "outOfMemory": 0, "free": 0} | {budget: 1}, "Running")
    container = world.batches["a-train-2"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["train", "--config", "/etc/tunewright/job.json", "--attempt", "2", "--dataset", "d1", *flags]
    assert world.most_active == 1


def waiting(reason: str, message: str = "it cannot") -> dict[str, Any]:
    """The status of a pod whose container waits."""
    return {"phase": "Pending", "containerStatuses": [{"state": {"waiting": {"reason": reason, "message": message}}}]}


FAILED = {
    "an invalid learning rate fails at once": (
        lambda w: w.finish(JOB, failure(FailureCode.CONFIG_INVALID), exit_code=64),
        FailureCode.CONFIG_INVALID,
    ),
    "a loss that diverged fails at once": (
        lambda w: w.finish(JOB, failure(FailureCode.LOSS_DIVERGED), exit_code=65),
        FailureCode.LOSS_DIVERGED,
    ),
    "keys that may not read fail at once": (
        lambda w: w.finish(JOB, failure(FailureCode.ACCESS_DENIED), exit_code=77),
        FailureCode.ACCESS_DENIED,
    ),
    "a container that cannot be made fails at once": (
        lambda w: w.start(JOB, **waiting("CreateContainerConfigError")),
        FailureCode.CONFIG_INVALID,
    ),
    "a scratch volume that is too small fails at once": (
        lambda w: w.start(JOB, phase="Failed", reason="Evicted", message="Usage of EmptyDir volume exceeds the limit").fail_batch(JOB),
        FailureCode.CONFIG_INVALID,
    ),
}


@pytest.mark.parametrize(("story", "code"), FAILED.values(), ids=FAILED.keys())
def test_failures_that_no_retry_would_mend(story: PodStory, code: FailureCode) -> None:
    world = a_prepared_world()
    story(world)
    world.settle()
    status = world.status
    assert status.error is not None
    assert (status.phase, status.error.code, status.error.advice) == (Phase.FAILED, code.value, ADVICE[code])
    assert holds(status.conditions, "Failed")
    assert len(status.attempts) == 1
    assert status.completion_time
    world.collect().settle()
    assert world.active() == 0


def test_an_image_that_cannot_be_pulled_is_told_at_once_and_fails_the_attempt_after_a_while() -> None:
    world = a_prepared_world(a_job().retrying(infrastructure=0), pending_seconds=100)
    world.start(JOB, **waiting("ImagePullBackOff", "no such image"))
    world.settle()
    told = condition(world.status.conditions, "Training")
    assert told is not None
    assert told.reason == "ImagePull"
    assert "no such image" in told.message
    assert world.status.phase is Phase.TRAINING
    world.pass_time(101).settle()
    assert world.status.error is not None
    assert world.status.error.code == "ImagePullFailed"


def test_a_pod_without_a_node_is_no_failure() -> None:
    world = a_prepared_world()
    world.start(
        JOB,
        phase="Pending",
        conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: GPU"}],
    )
    world.pods[f"{JOB}-0"]["spec"] = {}
    world.settle()
    world.pass_time(100_000).settle()
    told = condition(world.status.conditions, "Training")
    assert told is not None
    assert (told.reason, told.status) == ("Unschedulable", "False")
    assert "GPU" in told.message


@pytest.mark.parametrize(
    "said", ['0/1 nodes are available: persistentvolumeclaim "rows" not found.', "pod has unbound immediate PersistentVolumeClaims."]
)
def test_a_job_that_waits_for_a_volume_names_its_claim(said: str) -> None:
    world = World(a_job().with_spec(dataset={"sources": [{"uri": "pvc://rows/x.jsonl"}]}))
    world.settle()
    world.start(
        "a-prepare", phase="Pending", conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}]
    )
    del world.pods["a-prepare-0"]["spec"]["nodeName"]
    world.pods["a-prepare-0"]["spec"]["volumes"] = world.batches["a-prepare"]["spec"]["template"]["spec"]["volumes"]
    world.settle()
    told = condition(world.status.conditions, "DataReady")
    assert told is not None
    assert told.reason == "Unschedulable"
    assert "rows" in told.message
    assert said.strip(".") in told.message


def test_budgets_end_and_waits_grow_between_attempts() -> None:
    world = a_prepared_world(a_job().retrying(infrastructure=2))
    waits = []
    for number in (1, 2, 3):
        world.finish(f"a-train-{number}", failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69).settle()
        if number < 3:
            assert world.active() == 0
            assert world.status.requeue is not None
            assert world.status.requeue.not_before is not None
            waits.append((world.status.requeue.not_before - world.now).total_seconds())
            assert world.plans[-1].wake_at == world.status.requeue.not_before
            world.pass_time(waits[-1] + 1).settle()
    assert 22 <= waits[0] <= 38
    assert 45 <= waits[1] <= 75
    assert world.status.phase is Phase.FAILED
    assert world.status.error is not None
    assert world.status.error.code == "StorageUnavailable"


def test_a_pod_that_nobody_can_keep_does_not_spin() -> None:
    world = a_prepared_world()
    world.start(JOB).lose_pod(JOB).settle()
    assert world.active() == 1, "the first free end costs no time"
    world.start("a-train-2").lose_pod("a-train-2").settle()
    assert world.active() == 0
    assert world.status.requeue is not None


def test_suspending_saves_a_checkpoint_and_resuming_starts_another_attempt_for_free() -> None:
    world = a_prepared_world(a_job().with_spec(activeDeadlineSeconds=1000))
    world.start(JOB).settle()
    world.change(suspend=True).settle()
    assert world.status.phase is Phase.TRAINING, "while the pod saves it still holds its GPU"
    world.collect(stopped(resumed=0, reached=40)).settle()
    assert world.status.phase is Phase.SUSPENDED
    assert holds(world.status.conditions, "Suspended")
    first = world.status.attempts[0]
    assert (first.reason, first.exit_code, first.reached_step) == ("Suspended", 75, 40)
    assert world.status.last_checkpoint is not None
    assert world.status.last_checkpoint.step == 40
    world.pass_time(5000).settle()
    assert world.status.phase is Phase.SUSPENDED, "a suspended job's deadline stands still"
    assert world.active() == 0
    world.change(suspend=False).settle()
    assert world.status.suspended_seconds == 5000
    assert world.status.phase is Phase.TRAINING
    assert world.active() == 1
    assert world.status.restarts.free == 0
    assert not holds(world.status.conditions, "Suspended")
    resumed = TRAINED.model_copy(update={"resumed_from_step": 40})
    world.finish("a-train-2", resumed).settle()
    assert world.status.attempts[0].lost_steps == 0
    assert world.status.phase is Phase.SUCCEEDED


def test_resuming_before_the_old_pod_is_gone_waits_for_it() -> None:
    world = a_prepared_world().start(JOB)
    world.settle()
    world.change(suspend=True).settle()
    world.change(suspend=False).settle()
    assert list(world.batches) == ["a-prepare", JOB], "the old attempt still saves"
    world.collect(stopped(resumed=0, reached=7)).settle()
    assert "a-train-2" in world.batches
    assert world.most_active == 1


def test_a_job_applied_suspended_does_nothing_until_it_is_resumed() -> None:
    world = World(a_job().suspended())
    world.settle()
    assert (world.status.phase, world.batches, world.status.start_time) == (Phase.SUSPENDED, {}, None)
    world.change(suspend=False).settle()
    assert world.status.phase is Phase.PREPARING
    assert world.status.start_time


def test_cancelling_waits_for_the_last_words_and_publishes_nothing() -> None:
    world = a_prepared_world().start(JOB)
    world.settle()
    world.change(cancel=True).settle()
    assert not world.status.phase.terminal
    world.collect(stopped(resumed=0, reached=12)).settle()
    assert world.status.phase is Phase.CANCELLED
    assert world.model is None
    assert world.status.error is None
    assert world.status.last_checkpoint is not None
    assert world.status.last_checkpoint.step == 12
    assert (world.status.attempts[0].reason, world.status.restarts.free) == ("Cancelled", 0)


def test_a_job_past_its_deadline_fails_with_its_checkpoint_kept() -> None:
    world = a_prepared_world(a_job().with_spec(activeDeadlineSeconds=60)).start(JOB)
    world.settle()
    assert world.plans[-1].wake_at is not None
    world.pass_time(61).settle()
    world.collect(stopped(resumed=0, reached=9)).settle()
    assert world.status.phase is Phase.FAILED
    assert world.status.error is not None
    assert world.status.error.code == "DeadlineExceeded"
    assert world.status.last_checkpoint is not None
    assert world.active() == 0


def test_a_finished_job_goes_when_its_time_is_over() -> None:
    world = a_prepared_world(a_job().with_spec(ttlSecondsAfterFinished=100)).finish(JOB, TRAINED)
    world.settle()
    assert not world.plans[-1].delete_owner
    assert world.plans[-1].wake_at is not None
    world.pass_time(101).reconcile()
    assert world.plans[-1].delete_owner


def test_an_attempt_without_progress_is_tried_again_when_asked_to() -> None:
    world = a_prepared_world(stall_seconds=50).start(JOB)
    world.progress(1, 30).settle()
    world.pass_time(49).settle()
    assert world.status.attempts[0].end_time is None
    world.pass_time(2).settle()
    assert (world.status.attempts[0].reason, world.status.attempts[0].reached_step) == ("Stalled", 30)


def test_lost_steps_are_told_from_progress_when_a_pod_said_nothing() -> None:
    world = a_prepared_world().start(JOB)
    world.progress(1, 57).finish(
        JOB, exit_code=137, conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}]
    )
    world.settle()
    world.finish("a-train-2", TRAINED.model_copy(update={"resumed_from_step": 50})).settle()
    assert [attempt.lost_steps for attempt in world.status.attempts] == [7, None]
    assert world.status.progress is not None, "progress is the front end's: never wiped out"


PREPARATIONS: dict[str, tuple[Callable[[World], object], Phase, str]] = {
    "bad rows fail the job": (
        lambda w: w.finish("a-prepare", failure(FailureCode.DATA_INVALID), exit_code=65),
        Phase.FAILED,
        "DataInvalid",
    ),
    "a preparation out of memory has no micro-batch to halve": (
        lambda w: w.finish("a-prepare", exit_code=137, reason="OOMKilled"),
        Phase.FAILED,
        "OutOfMemory",
    ),
    "storage away is tried again": (
        lambda w: w.finish("a-prepare", failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69),
        Phase.PREPARING,
        "BackOff",
    ),
    "a preempted preparation is tried again": (lambda w: w.start("a-prepare").lose_pod("a-prepare"), Phase.PREPARING, "ValidatingData"),
}


@pytest.mark.parametrize(("story", "phase", "reason"), PREPARATIONS.values(), ids=PREPARATIONS.keys())
def test_preparations_that_end_badly(story: Callable[[World], object], phase: Phase, reason: str) -> None:
    world = World()
    world.settle()
    story(world)
    world.settle()
    world.collect().settle()
    told = condition(world.status.conditions, "DataReady")
    assert (world.status.phase, told.reason if told else "") == (phase, reason)
    if not phase.terminal:
        world.pass_time(60).settle()
        world.finish("a-prepare", PREPARED).settle()
        assert JOB in world.batches


def test_a_spec_that_makes_no_sense_fails_with_the_field_and_stops_nothing_else() -> None:
    world = World(JobBuilder("a").with_spec(dataset={"sources": "nonsense"}))
    world.settle()
    assert world.status.error is not None
    assert world.status.error.param == "spec.dataset.sources"
    assert (world.status.phase, world.status.error.code) == (Phase.FAILED, "ConfigInvalid")


def test_a_stranger_in_the_way_is_told_and_waited_for() -> None:
    world = World()
    world.foreign = {"a-prepare"}
    world.settle()
    told = condition(world.status.conditions, "DataReady")
    assert world.batches == {}
    assert told is not None
    assert "a-prepare" in told.message
    assert world.plans[-1].wake_at
    world.foreign = set()
    world.settle()
    assert "a-prepare" in world.batches


def test_a_job_with_our_labels_and_another_owner_is_never_ours() -> None:
    world = a_prepared_world()
    forged = world.batches[JOB]["metadata"]["ownerReferences"][0]
    forged["uid"] = "somebody-else"
    world.finish(JOB, TRAINED).reconcile()
    assert world.status.phase is not Phase.SUCCEEDED
    assert world.model is None


def test_an_attempt_started_just_before_a_crash_is_taken_in() -> None:
    world = World()
    world.settle()
    world.finish("a-prepare", PREPARED)
    plan = world.reconcile(upto=1)
    assert plan.create
    assert world.status.attempts == []
    assert JOB in world.batches
    world.settle()
    assert [attempt.number for attempt in world.status.attempts] == [1]
    assert world.most_active == 1


def test_a_spoilt_status_is_mended() -> None:
    world = a_prepared_world()
    world.job["status"]["restarts"] = "many"
    world.finish(JOB, TRAINED).settle()
    assert world.status.phase is Phase.SUCCEEDED


def test_nothing_is_written_when_nothing_changed() -> None:
    world = a_prepared_world().start(JOB)
    world.settle()
    version = world.job["metadata"]["resourceVersion"]
    plan = world.pass_time(1000).reconcile()
    assert world.job["metadata"]["resourceVersion"] == version
    assert not plan.create
    assert not plan.delete
    assert not plan.events


def test_a_pod_that_ended_before_its_job_says_so_is_not_told_as_starting() -> None:
    world = a_prepared_world().start(JOB)
    world.settle()
    world.finish(JOB, TRAINED)
    del world.batches[JOB]["status"]
    version = world.job["metadata"]["resourceVersion"]
    world.settle()
    assert world.job["metadata"]["resourceVersion"] == version


def test_an_end_and_a_start_that_a_crash_kept_out_of_the_status_are_both_told() -> None:
    world = a_prepared_world().finish(JOB, exit_code=137, reason="OOMKilled")
    world.reconcile(upto=1)
    assert "a-train-2" in world.batches
    world.settle()
    assert [(attempt.number, attempt.reason, attempt.micro_batch_halvings) for attempt in world.status.attempts] == [
        (1, "OutOfMemory", 0),
        (2, "Running", 1),
    ]
    assert (world.status.restarts.out_of_memory, world.most_active) == (1, 1)


def test_steps_are_lost_by_the_attempt_that_did_them_not_by_one_that_never_got_so_far() -> None:
    world = a_prepared_world().start(JOB)
    world.progress(1, 57).finish(JOB, exit_code=137).settle()
    world.pass_time(600).settle()
    world.finish("a-train-2", exit_code=137).settle()
    world.pass_time(600).settle()
    world.finish("a-train-3", TRAINED.model_copy(update={"resumed_from_step": 50})).settle()
    assert [attempt.lost_steps for attempt in world.status.attempts] == [7, 0, None]


def a_memory_plan(fits: str, **fields: Any) -> MemoryStatus:
    return MemoryStatus(fits=fits, bytes=90, limit=100, moment="training", parts=[MemoryPart(name="weights", bytes=90)], **fields)


def test_a_job_that_will_not_fit_fails_before_a_training_pod_is_made_and_says_what_would_help() -> None:
    world = World()
    world.settle()
    message = "training takes about 90 GiB; it would fit with method.tuner: qlora"
    world.finish(
        "a-prepare", failure(FailureCode.MEMORY_TOO_SMALL, message, dataset=PREPARED.dataset, memory=a_memory_plan("no")), exit_code=64
    )
    world.settle()
    error = world.status.error
    assert error is not None
    assert (world.status.phase, error.code, error.message) == (Phase.FAILED, "MemoryTooSmall", message)
    assert world.status.memory == a_memory_plan("no")
    assert not [name for name in world.batches if "train" in name]


def test_a_job_that_nearly_fits_trains_and_is_warned_of() -> None:
    world = World()
    world.settle()
    plan = a_memory_plan("tight", micro_batch_halvings=2, advice="it would fit with resources.memory: 9Gi")
    world.finish("a-prepare", PREPARED.model_copy(update={"memory": plan}))
    world.settle()
    assert world.status.memory == plan
    assert [(attempt.reason, attempt.micro_batch_halvings) for attempt in world.status.attempts] == [("Running", 2)]
    told = [event for plan in world.plans for event in plan.events if event.reason == "MemoryTight"]
    assert [event.warning for event in told] == [True]
    assert "resources.memory: 9Gi" in told[0].message


def test_a_job_whose_copy_on_the_hub_failed_is_done_and_says_why() -> None:
    world = a_prepared_world().start(JOB)
    told = ARTIFACT.model_copy(update={"hub": HubCopy(error="AccessDenied: the hub does not let us write (403)")})
    world.finish(JOB, TRAINED.model_copy(update={"artifact": told})).settle()
    assert world.status.phase is Phase.SUCCEEDED
    assert world.status.model is not None
    assert world.status.model.hub == told.hub
    (event,) = [event for plan in world.plans for event in plan.events if event.reason == "NotOnTheHub"]
    assert (event.warning, "403" in event.message) == (True, True)
