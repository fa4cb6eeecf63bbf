"""Whole attempts on tiny models: what a job's owner is promised."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models import Layout, tiny_model
from tests.support.training import a_job, documents, history, packed, publish_data, stop_in_step, train_here, weights_digest
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import loss, recipe

ROWS = packed(documents(24), 2)
VALIDATION = packed(documents(6, seed=9), 2)
SHORT = {"batchSize": 4, "epochs": 2, "learningRate": 0.01}

# Losses of the six steps; a change of them is a change of what users' jobs compute.
GOLDEN = {
    ("llama", "lora"): [5.563322, 5.568287, 5.558682, 5.491809, 5.503296, 5.486202],
    ("llama", "full"): [5.563322, 5.569372, 5.53342, 5.188346, 5.152303, 5.182271],
    ("gpt2", "lora"): [5.576453, 5.565301, 5.579576, 5.458244, 5.478054, 5.475918],
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=ROWS, validation=VALIDATION)
    return store


def losses(store: LocalStore, attempt: int = 1) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in history(store, attempt) if "loss" in line}


def refused(config: PodConfig, store: LocalStore, work: Path) -> Refusal:
    with pytest.raises(Refusal) as caught:
        train_here(config, store, work)
    return caught.value


@pytest.mark.parametrize(("layout", "tuner"), list(GOLDEN))
def test_golden_losses(store: LocalStore, tmp_path: Path, layout: Layout, tuner: str) -> None:
    outcome = train_here(a_job(tiny_model(layout), method={"tuner": tuner}, hyperparameters=SHORT), store, tmp_path)
    assert (outcome.resumed_from_step, outcome.reached_step) == (0, 6)
    assert list(losses(store).values()) == pytest.approx(GOLDEN[layout, tuner], abs=1e-5)


def test_a_run_learns_and_tells_the_fields_metrics(store: LocalStore, tmp_path: Path) -> None:
    outcome = train_here(a_job(hyperparameters=SHORT | {"epochs": 10}), store, tmp_path)
    told = history(store)
    assert told[-2]["loss"] < told[0]["loss"] - 0.1
    assert set(told[0]) >= {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "num_tokens",
        "tokens_per_second",
        "trained_tokens_per_second",
    }
    assert told[-1].keys() == {"step", "eval_loss", "eval_mean_token_accuracy"}
    assert outcome.best_checkpoint is not None
    assert outcome.best_checkpoint.value == min(line["eval_loss"] for line in told if "eval_loss" in line)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_run_goes_on_at_the_exact_step(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    job = a_job(hyperparameters=SHORT | {"earlyStopping": {"enabled": True}}, checkpointing={"everySteps": 100})
    undisturbed = LocalStore(tmp_path / "undisturbed")
    publish_data(undisturbed, tmp_path, train=ROWS, validation=VALIDATION)
    expected = weights_digest(train_here(job, undisturbed, tmp_path))

    with monkeypatch.context() as patch:
        stop_in_step(patch, stop_after)
        with pytest.raises(process.Stopped) as stopped:
            train_here(job, store, tmp_path)
    told = stopped.value.outcome
    assert told.reached_step == stop_after
    assert told.last_checkpoint is not None
    assert told.last_checkpoint.step == stop_after

    outcome = train_here(job, store, tmp_path, attempt=2)
    assert outcome.resumed_from_step == stop_after
    assert weights_digest(outcome) == expected
    assert losses(store) | losses(store, 2) == losses(undisturbed)


def test_a_finished_run_that_comes_by_again_trains_and_publishes_nothing(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(hyperparameters=SHORT)
    first = train_here(job, store, tmp_path)
    monkeypatch.setattr(recipe.Run, "step", lambda _: pytest.fail("a step was computed again"))
    second = train_here(job, store, tmp_path, attempt=2)
    assert second.artifact == first.artifact
    assert second.resumed_from_step == 6


def test_early_stopping_returns_the_best_weights(store: LocalStore, tmp_path: Path) -> None:
    """With an absurd learning rate the first evaluation is the best; the result must be that of a run that ends there."""
    wild = {"batchSize": 4, "learningRate": 0.5, "warmupRatio": 0, "scheduler": "constant", "epochs": 8}
    stopping = a_job(hyperparameters=wild | {"earlyStopping": {"enabled": True, "patience": 2}})
    outcome = train_here(stopping, store, tmp_path)
    best, reached = outcome.best_checkpoint, outcome.reached_step
    assert best is not None
    assert reached == best.step + 2 * 3  # two evaluations of three steps each without gain
    other = LocalStore(tmp_path / "other")
    publish_data(other, tmp_path, train=ROWS, validation=VALIDATION)
    until_best = train_here(a_job(hyperparameters=wild | {"maxSteps": best.step}), other, tmp_path)
    assert weights_digest(outcome) == weights_digest(until_best)


def test_a_gradient_that_is_no_number_ends_the_run(store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loss.backward
    monkeypatch.setattr(loss, "backward", lambda *args, **options: plain(*args, **options) * float("nan"))
    refusal = refused(a_job(hyperparameters=SHORT), store, tmp_path)
    assert (refusal.code, refusal.message) == (FailureCode.LOSS_DIVERGED, "loss nan at step 4, after 3 roll-backs in a row")


def test_out_of_memory_tells_how_far_the_run_was(store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> float:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(loss, "backward", no_memory)
    with pytest.raises(RuntimeError) as caught:
        train_here(a_job(hyperparameters=SHORT), store, tmp_path)
    assert process.as_refusal("train", caught.value).code is FailureCode.OUT_OF_MEMORY
    assert caught.value.outcome.reached_step == 0  # type: ignore[attr-defined]


def test_a_halved_micro_batch_computes_the_same(tmp_path: Path) -> None:
    found = []
    for halvings in (0, 1, 5):
        store = LocalStore(tmp_path / f"store-{halvings}")
        publish_data(store, tmp_path, train=ROWS)
        job = a_job(hyperparameters=SHORT | {"microBatchSize": 4}, method={"lora": {"dropout": 0}})
        train_here(job, store, tmp_path, halvings=halvings)
        found.append(list(losses(store).values()))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize(
    ("parts", "code", "param", "words"),
    [
        pytest.param(
            {"method": {"lora": {"targetModules": "q_proj,query"}}},
            FailureCode.CONFIG_INVALID,
            "spec.method.lora.targetModules",
            "no layer of the model is called query",
            id="a layer that is not there",
        ),
        pytest.param(
            {"resources": {"gpusPerNode": 1}},
            FailureCode.CONFIG_INVALID,
            "spec.resources.gpusPerNode",
            "none is usable",
            id="a GPU that is not there",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_field(
    store: LocalStore, tmp_path: Path, parts: dict[str, Any], code: FailureCode, param: str, words: str
) -> None:
    if torch.cuda.is_available():
        pytest.fail("these tests are for machines without a GPU")
    refusal = refused(a_job(hyperparameters=SHORT, **parts), store, tmp_path)
    assert (refusal.code, refusal.param) == (code, param)
    assert words in refusal.message


def test_missing_weights_are_refused(store: LocalStore, tmp_path: Path) -> None:
    partial = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), partial)
    weights = load_file(partial / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    refusal = refused(a_job(partial, hyperparameters=SHORT), store, tmp_path)
    assert refusal.code is FailureCode.MODEL_NOT_FOUND
    assert "model.layers.1.mlp.up_proj.weight" in refusal.message


def test_prepared_data_that_is_gone_is_told(tmp_path: Path) -> None:
    refusal = refused(a_job(hyperparameters=SHORT), LocalStore(tmp_path / "empty"), tmp_path)
    assert refusal.code is FailureCode.STORAGE_NOT_FOUND


def test_early_stopping_without_a_validation_row_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=ROWS)
    refusal = refused(a_job(hyperparameters=SHORT | {"earlyStopping": {"enabled": True}}), store, tmp_path)
    assert (refusal.code, refusal.param) == (FailureCode.CONFIG_INVALID, "spec.dataset.validationFraction")


def test_torch_is_left_as_it_was(store: LocalStore, tmp_path: Path) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    train_here(a_job(hyperparameters=SHORT, resources={"cpu": "2"}), store, tmp_path)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
