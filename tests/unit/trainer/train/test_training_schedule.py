"""Steps, rates and rhythms of a job."""

import pytest

from tests.support.training import a_job
from tunewright_trainer.process import thread_count
from tunewright_trainer.train.schedule import Plan, plan


def a_plan(rows: int = 100, **hyperparameters: object) -> Plan:
    return plan(a_job(hyperparameters=hyperparameters).spec, rows)


@pytest.mark.parametrize(
    ("rows", "hyperparameters", "steps", "last_batch"),
    [
        pytest.param(100, {"epochs": 1, "batchSize": 10}, 10, 10, id="whole batches"),
        pytest.param(105, {"epochs": 1, "batchSize": 10}, 11, 5, id="the last batch of a job is smaller"),
        pytest.param(105, {"epochs": 2, "batchSize": 10}, 21, 10, id="a batch goes on into the next pass"),
        pytest.param(3, {"epochs": 0.1, "batchSize": 10}, 1, 1, id="at least one sample"),
        pytest.param(3, {"maxSteps": 7, "batchSize": 10}, 7, 10, id="maxSteps wins"),
    ],
)
def test_steps(rows: int, hyperparameters: dict[str, object], steps: int, last_batch: int) -> None:
    made = a_plan(rows, **hyperparameters)
    assert made.max_steps == steps
    assert len(made.positions(steps)) == last_batch
    samples = [position for step in range(1, steps + 1) for position in made.positions(step)]
    assert samples == list(range(made.samples))


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", {1: 0.005, 2: 0.01, 3: 0.01, 10: 0.01}),
        ("linear", {1: 0.005, 2: 0.01, 3: 0.01, 7: 0.005, 10: 0.00125}),
        ("cosine", {1: 0.005, 2: 0.01, 3: 0.01, 7: 0.005, 10: 0.00038060233744356625}),
    ],
)
def test_rates(scheduler: str, rates: dict[int, float]) -> None:
    made = a_plan(epochs=1, batchSize=10, learningRate=0.01, warmupRatio=0.2, scheduler=scheduler)
    assert {step: made.learning_rate(step) for step in rates} == pytest.approx(rates)


def test_automatic_rates_depend_on_the_tuner() -> None:
    assert a_plan().peak_rate == 2e-4
    assert plan(a_job(method={"objective": "dpo"}).spec, 10).peak_rate == 5e-6
    assert plan(a_job(method={"objective": "dpo", "tuner": "full"}).spec, 10).peak_rate == 1e-6
    assert plan(a_job(method={"tuner": "full"}).spec, 100).peak_rate == 2e-5
    assert plan(a_job(method={"tuner": "ia3"}).spec, 100).peak_rate == 3e-3
    assert plan(a_job(method={"tuner": "full"}, hyperparameters={"optimizer": "adalomo"}).spec, 100).peak_rate == 5e-4


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [("auto", 100, 5), ("auto", 4, 1), ("auto", 100_000, 500), (7, 100, 7)],
)
def test_checkpoints_are_about_twenty_and_never_rare(every: int | str, steps: int, expected: int) -> None:
    job = a_job(checkpointing={"everySteps": every}, hyperparameters={"maxSteps": steps})
    assert plan(job.spec, 100).save_every == expected


def test_evaluations_come_so_often_a_pass_and_at_the_end() -> None:
    made = a_plan(100, batchSize=10, epochs=2.5, evaluationsPerEpoch=2)
    assert [step for step in range(1, made.max_steps + 1) if made.evaluates(step)] == [5, 10, 15, 20, 25]


@pytest.mark.parametrize(("cpu", "threads"), [("2", 2), ("1500m", 2), ("100m", 1), ("0.5", 1), ("16", 16)])
def test_threads_come_from_the_job(cpu: str, threads: int) -> None:
    assert thread_count(cpu) == threads
