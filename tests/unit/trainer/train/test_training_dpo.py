"""Learning from preferences: what the loss is made of, and whole attempts on tiny models. Beside TRL: test_training_golden.py."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.models import tiny_model
from tests.support.preferences import CPU, NO_DROPOUT, accumulated, adapted, rows_of
from tests.support.training import (
    a_job,
    documents,
    history,
    pairs,
    publish_data,
    stop_in_step,
    train_here,
    weights_digest,
)
from tests.support.trl_preferences import METRICS
from tunewright_crds.pod import PodConfig
from tunewright_crds.preference import Dpo as Options
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import data, dpo
from tunewright_trainer.train.attention import documents as isolated
from tunewright_trainer.train.dpo import Dpo, Whole, likelihoods, reference
from tunewright_trainer.train.dpo_losses import Documents
from tunewright_trainer.train.model import Tuned, load
from tunewright_trainer.train.reinforced import Reference

SHORT = {"batchSize": 4, "epochs": 2, "learningRate": 0.01}


def job(**parts: Any) -> PodConfig:
    parts["method"] = {"objective": "dpo"} | parts.get("method", {})
    return a_job(**parts)


def test_accumulated_is_at_once() -> None:
    """The mean over pairs, not over tokens: long answers weigh no more."""
    made, tuned = pairs(9, seed=2), adapted()
    objective = Dpo(Options(beta=0.1, label_smoothing=0.2), Reference(tuned))
    at_once = accumulated(tuned, made, objective, each=9)
    assert at_once[0]["loss"] == pytest.approx(np.mean([accumulated(tuned, [row], objective, each=1)[0]["loss"] for row in made]), abs=1e-6)
    for each in (1, 4):
        parts = accumulated(tuned, made, objective, each=each)
        assert parts[0] == pytest.approx(at_once[0], abs=1e-5)
        torch.testing.assert_close(parts[1], at_once[1], atol=1e-6, rtol=1e-4)


def test_the_loss_is_that_of_the_formula() -> None:
    policy, before = torch.tensor([-3.0, -5.0, -4.0, -2.0]), torch.tensor([-3.5, -4.0, -3.0, -2.0])
    # Log-ratios: +0.5 and -1 in the first pair, -1 and 0 in the second.
    none = Reference(adapted())  # which the loss itself does not ask
    said, both = Documents(policy, policy, torch.full((4,), 3)), Whole(pairs=1, tokens=6)
    plain, told = Dpo(Options(beta=0.5), none).measured(said, before, both)
    expected = [math.log(1 + math.exp(-0.75)), math.log(1 + math.exp(0.5))]
    assert float(plain) == pytest.approx(sum(expected))
    wanted = {"loss": sum(expected), "rewards/chosen": -0.25, "rewards/rejected": -0.5, "rewards/accuracies": 1, "rewards/margins": 0.25}
    assert told == pytest.approx(wanted | {"logps/chosen": -7, "logps/rejected": -7})
    doubted, _ = Dpo(Options(beta=0.5, label_smoothing=0.1), none).measured(said, before, both)
    turned = [math.log(1 + math.exp(0.75)), math.log(1 + math.exp(-0.5))]
    assert float(doubted) == pytest.approx(0.9 * sum(expected) + 0.1 * sum(turned))


def test_a_look_at_the_whole_batch_sees_the_dropout_that_the_gradient_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at before the gradient, where a loss couples pairs, is what the gradient is then of."""
    config = job(method={"dpo": {"loss": "aot"}, "lora": {"dropout": 0.5}}, hyperparameters=SHORT | {"maxSteps": 3, "microBatchSize": 2})
    store, seen = LocalStore(tmp_path / "store"), []
    plain = dpo.likelihoods

    def watched(tuned: Tuned, batch: data.MicroBatch, *, tail: float | None = None) -> Documents:
        found = plain(tuned, batch, tail=tail)
        if tuned.network.training:
            seen.append(found.logps.detach().clone())
        return found

    monkeypatch.setattr(dpo, "likelihoods", watched)
    publish_data(store, tmp_path, train=pairs(12))
    train_here(config, store, tmp_path)
    steps = [seen[start : start + 4] for start in range(0, 12, 4)]
    assert all(torch.equal(torch.cat(step[:2]), torch.cat(step[2:])) for step in steps)
    assert not torch.equal(steps[0][0], steps[1][0])


def test_each_document_is_summed_by_itself() -> None:
    tuned = adapted()
    tuned.network.eval()
    made = [*pairs(3), documents(2, seed=5)]
    batch = data.micro_batch(rows_of(made), CPU)
    with isolated(batch.segments), torch.no_grad():
        together = likelihoods(tuned, batch).logps
    for row, found in zip([[one] for both in made for one in both], together, strict=True):
        alone = data.micro_batch(rows_of([row]), CPU)
        with isolated(alone.segments), torch.no_grad():
            assert float(found) == pytest.approx(float(likelihoods(tuned, alone).logps[0]), abs=1e-4)


