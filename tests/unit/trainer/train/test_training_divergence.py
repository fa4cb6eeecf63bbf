"""Losses that go astray: a run leaves out what led there, and ends as one that never saw it; kills in between change nothing."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.trainer_runs import Attempts, Nursery
from tests.support.training import DIGEST, a_job, documents, history, packed, poison, publish_data, train_here, weights_digest
from tunewright_crds.errors import ExitCode, FailureCode, Refusal
from tunewright_crds.hyperparameters import Divergence
from tunewright_crds.pod import Outcome
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import divergence, recipe
from tunewright_trainer.train.checkpoints import Counters

ROWS = packed(documents(48), 2)
SHORT = {"batchSize": 4, "maxSteps": 24, "learningRate": 0.01}


def trained(
    work: Path, name: str, *, method: dict[str, Any] | None = None, every: int = 3, **hyperparameters: Any
) -> tuple[Outcome, list[dict[str, Any]]]:
    """A run of its own, and its history."""
    store = LocalStore(work / name)
    publish_data(store, work, train=ROWS)
    job = a_job(method=method or {}, hyperparameters=SHORT | hyperparameters, checkpointing={"everySteps": every})
    return train_here(job, store, work), history(store)


def leaving_out(work: Path, monkeypatch: pytest.MonkeyPatch, steps: range, **hyperparameters: Any) -> Outcome:
    """A run that never sees these steps."""
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "Counters", partial(Counters, left_out=list(steps)))
        return trained(work, "leaving-out", **hyperparameters)[0]


LEFT_OUT: dict[str, tuple[list[int], range, dict[str, Any]]] = {
    "one poisoned batch": ([7], range(7, 8), {}),
    "two in a row: ten steps before are under suspicion, and are not in a checkpoint": ([14, 15], range(5, 16), {}),
    "two in a row, and no checkpoint far enough back": ([8, 9], range(1, 10), {"every": 100}),
    "two apart are two matters": ([3, 20], range(3, 21, 17), {}),
    "an optimizer within the backward pass, unclipped: the weights are spoiled": (
        [7],
        range(7, 8),
        {"method": {"tuner": "full"}, "optimizer": "lomo", "maxGradNorm": 0, "learningRate": 0.001},
    ),
}


@pytest.mark.parametrize(("poisoned", "left_out", "parts"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_run_goes_back_and_ends_as_one_that_never_saw_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: list[int], left_out: range, parts: dict[str, Any]
) -> None:
    expected = leaving_out(tmp_path, monkeypatch, left_out, **parts)
    poison(monkeypatch.setattr, poisoned)
    outcome, told = trained(tmp_path, "poisoned", **parts)
    assert (outcome.reached_step, outcome.resumed_from_step, outcome.rollbacks) == (24, 0, len(poisoned))
    assert weights_digest(outcome) == weights_digest(expected)
    assert told[-1]["rollbacks"] == len(poisoned)
    assert all(np.isfinite(line["loss"]) for line in told)


def test_weights_that_were_spoiled_are_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 40 wrecks the weights; five steps later the loss is known to stay high."""
    longer = {"method": {"tuner": "full"}, "maxSteps": 54, "learningRate": 0.001, "every": 7}
    expected = leaving_out(tmp_path, monkeypatch, range(31, 46), **longer)
    plain = recipe.Run.step

    def wrecked(run: recipe.Run) -> None:
        plain(run)
        if run.counters.step == 40 and 40 not in run.counters.left_out:
            for weight in run.weights.values():
                weight.data *= 10

    monkeypatch.setattr(recipe.Run, "step", wrecked)
    outcome, told = trained(tmp_path, "wrecked", **longer)
    assert outcome.rollbacks == 1
    assert weights_digest(outcome) == weights_digest(expected)
    assert max(line["loss"] for line in told) > 4 * told[-1]["loss"]


@pytest.mark.parametrize(
    ("poisoned", "rule", "message"),
    [
        pytest.param([5], {"action": "fail"}, "loss nan at step 5", id="not wanted"),
        pytest.param([5, 8], {"maxRollbacks": 1}, "loss nan at step 8, after 1 roll-backs in a row", id="too often in a row"),
        pytest.param([14, 15, 16], {}, "loss nan at step 16; of 24 steps 16 would have to be left out", id="too much of the job"),
    ],
)
def test_what_is_not_cured_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: list[int], rule: dict[str, Any], message: str
) -> None:
    poison(monkeypatch.setattr, poisoned)
    with pytest.raises(Refusal) as caught:
        trained(tmp_path, "poisoned", divergence=rule)
    assert (caught.value.code, caught.value.param) == (FailureCode.LOSS_DIVERGED, "spec.hyperparameters.learningRate")
    assert caught.value.message == message


