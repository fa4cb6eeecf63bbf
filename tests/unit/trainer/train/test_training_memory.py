"""A job that is too big for its memory trains in smaller pieces, to the same end, and says so."""

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import DIGEST, a_job, documents, history, publish_data, train_here, write_rows
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.storage import dataset_key
from tunewright_trainer.plan import memory
from tunewright_trainer.storage import LocalStore, publish_folder
from tunewright_trainer.train import data

ROWS = [[document] for document in documents(16, longest=400)]
LONGEST = max(len(ids) for row in ROWS for ids, _ in row)
STEPS = {"batchSize": 16, "maxSteps": 2, "learningRate": 1e-3}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Prepared data whose manifest tells of its rows, as `prepare` writes it."""
    made = LocalStore(tmp_path / "store")
    publish_data(made, tmp_path, train=ROWS)
    write_rows(tmp_path / "told" / "train", ROWS)
    train = {"tokens": 1000, "trainable_tokens": 500, "longest_row": LONGEST, "most_learned": LONGEST // 2}
    publish_folder(made, tmp_path / "told", dataset_key("team-a", DIGEST), manifest={"licenses": [], "splits": {"train": train}})
    return made


def plan_so_small(patch: pytest.MonkeyPatch) -> None:
    """A process of so few libraries, and so many tokens a micro-batch, that these are what memory goes to."""
    patch.setattr(memory, "LIBRARIES_CPU", 0)


def test_a_micro_batch_that_does_not_fit_is_halved_before_it_runs_out(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan_so_small(monkeypatch)
    caplog.set_level(logging.INFO)
    groups: list[int] = []
    plain = data.micro_batch

    def noted(rows: Any, device: Any) -> Any:
        groups.append(sum(len(row.input_ids) for row in rows))
        return plain(rows, device)

    monkeypatch.setattr(data, "micro_batch", noted)
    losses, largest = [], []
    for number, limit in enumerate(("64Mi", "32Mi"), start=1):
        groups.clear()
        train_here(
            a_job(hyperparameters=STEPS, method={"lora": {"dropout": 0}}, resources={"memory": limit}), store, tmp_path, attempt=number
        )
        losses.append([line["loss"] for line in history(store, number)])
        largest.append(max(groups))
        store.delete([info.key for info in store.list("") if "/checkpoints/" in info.key])
    assert largest[1] <= memory.AUTO_MICRO_TOKENS // 2 < largest[0] <= memory.AUTO_MICRO_TOKENS
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert "halved 1 x to fit" in caplog.text
    assert "peak memory" in caplog.text


def test_a_job_that_does_not_fit_is_refused_before_its_model_is_loaded(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunewright_trainer.train.recipe.train", lambda *_, **__: pytest.fail("it was trained"))
    job = a_job(hyperparameters=STEPS, resources={"memory": "512Mi"})
    with pytest.raises(Refusal) as caught:
        train_here(job, store, tmp_path)
    assert (caught.value.code, caught.value.param) == (FailureCode.MEMORY_TOO_SMALL, "spec.resources.memory")