def test_the_reference_is_the_base_without_dropout_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    plain = load(tiny_model("gpt2"), a_job(method={"tuner": "full"}).spec)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("gpt2"), folder)
    settings = json.loads((folder / "config.json").read_text()) | {"resid_pdrop": 0.5}
    (folder / "config.json").write_text(json.dumps(settings))
    tuned, batch = load(folder, job(method={"lora": {"dropout": 0.5}}).spec), data.micro_batch(rows_of(pairs(2)), CPU)
    with torch.no_grad():
        for weight in tuned.trainable.values():
            weight.add_(0.1)
    tuned.network.train()
    names = list(tuned.trainable)
    found = reference(Reference(tuned), batch)
    assert list(tuned.trainable) == names
    assert tuned.network.training
    with isolated(batch.segments), torch.no_grad():
        torch.testing.assert_close(found, likelihoods(plain, batch).logps, atol=1e-4, rtol=0)
        assert not torch.allclose(found, likelihoods(tuned, batch).logps, atol=1e-1), "dropout and adapter are there again"


@pytest.mark.parametrize(("tuner", "rate"), [("lora", 0.003), ("full", 0.001)])
def test_preferences_are_learned(tmp_path: Path, tuner: str, rate: float) -> None:
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=pairs(32), validation=pairs(8, seed=9))
    options = {"batchSize": 8, "epochs": 8, "learningRate": rate, "warmupRatio": 0}
    outcome = train_here(
        job(hyperparameters=options, method={"tuner": tuner} | ({"lora": NO_DROPOUT} if tuner == "lora" else {})), store, tmp_path
    )
    lines = history(store)
    told, evaluated = ([line for line in lines if name in line] for name in ("loss", "eval_loss"))
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "nothing is preferred before the first step"
    assert told[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    last_pass = told[-4:]
    assert np.mean([line["rewards/accuracies"] for line in last_pass]) > 0.9
    margins = [np.mean([line["rewards/margins"] for line in told[start : start + 4]]) for start in range(0, 32, 4)]
    assert margins == sorted(margins)
    assert margins[-1] > 0.1
    assert set(told[0]) >= {"step", "grad_norm", "learning_rate", "epoch", "num_tokens", "tokens_per_second", *METRICS}
    assert evaluated[-1].keys() == {"step", "eval_loss", *(f"eval_{name}" for name in METRICS)}
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] < math.log(2)
    assert outcome.best_checkpoint is not None
    assert outcome.best_checkpoint.value == min(line["eval_loss"] for line in evaluated)
    assert outcome.artifact is not None
    card = (Path(outcome.artifact.uri) / "README.md").read_text()
    assert "Objective: dpo" in card
    assert "| rewards/margins |" in card


@pytest.mark.parametrize(
    ("stop_after", "method"), [(1, {"dpo": {"loss": "sigmoid"}}), (3, {"dpo": {"loss": "aot"}}), (3, {"tuner": "full"})]
)
def test_a_stopped_run_goes_on_at_the_exact_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, method: dict[str, Any]
) -> None:
    """With the dropout of every day, which must be drawn anew as it was."""
    config = job(method=method, hyperparameters=SHORT | {"earlyStopping": {"enabled": True}}, checkpointing={"everySteps": 100})
    store, undisturbed = LocalStore(tmp_path / "store"), LocalStore(tmp_path / "undisturbed")
    for one in (store, undisturbed):
        publish_data(one, tmp_path, train=pairs(12), validation=pairs(3, seed=9))
    expected = weights_digest(train_here(config, undisturbed, tmp_path))
    with monkeypatch.context() as patch:
        stop_in_step(patch, stop_after)
        with pytest.raises(process.Stopped):
            train_here(config, store, tmp_path)
    outcome = train_here(config, store, tmp_path, attempt=2)
    assert (outcome.resumed_from_step, outcome.reached_step) == (stop_after, 6)
    assert weights_digest(outcome) == expected
    found = {line["step"]: line["loss"] for attempt in (1, 2) for line in history(store, attempt) if "loss" in line}
    assert found == {line["step"]: line["loss"] for line in history(undisturbed) if "loss" in line}


def test_early_stopping_returns_the_weights_that_validate_best(tmp_path: Path) -> None:
    """What is validated with prefers the other way round: each step makes it worse, so that the first evaluation is the best."""
    turned = [list(reversed(row)) for row in pairs(6, seed=9)]
    options = {"batchSize": 4, "learningRate": 0.01, "warmupRatio": 0, "scheduler": "constant"}
    store, other = LocalStore(tmp_path / "store"), LocalStore(tmp_path / "other")
    for one in (store, other):
        publish_data(one, tmp_path, train=pairs(12), validation=turned)
    stopping = train_here(job(hyperparameters=options | {"epochs": 8, "earlyStopping": {"enabled": True, "patience": 2}}), store, tmp_path)
    assert stopping.best_checkpoint is not None
    assert (stopping.best_checkpoint.step, stopping.reached_step) == (3, 9)
    until_best = train_here(job(hyperparameters=options | {"maxSteps": 3}), other, tmp_path)
    assert weights_digest(stopping) == weights_digest(until_best)


def test_recomputed_activations_and_halved_micro_batches_compute_the_same(tmp_path: Path) -> None:
    found = []
    for number, (halvings, more) in enumerate([(0, {}), (1, {}), (5, {}), (0, {"gradientCheckpointing": True})]):
        store = LocalStore(tmp_path / f"store-{number}")
        publish_data(store, tmp_path, train=pairs(12))
        train_here(
            job(hyperparameters=SHORT | {"microBatchSize": 4} | more, method={"lora": NO_DROPOUT}), store, tmp_path, halvings=halvings
        )
        found.append([line["loss"] for line in history(store)])
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)
