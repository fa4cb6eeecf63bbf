"""Every optimizer: it learns, goes on exactly where it was stopped, and does what its name says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.training import a_job, documents, history, packed, publish_data, stop_in_step, train_here, weights_digest
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.hyperparameters import WITHIN_BACKWARD, Hyperparameters, Optimizer
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import optimizers
from tunewright_trainer.train.data import Row as Prepared
from tunewright_trainer.train.data import micro_batch
from tunewright_trainer.train.loss import backward
from tunewright_trainer.train.model import load

ROWS = packed(documents(16, longest=16), 2)
RATES = {
    Optimizer.ADAMW: 0.005,
    Optimizer.ADAFACTOR: 0.005,
    Optimizer.SGD: 0.2,
    Optimizer.GALORE: 0.02,
    Optimizer.LOMO: 0.5,
    Optimizer.ADALOMO: 0.1,
}


def a_tuning(optimizer: Optimizer, **more: Any) -> Any:
    numbers = {
        "optimizer": optimizer.value,
        "batchSize": 4,
        "epochs": 3,
        "learningRate": RATES[optimizer],
        "warmupRatio": 0,
        "weightDecay": 0.01,
    }
    if optimizer is Optimizer.GALORE:
        numbers["galore"] = {"rank": 4, "updateEvery": 2}
    return a_job(method={"tuner": "full"}, hyperparameters=numbers | more)


def with_data(work: Path, name: str) -> LocalStore:
    store = LocalStore(work / name)
    publish_data(store, work, train=ROWS)
    return store


@pytest.mark.parametrize("optimizer", Optimizer)
def test_an_optimizer_learns_and_resumes_exactly(optimizer: Optimizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_tuning(optimizer)
    undisturbed = with_data(tmp_path, "undisturbed")
    outcome = train_here(job, undisturbed, tmp_path)
    losses = [line["loss"] for line in history(undisturbed) if "loss" in line]
    assert sum(losses[-2:]) < sum(losses[:2]) - 0.05, "the last pass over the same rows is easier than the first"

    store = with_data(tmp_path, "stopped")
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(process.Stopped):
            train_here(job, store, tmp_path)
    resumed = train_here(job, store, tmp_path, attempt=2)
    assert resumed.resumed_from_step == 3
    assert weights_digest(resumed) == weights_digest(outcome)


def _authors_lomo(network: Any) -> Any:
    from lomo_optim import Lomo

    return Lomo(network, clip_grad_norm=0.5, weight_decay=0.0)


def _authors_adalomo(network: Any) -> Any:
    from lomo_optim import AdaLomo

    return AdaLomo(network, clip_grad_norm=0.5, weight_decay=0.0)


AUTHORS: dict[Optimizer, Callable[[Any], Any]] = {Optimizer.LOMO: _authors_lomo, Optimizer.ADALOMO: _authors_adalomo}


@pytest.mark.parametrize("optimizer", AUTHORS)
def test_updates_within_the_backward_pass_are_those_of_their_authors(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # AdaLomo's own code asks for a GPU
    job = a_tuning(optimizer, maxGradNorm=0.5, weightDecay=0.0).spec
    ours, theirs = load(tiny_model("llama"), job), load(tiny_model("llama"), job)
    mine, other = optimizers.updates(ours, job.hyperparameters), AUTHORS[optimizer](theirs.network)
    for ids, labels in documents(3):
        row = Prepared(torch.tensor(ids).numpy(), torch.tensor(labels).numpy(), [len(ids)])
        batch = micro_batch([row], ours.device)

        def once(batch: Any = batch) -> dict[str, float]:
            return {"loss": backward(ours, batch, share_of=len(batch.targets), smoothing=0.0)}

        mine.take(once, lambda *_: None, rate=RATES[optimizer])

        def loss(batch: Any = batch) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(theirs.logits(batch), batch.targets)

        other.grad_norm(loss())
        other.fused_backward(loss(), RATES[optimizer])
    for name, weight in ours.trainable.items():
        torch.testing.assert_close(weight, theirs.trainable[name], atol=2e-5, rtol=1e-4, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("optimizer", WITHIN_BACKWARD)
@pytest.mark.parametrize("most", [0, 0.5], ids=["unclipped", "clipped"])
def test_no_gradients_are_held(optimizer: Optimizer, most: float) -> None:
    spec = a_tuning(optimizer, maxGradNorm=most).spec
    tuned = load(tiny_model("llama"), spec)
    held: list[int] = []
    for weight in tuned.trainable.values():
        weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda _: held.append(sum(weight.grad is not None for weight in tuned.trainable.values()))
        )
    updates = optimizers.updates(tuned, spec.hyperparameters)
    ids, labels = documents(1)[0]
    batch = micro_batch([Prepared(torch.tensor(ids).numpy(), torch.tensor(labels).numpy(), [len(ids)])], tuned.device)
    passes = []

    def once() -> dict[str, float]:
        passes.append(1)
        return {"loss": backward(tuned, batch, share_of=10, smoothing=0.0)}

    measured = updates.take(once, lambda *_: None, rate=0.01)
    assert measured["grad_norm"] > 0
    assert len(passes) == (2 if most else 1)
    assert max(held) == 1
    assert not [name for name, weight in tuned.trainable.items() if weight.grad is not None]


def test_a_batch_that_has_to_go_at_once_is_not_split(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="takes the whole batch at once") as caught:
        train_here(a_tuning(Optimizer.LOMO), with_data(tmp_path, "store"), tmp_path, halvings=1)
    assert (caught.value.code, caught.value.param) == (FailureCode.CONFIG_INVALID, "spec.hyperparameters.batchSize")


def test_a_loss_that_is_no_number_ends_the_run_before_weights_are_saved() -> None:
    spec = a_tuning(Optimizer.LOMO, maxGradNorm=1).spec
    tuned = load(tiny_model("llama"), spec)
    before = {name: weight.clone() for name, weight in tuned.trainable.items()}

    def check(loss: float, norm: float) -> None:
        raise FloatingPointError(loss, norm)

    with pytest.raises(FloatingPointError):
        optimizers.updates(tuned, Hyperparameters(optimizer=Optimizer.LOMO)).take(lambda: {"loss": float("nan")}, check, rate=0.1)
    assert all(torch.equal(weight, before[name]) for name, weight in tuned.trainable.items())
