"""Several processes that train one model compute what one process computes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_model
from tests.support.trainer_runs import Attempts, Nursery
from tests.support.training import DIGEST, a_job, documents, history, packed, pairs, publish_data
from tunewright_crds.errors import ExitCode
from tunewright_trainer.storage import LocalStore

SHORT = {"batchSize": 4, "epochs": 2, "learningRate": 0.01, "evaluationsPerEpoch": 1}
NO_DROPOUT = {"dropout": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "an adapter, over a copy of the base each": {"method": {"lora": NO_DROPOUT}},
    "an adapter, over a base that is spread": {"method": {"lora": NO_DROPOUT}, "resources": {"sharding": "full"}},
    "every weight, spread": {"method": {"tuner": "full"}},
    "every weight, a copy each": {"method": {"tuner": "full"}, "resources": {"sharding": "none"}},
    "preferences": {"method": {"objective": "dpo", "lora": NO_DROPOUT}},
    "preferences, over a base that is spread": {"method": {"objective": "dpo", "lora": NO_DROPOUT}, "resources": {"sharding": "full"}},
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


def prepared(work: Path, *, preferences: bool = False) -> Attempts | None:
    rows = pairs(12) if preferences else packed(documents(24), 2)
    validation = pairs(4, seed=9) if preferences else packed(documents(6, seed=9), 2)
    publish_data(LocalStore(work / "store"), work, train=rows, validation=validation)
    return None


def measured(work: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if not name.endswith("_per_second")} for line in history(LocalStore(work / "store"))
    ]


@pytest.mark.parametrize("parts", CASES.values(), ids=CASES)
def test_two_processes_compute_what_one_does(nursery: Nursery, tmp_path: Path, parts: dict[str, Any]) -> None:
    job = a_job(tiny_model(), hyperparameters=SHORT, **parts)
    told = []
    for size in (1, 2):
        work = tmp_path / str(size)
        prepared(work, preferences="objective" in parts["method"])
        attempts = Attempts(nursery, work)
        assert attempts.run(job, attempt=1, digest=DIGEST, processes=size) == ExitCode.DONE
        assert attempts.outcome().artifact is not None  # which was loaded again and compared with what was trained
        told.append(measured(work))
    assert len(told[0]) == len(told[1])
    for alone, together in zip(*told, strict=True):
        assert together == pytest.approx(alone, abs=1e-5)
