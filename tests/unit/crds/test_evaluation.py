"""What may be required of a tuned model, and what it means to miss it."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.unit.crds.test_job import SMALLEST
from tunewright_crds.dataset import Dataset
from tunewright_crds.errors import FailureCode
from tunewright_crds.evaluation import Evaluation, EvaluationStatus, Measured, MetricName, Requirement, left_out, missed, without_test_rows
from tunewright_crds.job import JobSpec, read_spec
from tunewright_crds.method import Objective
from tunewright_crds.pod import MAX_TERMINATION_BYTES, Failed, Outcome

JUDGE = {"endpoint": "https://judge.example/v1", "model": "m"}
EXACT: dict[str, Any] = {"metric": "exact_match", "min": 0.8}


def a_spec(evaluation: dict[str, Any], objective: str = "sft", **dataset: Any) -> JobSpec:
    spec: dict[str, Any] = {**SMALLEST, "evaluation": evaluation, "method": {"objective": objective}}
    spec["dataset"] = {**spec["dataset"], "testFraction": 0.1, **dataset}
    return read_spec(spec)


REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any], str]] = {
    "a requirement without a bound": ({"require": [{"metric": "loss"}]}, "sft", {}, "give min, max or betterThanBase"),
    "bounds the wrong way round": ({"require": [EXACT | {"max": 0.5}]}, "sft", {}, "min must not be above max"),
    "a metric that nobody measures": ({"require": [{"metric": "taste", "min": 1}]}, "sft", {}, "a metric is one of loss"),
    "a task that is not measured": (
        {"require": [EXACT | {"fewShot": 4}], "fewShot": [0, 3]},
        "sft",
        {},
        "takes a fewShot that is not measured",
    ),
    "no examples shown, but required": ({"require": [EXACT], "fewShot": [4]}, "sft", {}, "takes a fewShot that is not measured"),
    "required and not enabled": ({"require": [EXACT], "enabled": False}, "sft", {}, "an evaluation that is enabled"),
    "better than a base that is not measured": (
        {"require": [{"metric": "loss", "betterThanBase": True}], "compareWithBase": False},
        "sft",
        {},
        "needs compareWithBase",
    ),
    "no test rows": ({"require": [EXACT]}, "sft", {"testFraction": 0.0}, "require needs rows to test with"),
    "preferences of conversations": (
        {"require": [{"metric": "preference_accuracy", "min": 0.6}]},
        "sft",
        {},
        "not measured by preference_accuracy",
    ),
    "answers of a reward model": ({"require": [EXACT]}, "reward", {}, "can name preference_accuracy"),
    "rules that are not there": (
        {"require": [{"metric": "inst_level_loose_acc", "min": 0.6}]},
        "sft",
        {},
        "evaluation.rules must be given",
    ),
    "a rule that can never be followed": ({"rules": [{"type": "length", "min": 3, "max": 2}]}, "sft", {}, "no answer could follow"),
    "a task of no such name": (
        {"require": [{"metric": "acc", "task": "signs", "min": 1}], "tasks": [{"name": "words", "uri": "s3://b-1/t/"}]},
        "sft",
        {},
        "none of evaluation.tasks",
    ),
    "two tasks of one name": (
        {"tasks": [{"name": "words", "uri": "s3://b-1/t/"}, {"name": "words", "uri": "s3://b-1/u/"}]},
        "sft",
        {},
        "one name",
    ),
    "a task that is called like another": ({"tasks": [{"name": "x-4-shot", "uri": "s3://b-1/t/"}]}, "sft", {}, "is not called test"),
    "a task of the hub": ({"tasks": [{"name": "x", "uri": "hf://a/b@main"}]}, "sft", {}, "the folder of a task is s3"),
    "a metric of a task without its name": ({"require": [{"metric": "acc", "min": 1}]}, "sft", {}, "need its name in task"),
    "tasks for a judge": ({"tasks": [{"name": "x", "uri": "s3://b-1/t/"}]}, "reward", {}, "for models that answer"),
    "a judge's verdict without a judge": ({"require": [{"metric": "win_rate", "min": 0.5}]}, "sft", {}, "evaluation.judge must be given"),
    "a judge of one model": ({"judge": JUDGE, "compareWithBase": False}, "sft", {}, "needs compareWithBase"),
    "a judge without a model": ({"judge": {"endpoint": "https://judge.example/v1"}}, "sft", {}, "needs endpoint and model"),
    "criteria for no judge": ({"judge": {"criteria": "Be brief."}}, "sft", {}, "needs endpoint and model"),
    "a judge of judges": ({"judge": JUDGE}, "reward", {}, "for models that answer"),
    "a key in an address": ({"judge": JUDGE | {"endpoint": "https://me:key@judge.example/v1"}}, "sft", {}, "match pattern"),
    "a file as a judge": ({"judge": JUDGE | {"endpoint": "file:///etc/passwd"}}, "sft", {}, "match pattern"),
    "shots without end": ({"fewShot": [100]}, "sft", {}, "less than or equal"),
}


@pytest.mark.parametrize(("evaluation", "objective", "dataset", "said"), REFUSED.values(), ids=REFUSED)
def test_requirements_that_can_never_be_met_are_refused(
    evaluation: dict[str, Any], objective: str, dataset: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        a_spec(evaluation, objective, **dataset)


def test_requirements_that_can_be_met_are_taken() -> None:
    a_spec({"require": [EXACT, {"metric": "loss", "betterThanBase": True, "max": 2, "fewShot": 4}], "fewShot": [0, 4]})
    a_spec({"require": [{"metric": "preference_accuracy", "min": 0.6}]}, "dpo")
    a_spec({"require": [{"metric": "preference_accuracy", "min": 0.6}]}, "reward")
    a_spec({"require": [{"metric": "prompt_level_strict_acc", "min": 0.6}], "rules": [{"type": "regex", "pattern": "^yes"}]})
    a_spec({"require": [{"metric": "win_rate", "min": 0.6}], "judge": JUDGE | {"apiKeySecret": "judge"}})
    of_task = {"require": [{"metric": "acc", "task": "words", "min": 0.5}], "tasks": [{"name": "words", "uri": "s3://b-1/t/"}]}
    assert left_out(a_spec(of_task, testFraction=0.0).evaluation, Objective.SFT, test_examples=0) == "", "tasks need no rows to test with"
    assert without_test_rows(a_spec(of_task).evaluation, test_examples=0) == ""
    test_source = {"uri": "s3://b-1/test.jsonl", "split": "test"}
    a_spec({"require": [EXACT]}, testFraction=0.0, sources=[{"uri": "s3://b-1/rows.jsonl"}, test_source])
    read_spec({**SMALLEST, "dataset": {"ref": "support-v1"}, "evaluation": {"require": [EXACT]}})


def found(metric: str, tuned: float, base: float | None = None, task: str = "test") -> Measured:
    return Measured(task=task, metric=metric, base=base, tuned=tuned)


JUDGED: dict[str, tuple[dict[str, Any], Measured, str]] = {
    "reached": (EXACT, found("exact_match", 0.8), ""),
    "missed": (EXACT, found("exact_match", 0.75), "exact_match is 0.75, and at least 0.8 is required"),
    "too much": ({"metric": "loss", "max": 2}, found("loss", 2.5), "loss is 2.5, and at most 2 is required"),
    "lower is better": ({"metric": "loss", "betterThanBase": True}, found("loss", 1.0, 2.0), ""),
    "a task's": ({"metric": "acc", "task": "words", "fewShot": 2, "min": 0.5}, found("acc", 0.6, task="words-2-shot"), ""),
    "lower is better of a task": (
        {"metric": "ter,first", "task": "words", "betterThanBase": True},
        found("ter,first", 3.0, 2.0, task="words"),
        "ter,first of words is 3, and must be better",
    ),
    "no better": ({"metric": "loss", "betterThanBase": True}, found("loss", 2.0, 2.0), "must be better than the base model's, which is 2"),
    "worse": ({"metric": "f1", "betterThanBase": True}, found("f1", 0.1, 0.2), "f1 is 0.1, and must be better"),
    "better": ({"metric": "f1", "betterThanBase": True}, found("f1", 0.3, 0.2), ""),
    "no base": ({"metric": "f1", "betterThanBase": True}, found("f1", 0.3), "which is not measured"),
    "not measured": ({"metric": "accuracy", "min": 0.1}, found("f1", 0.3), "accuracy is required and was not measured"),
    "of another task": (EXACT, found("exact_match", 1.0, task="test-2-shot"), "was not measured"),
    "no number": (EXACT, found("exact_match", float("nan")), "is nan"),
}


@pytest.mark.parametrize(("required", "measured", "said"), JUDGED.values(), ids=JUDGED)
def test_a_requirement_is_met_or_missed_in_words(required: dict[str, Any], measured: Measured, said: str) -> None:
    told = missed([Requirement.model_validate(required)], [measured])
    assert len(told) == bool(said)
    assert said in "".join(told)


def test_without_rows_to_test_with_nothing_is_measured_and_nothing_can_be_required() -> None:
    plain, strict = Evaluation(), Evaluation.model_validate({"require": [EXACT]})
    assert left_out(plain, Objective.SFT, test_examples=5) == ""
    assert "no rows to test with" in left_out(plain, Objective.SFT, test_examples=0)
    assert "enabled is false" in left_out(Evaluation(enabled=False), Objective.SFT, test_examples=5)
    assert without_test_rows(plain, test_examples=0) == without_test_rows(strict, test_examples=1) == ""
    assert "the prepared data has none" in without_test_rows(strict, test_examples=0)
    assert Dataset.model_validate({"ref": "x"}).has_test is False


def test_last_words_hold_as_many_metrics_as_there_is_room_for() -> None:
    metrics = [found(name.value, 0.123456, 0.654321, task=f"test-{number}-shot{'x' * 40}") for number in (1, 2) for name in MetricName][:32]
    status = EvaluationStatus(metrics=(metrics * 2)[:32], examples=200, report_uri="s3://b/" + "r" * 500)
    outcome = Outcome(error=Failed(code=FailureCode.QUALITY_TOO_LOW, message="m" * 900), evaluation=status)
    text = outcome.bounded()
    assert len(text.encode()) <= MAX_TERMINATION_BYTES
    told = Outcome.model_validate_json(text)
    assert told.evaluation is not None
    assert told.error is not None
    assert told.evaluation.metrics == metrics[: len(told.evaluation.metrics)]
    assert len(told.evaluation.metrics) > 10
    assert len(told.error.message) > 400
