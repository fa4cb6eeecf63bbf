"""Between training and publishing: the model is measured, and one that is not good enough goes no further."""

from typing import Any

import pytest

from tests.support.builders import MEASURED, PREPARED, PREPARED_WITH_TEST, TRAINED, JobBuilder, World, a_job, a_prepared_world, failure
from tunewright_crds import names
from tunewright_crds.errors import ADVICE, FailureCode
from tunewright_crds.names import Phase
from tunewright_operator.conditions import condition, holds

JOB, EVALUATION = "a-train-1", "a-evaluate"
REQUIRE: dict[str, Any] = {"require": [{"metric": "exact_match", "min": 0.8}]}
MISSED = failure(FailureCode.QUALITY_TOO_LOW, "exact_match is 0.75, and at least 0.8 is required", evaluation=MEASURED.evaluation)


def requiring(**spec: Any) -> JobBuilder:
    dataset = {"sources": [{"uri": "s3://data/rows.jsonl"}], "testFraction": 0.1}
    return a_job().with_spec(evaluation=REQUIRE, dataset=dataset, **spec)


def trained(job: JobBuilder | None = None) -> World:
    """Trained, on data with rows to test with."""
    world = a_prepared_world(job, outcome=PREPARED_WITH_TEST).finish(JOB, TRAINED)
    world.settle()
    return world


def test_a_trained_model_is_measured_before_it_is_registered() -> None:
    world = trained()
    assert world.status.phase is Phase.EVALUATING
    assert world.model is None
    assert world.status.model is not None
    assert world.status.model.uri == "s3://tunewright/ns/models/a/v/adapter"
    arguments = world.batches[EVALUATION]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments == ["evaluate", "--config", "/etc/tunewright/job.json", "--dataset", "d1", "--model", world.status.model.uri]
    world.start(EVALUATION).settle()
    assert condition(world.status.conditions, "Evaluated").reason == "Evaluating"  # type: ignore[union-attr]
    world.finish(EVALUATION, MEASURED).settle()
    assert world.status.phase is Phase.SUCCEEDED
    assert holds(world.status.conditions, "Evaluated")
    assert holds(world.status.conditions, "Complete")
    assert world.status.evaluation == MEASURED.evaluation
    assert world.model is not None
    assert world.model["spec"]["metrics"] == [{"task": "test", "metric": "exact_match", "base": 0.25, "tuned": 0.75}]
    assert world.model["spec"]["source"]["step"] == 100
    assert world.model["spec"]["kind"] == "adapter"


NOT_MEASURED = {
    "no rows to test with": (a_job(), PREPARED, "no rows to test with"),
    "not wanted": (a_job().with_spec(evaluation={"enabled": False}), PREPARED_WITH_TEST, "evaluation.enabled is false"),
}


@pytest.mark.parametrize(("job", "data", "said"), NOT_MEASURED.values(), ids=NOT_MEASURED)
def test_where_there_is_nothing_to_measure_the_model_is_registered_at_once(job: JobBuilder, data: Any, said: str) -> None:
    world = a_prepared_world(job, outcome=data).finish(JOB, TRAINED)
    world.settle()
    assert (world.status.phase, EVALUATION in world.batches, world.model is not None) == (Phase.SUCCEEDED, False, True)
    told = condition(world.status.conditions, "Evaluated")
    assert told is not None
    assert (told.status, told.reason) == ("False", "NotWanted")
    assert said in told.message


def test_a_model_that_is_not_good_enough_is_neither_registered_nor_served_and_nothing_is_tried_again() -> None:
    world = trained(requiring(deploy={"enabled": True})).finish(EVALUATION, MISSED, exit_code=79)
    world.settle()
    world.pass_time(600).settle()
    status = world.status
    assert (status.phase, world.model) == (Phase.FAILED, None)
    assert status.error is not None
    assert (status.error.code, status.error.advice) == ("QualityTooLow", ADVICE[FailureCode.QUALITY_TOO_LOW])
    assert "exact_match is 0.75, and at least 0.8 is required" in status.error.message
    assert status.evaluation == MEASURED.evaluation
    assert status.model is not None
    assert status.model.uri == "s3://tunewright/ns/models/a/v/adapter", "the artefact stays"
    assert not holds(status.conditions, "Evaluated")
    assert condition(status.conditions, "Training").reason == "Succeeded"  # type: ignore[union-attr]
    assert len(status.attempts) == 1
    assert list(world.batches) == ["a-prepare", JOB, EVALUATION]