def test_a_learning_rate_that_is_far_too_high_ends_the_run(tmp_path: Path) -> None:
    wild = {"learningRate": 1.0, "optimizer": "sgd", "maxGradNorm": 0, "scheduler": "constant", "warmupRatio": 0, "maxSteps": 80}
    with pytest.raises(Refusal) as caught:
        trained(tmp_path, "wild", method={"lora": {"targetModules": "lm_head", "alpha": 512}}, every=20, **wild)
    assert caught.value.code is FailureCode.LOSS_DIVERGED
    assert caught.value.outcome.rollbacks == 3  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


HARM: dict[str, dict[str, int]] = {
    "stopped in the first": {"terminate_at_step": 14},
    "stopped in the second": {"terminate_at_step": 15},
    "killed as the checkpoint after it is written": {"kill_at_write": 31},
}


def test_kills_around_a_roll_back_change_nothing(nursery: Nursery, tmp_path: Path) -> None:
    job = a_job(hyperparameters=SHORT, checkpointing={"everySteps": 3})
    digests = {}
    for name, harm in {"nothing": {}, **HARM}.items():
        attempts = Attempts(nursery, tmp_path / name)
        publish_data(LocalStore(attempts.work / "store"), attempts.work, train=ROWS)
        codes = [attempts.run(job, attempt=1, digest=DIGEST, poisoned=[14, 15], **harm)]
        if harm:
            assert codes[0] != ExitCode.DONE, name
            assert attempts.run(job, attempt=2, digest=DIGEST, poisoned=[14, 15]) == ExitCode.DONE
        assert attempts.outcome().rollbacks == 2
        digests[name] = weights_digest(attempts.outcome())
    assert set(digests.values()) == {digests["nothing"]}


def test_two_processes_go_back_together(nursery: Nursery, tmp_path: Path) -> None:
    job = a_job(method={"tuner": "full"}, hyperparameters=SHORT, checkpointing={"everySteps": 3})
    attempts = Attempts(nursery, tmp_path)
    publish_data(LocalStore(attempts.work / "store"), attempts.work, train=ROWS)
    assert attempts.run(job, attempt=1, digest=DIGEST, poisoned=[14, 15], processes=2, terminate_at_step=20) == ExitCode.STOPPED
    assert attempts.run(job, attempt=2, digest=DIGEST, poisoned=[14, 15], processes=2) == ExitCode.DONE
    assert attempts.outcome().rollbacks == 2


RISING = {
    "as usual": ([1.0, 1.2] * 30, ""),
    "a hard batch": ([1.0, 1.2] * 30 + [9.0], ""),
    "four hard batches": ([1.0, 1.2] * 30 + [9.0] * 4, ""),
    "five": ([1.0, 1.2] * 30 + [9.0] * 5, "losses of 9 and more for 5 steps, where 1.1 was usual"),
    "five, of which one is as usual": ([1.0, 1.2] * 30 + [9.0, 9.0, 1.0, 9.0, 9.0], ""),
    "too soon to tell": ([1.0, 1.2] * 15 + [9.0] * 5, ""),
    "a mixture of easy and hard batches": ([0.1, 0.1, 0.1, 3.0] * 15 + [3.0] * 5, ""),
    "near nothing": ([1e-4] * 60 + [0.3] * 5, ""),
    "falling": ([10.0 - step / 8 for step in range(64)], ""),
}


@pytest.mark.parametrize(("losses", "told"), RISING.values(), ids=RISING)
def test_what_counts_as_risen(losses: list[float], told: str) -> None:
    counters = Counters()
    for loss in losses:
        divergence.remember(counters, loss)
    assert divergence.spike(counters.recent, Divergence().spike_factor) == told
    assert divergence.spike(counters.recent, 0.0) == ""


def test_each_time_in_a_row_goes_further_back() -> None:
    counters = Counters()
    again = partial(divergence.leave_out, counters, why="loss nan", rule=Divergence(), steps=1000)
    assert [again(step=step) for step in (200, 201, 209, 300)] == [199, 190, 188, 299]
    assert counters.left_out == [*range(189, 210), 300]
    assert again(step=305, risen=True) == 280
    assert counters.rollbacks == 5
