"""Several processes that train one model compute what one process computes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.support.models import tiny_model
from tests.support.rows import alpaca_rows
from tests.support.trainer_runs import Attempts, Nursery
from tests.support.training import DIGEST, a_job, documents, history, marked, packed, pairs, publish_data, weights_digest
from tunewright_crds.errors import ExitCode, FailureCode
from tunewright_crds.pod import Failed, Outcome
from tunewright_trainer.launch import cause
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import sharding
from tunewright_trainer.train.data import Row
from tunewright_trainer.train.world import World

SHORT = {"batchSize": 4, "epochs": 2, "learningRate": 0.01, "evaluationsPerEpoch": 1}
NO_DROPOUT = {"dropout": 0.0}
VOWELS = {"type": "regex", "pattern": "[aeiou]"}
REINFORCED = {
    "ppo": {"maxNewTokens": 5, "miniBatches": 2},
    "grpo": {"maxNewTokens": 5, "generations": 3, "beta": 0.1, "iterations": 2},
}
CASES: dict[str, dict[str, Any]] = {
    "an adapter, over a copy of the base each": {"method": {"lora": NO_DROPOUT}},
    "an adapter, over a base that is spread": {"method": {"lora": NO_DROPOUT}, "resources": {"sharding": "full"}},
    "every weight, spread": {"method": {"tuner": "full"}},
    "every weight, a copy each": {"method": {"tuner": "full"}, "resources": {"sharding": "none"}},
    "an adapter, over a base in 4 bits that is spread": {
        "method": {"tuner": "qlora", "lora": NO_DROPOUT},
        "resources": {"sharding": "full"},
    },
    "preferences": {"method": {"objective": "dpo", "lora": NO_DROPOUT}},
    "preferences, over a base that is spread": {"method": {"objective": "dpo", "lora": NO_DROPOUT}, "resources": {"sharding": "full"}},
    "preferences, compared over the batch": {"method": {"objective": "dpo", "dpo": {"loss": "aot"}, "lora": NO_DROPOUT}},
    "an encoder-decoder, spread": {"layout": "t5", "method": {"tuner": "full"}},
    "unpaired answers": {"method": {"objective": "kto", "lora": NO_DROPOUT}},
    **{
        f"rewards, by {objective}": {"method": {"objective": objective, "lora": NO_DROPOUT, objective: options, "rewards": [VOWELS]}}
        for objective, options in REINFORCED.items()
    },
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


ROWS: dict[str, tuple[list[Any], list[Any]]] = {
    "sft": (packed(documents(24), 2), packed(documents(6, seed=9), 2)),
    "t5": ([[(ids, ids[:5])] for ids, _ in documents(24)], [[(ids, ids[:5])] for ids, _ in documents(6, seed=9)]),
    "dpo": (pairs(12), pairs(4, seed=9)),
    "kto": (marked(6), marked(2, seed=9)),
    **dict.fromkeys(REINFORCED, (packed(documents(12, longest=16), 1), packed(documents(3, seed=9, longest=16), 1))),
}


def prepared(nursery: Nursery, work: Path, kind: str = "sft") -> Attempts:
    train, validation = ROWS[kind]
    publish_data(LocalStore(work / "store"), work, train=train, validation=validation)
    return Attempts(nursery, work)


def measured(attempts: Attempts, attempt: int = 1) -> list[dict[str, float]]:
    told = history(LocalStore(attempts.work / "store"), attempt)
    # How many values are beyond the clipping is decided by rounding where they have hardly changed.
    others = ("second", "peak_memory_bytes", "clipfrac")
    return [{name: value for name, value in line.items() if not any(other in name for other in others)} for line in told]


@pytest.mark.parametrize("parts", CASES.values(), ids=CASES)
def test_two_processes_compute_what_one_does(nursery: Nursery, tmp_path: Path, parts: dict[str, Any]) -> None:
    parts = dict(parts)
    layout, objective = parts.pop("layout", "llama"), parts["method"].get("objective", "sft")
    # A step of Adam is as long for a tiny gradient as for a great one, which makes rounding visible: shorter ones where several follow on one batch.
    job = a_job(tiny_model(layout), hyperparameters=SHORT | ({"learningRate": 0.001} if objective in REINFORCED else {}), **parts)
    told = []
    for size in (1, 2):
        attempts = prepared(nursery, tmp_path / str(size), layout if layout in ROWS else objective)
        assert attempts.run(job, attempt=1, digest=DIGEST, processes=size) == ExitCode.DONE
        assert attempts.outcome().artifact is not None  # which was loaded again and compared with what was trained
        told.append(measured(attempts))
    assert len(told[0]) == len(told[1])
    for alone, together in zip(*told, strict=True):
        assert together == pytest.approx(alone, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_stop_is_agreed_and_what_follows_is_what_would_have_been(nursery: Nursery, tmp_path: Path, tuner: str) -> None:
    """Only one process is told to stop, in the middle of a step. Early stopping takes part, dropout as well."""
    job = a_job(method={"tuner": tuner}, hyperparameters=SHORT | {"earlyStopping": {"enabled": True}}, checkpointing={"everySteps": 2})
    straight = prepared(nursery, tmp_path / "straight")
    assert straight.run(job, attempt=1, digest=DIGEST, processes=2) == ExitCode.DONE
    stopped = prepared(nursery, tmp_path / "stopped")
    assert stopped.run(job, attempt=1, digest=DIGEST, processes=2, terminate_at_step=3) == ExitCode.STOPPED
    assert stopped.outcome().reached_step == 3
    assert stopped.run(job, attempt=2, digest=DIGEST, processes=2) == ExitCode.DONE
    assert stopped.outcome().resumed_from_step == 3
    assert weights_digest(stopped.outcome()) == weights_digest(straight.outcome())


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=["from two processes to one", "from one to two"])
def test_another_number_of_processes_goes_on_with_the_same_samples(nursery: Nursery, tmp_path: Path, sizes: tuple[int, int]) -> None:
    job = a_job(method={"tuner": "full"}, hyperparameters=SHORT)
    alone = prepared(nursery, tmp_path / "alone")
    assert alone.run(job, attempt=1, digest=DIGEST) == ExitCode.DONE
    changing = prepared(nursery, tmp_path / "changing")
    assert changing.run(job, attempt=1, digest=DIGEST, processes=sizes[0], terminate_at_step=3) == ExitCode.STOPPED
    assert changing.run(job, attempt=2, digest=DIGEST, processes=sizes[1]) == ExitCode.DONE
    told = measured(changing) + measured(changing, attempt=2)
    assert len(told) == len(measured(alone))
    for expected, found in zip(measured(alone), told, strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


def test_shares_are_even_and_whole() -> None:
    rows = [Row(np.arange(length), np.arange(length), [length]) for length in (9, 1, 1, 7, 2, 4)]
    shares = World(size=3).shares(rows)
    assert [[len(row.input_ids) for row in share] for share in shares] == [[9], [1, 7], [1, 2, 4]]
    assert World().shares(rows) == [rows]
    assert World(size=3).shares(rows[:2]) == [[rows[0]], [rows[1]], []]


def test_gradients_travel_in_few_messages_of_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "_BUCKET_BYTES", 40)
    tensors = [
        torch.zeros(count, dtype=dtype)
        for count, dtype in ((4, torch.float32), (6, torch.float32), (1, torch.float32), (2, torch.bfloat16), (99, torch.bfloat16))
    ]
    assert [[tensor.numel() for tensor in bucket] for bucket in sharding.buckets(tensors)] == [[4, 6], [1], [2], [99]]


REASON = Outcome(error=Failed(code=FailureCode.OUT_OF_MEMORY, message="no room"))
BROKEN = Outcome(error=Failed(code=FailureCode.INTERNAL, message="unforeseen"))
LOST = Outcome(error=Failed(code=FailureCode.PEER_LOST, message="connection closed by peer"))
HEARD = {
    "the one with a reason": ({0: 70, 1: 78}, [BROKEN, REASON], 1),
    "else the one that was killed": ({0: 70, 1: -9}, [BROKEN, BROKEN], 1),
    "else the first that broke": ({2: 76, 1: 70, 0: 70}, [BROKEN, BROKEN, LOST], 1),
    "last one that lost others": ({1: 76, 0: 76}, [LOST, LOST], 1),
    "the leader, where none failed": ({}, [Outcome(), Outcome()], 0),
}


@pytest.mark.parametrize(("failed", "told", "rank"), HEARD.values(), ids=HEARD)
def test_of_processes_that_failed_the_cause_is_heard(failed: dict[int, int], told: list[Outcome], rank: int) -> None:
    assert cause(failed, told) == rank


def test_processes_are_started_heard_and_ended_as_one(tmp_path: Path) -> None:
    """The program itself: one of its processes is killed, the others end and the exit code tells; run again, it goes on and publishes."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca_rows(40)))
    spec = {
        "model": {"uri": str(tiny_model())},
        "dataset": {"sources": [{"uri": str(tmp_path / "rows.jsonl")}]},
        "hyperparameters": {"maxSteps": 60, "batchSize": 4},
        "resources": {"cpu": "1"},
        "checkpointing": {"everySteps": 1},
    }
    (tmp_path / "job.yaml").write_text(
        yaml.safe_dump(
            {"apiVersion": "tunewright.dev/v1alpha1", "kind": "InstructionTuningJob", "metadata": {"name": "pair"}, "spec": spec}
        )
    )
    output = tmp_path / "out"
    command = [sys.executable, "-m", "tunewright_trainer", "run", str(tmp_path / "job.yaml"), "--output", str(output), "--processes", "2"]
    with subprocess.Popen(command) as program:
        wait_for(lambda: program.poll() is not None or list(output.glob("**/step-*/manifest.json")), "a checkpoint")
        first, second = children_of(program.pid)
        os.kill(second, signal.SIGKILL)
        assert program.wait(120) == 128 + signal.SIGKILL
        assert not any(Path(f"/proc/{pid}").exists() for pid in (first, second))
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stderr
    assert again.stdout.count("model: ") == 1


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(there: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 240
    while not there():
        assert time.monotonic() < deadline, f"never came to {what}"
        time.sleep(0.05)