def test_required_without_rows_to_test_with_ends_before_anything_is_trained() -> None:
    world = World(requiring())
    world.settle()
    world.finish("a-prepare", PREPARED).settle()
    assert (world.status.phase, list(world.batches)) == (Phase.FAILED, ["a-prepare"])
    assert world.status.error is not None
    assert (world.status.error.code, world.status.error.param) == ("ConfigInvalid", "spec.evaluation.require")


BROKE = {
    "storage that is away": (lambda w: w.finish(EVALUATION, failure(FailureCode.STORAGE_UNAVAILABLE), exit_code=69), "infrastructure"),
    "killed from outside": (lambda w: w.finish(EVALUATION, exit_code=137, reason="Error"), "infrastructure"),
    "asked to leave its node": (lambda w: w.finish(EVALUATION, exit_code=75), "free"),
    "a Job deleted by hand": (lambda w: (w.start(EVALUATION), w.delete_batch(EVALUATION), w.collect()), ""),
}


@pytest.mark.parametrize(("story", "budget"), BROKE.values(), ids=BROKE)
def test_an_evaluation_that_broke_is_made_anew_and_nothing_is_trained_again(story: Any, budget: str) -> None:
    world = trained()
    story(world)
    world.settle()
    world.collect().settle()
    world.pass_time(60).settle()
    world.finish(EVALUATION, MEASURED).settle()
    assert world.status.phase is Phase.SUCCEEDED
    assert [attempt.number for attempt in world.status.attempts] == [1]
    spent = world.status.restarts.model_dump()
    assert [name for name, count in spent.items() if count] == ([budget] if budget else [])


def test_an_evaluation_that_needs_too_much_memory_fails_the_job_by_that_name() -> None:
    world = trained().finish(EVALUATION, exit_code=137, reason="OOMKilled")
    world.settle()
    assert world.status.error is not None
    assert (world.status.error.code, world.status.error.message[:11]) == ("OutOfMemory", "evaluation:")


def test_a_held_evaluation_goes_on_and_a_cancelled_one_publishes_nothing() -> None:
    world = trained().start(EVALUATION)
    world.change(suspend=True).settle()
    world.collect().settle()
    assert (world.status.phase, EVALUATION in world.batches) == (Phase.SUSPENDED, False)
    world.change(suspend=False).settle()
    assert (world.status.phase, EVALUATION in world.batches) == (Phase.EVALUATING, True)
    world.change(cancel=True).settle()
    world.collect().settle()
    assert (world.status.phase, world.model) == (Phase.CANCELLED, None)


def test_the_evaluating_pod_asks_for_what_training_asks_for_but_one_gpu() -> None:
    world = trained(a_job().with_spec(resources={"gpusPerNode": 4, "priorityClassName": "high"}))
    pods = [world.batches[name]["spec"]["template"]["spec"] for name in (JOB, EVALUATION)]
    asked = [pod["containers"][0]["resources"] for pod in pods]
    assert [{part: of.pop("nvidia.com/gpu") for part, of in parts.items()} for parts in asked] == [dict.fromkeys(asked[0], n) for n in "41"]
    assert asked[0] == asked[1]
    assert pods[1]["priorityClassName"] == "high"


def test_only_the_evaluating_pod_holds_the_judges_key() -> None:
    judge = {"endpoint": "https://judge.example/v1", "model": "m", "apiKeySecret": "judge-key"}
    world = trained(a_job().with_spec(evaluation={"judge": judge}))
    mounts = {
        name: [mount["mountPath"] for mount in world.batches[name]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]]
        for name in (JOB, EVALUATION)
    }
    assert names.JUDGE_CREDENTIALS in mounts[EVALUATION]
    assert names.JUDGE_CREDENTIALS not in mounts[JOB]
    volumes = world.batches[EVALUATION]["spec"]["template"]["spec"]["volumes"]
    assert "judge-key" in [volume["secret"]["secretName"] for volume in volumes if "secret" in volume]
