"""Learning from marked answers: whole attempts on tiny models. Beside TRL: test_training_golden.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.preferences import NO_DROPOUT
from tests.support.training import a_job, history, marked, publish_data, stop_in_step, train_here, weights_digest
from tunewright_crds.pod import PodConfig
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore

METRICS = {"kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}


def job(**parts: Any) -> PodConfig:
    parts["method"] = {"objective": "kto"} | parts.get("method", {})
    return a_job(**parts)


@pytest.mark.parametrize(("tuner", "rate"), [("lora", 0.003), ("full", 0.001)])
def test_good_answers_become_likelier_and_bad_ones_less_so(tmp_path: Path, tuner: str, rate: float) -> None:
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=marked(24), validation=marked(4, seed=9))
    options = {"batchSize": 8, "epochs": 6, "learningRate": rate, "warmupRatio": 0}
    outcome = train_here(
        job(hyperparameters=options, method={"tuner": tuner} | ({"lora": NO_DROPOUT} if tuner == "lora" else {})), store, tmp_path
    )
    lines = history(store)
    told, evaluated = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    assert told[0]["loss"] == pytest.approx(0.5, abs=1e-5), "nothing is preferred before the first step"
    assert (told[0]["kl"], told[0]["rewards/margins"]) == pytest.approx((0, 0), abs=1e-5)
    assert np.mean([line["rewards/chosen"] for line in told[-6:]]) > 0 > np.mean([line["rewards/rejected"] for line in told[-6:]])
    assert evaluated[-1].keys() == {"step", "eval_loss", *(f"eval_{name}" for name in METRICS)}
    assert evaluated[-1]["eval_rewards/chosen"] > 0 > evaluated[-1]["eval_rewards/rejected"]
    assert evaluated[-1]["eval_logps/rejected"] < evaluated[0]["eval_logps/rejected"]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] < 0.5
    assert outcome.artifact is not None
    assert "Objective: kto" in (Path(outcome.artifact.uri) / "README.md").read_text()


@pytest.mark.parametrize(
    ("loss", "batch", "stop", "steps", "last"),
    [("kto", 4, 3, 6, ">"), ("kto", 23, 1, 2, "="), ("apo_zero_unpaired", 1, 3, 24, "=")],
    ids=["whole batches", "a last batch of one answer, which is compared with none", "one answer at a time"],
)
def test_a_stopped_run_goes_on_at_the_exact_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, batch: int, stop: int, steps: int, last: str
) -> None:
    options = {"batchSize": batch, "epochs": 2, "learningRate": 0.01, "earlyStopping": {"enabled": True, "patience": 9}}
    config = job(hyperparameters=options, method={"kto": {"loss": loss}}, checkpointing={"everySteps": 100})
    store, undisturbed = LocalStore(tmp_path / "store"), LocalStore(tmp_path / "undisturbed")
    for one in (store, undisturbed):
        publish_data(one, tmp_path, train=marked(6), validation=marked(2, seed=9))
    expected = weights_digest(train_here(config, undisturbed, tmp_path))
    with monkeypatch.context() as patch:
        stop_in_step(patch, stop)
        with pytest.raises(process.Stopped):
            train_here(config, store, tmp_path)
    outcome = train_here(config, store, tmp_path, attempt=2)
    assert (outcome.resumed_from_step, outcome.reached_step) == (stop, steps)
    assert weights_digest(outcome) == expected
    told = [line["kl"] for line in history(store, 2) if "loss" in line]
    assert (told[-1] > 0) == (last == ">")
