"""Kill training anywhere, any number of times, or take its storage away: the end is that of the run that nobody disturbed.

The final adapter is the same bit for bit, nothing is published in part, and a run that is asked to stop loses no step.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import decided_model
from tests.support.s3 import REGION, S3Server
from tests.support.trainer_runs import Attempts, Nursery
from tests.support.training import DIGEST, NAMESPACE, UID, Row, a_job, documents, packed, pairs, publish_data
from tunewright_crds.errors import ExitCode
from tunewright_crds.pod import Outcome, PodConfig, StorageSettings
from tunewright_crds.storage import MANIFEST, checkpoints_key, step_name
from tunewright_trainer.storage import LocalStore, S3Store, fetch_folder, open_store

SIGKILLED = -9
MOST_ATTEMPTS = 40
BUCKET = "platform"
STEPS = 24
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture
def attempts(nursery: Nursery, tmp_path: Path) -> Attempts:
    return Attempts(nursery, tmp_path)


COURSE: dict[str, Any] = {
    "hyperparameters": {
        "batchSize": 4,
        "epochs": 4,
        "learningRate": 0.01,
        "earlyStopping": {"enabled": True, "patience": 5},
        "evaluationsPerEpoch": 1.5,
    },
    "checkpointing": {"everySteps": 2},
}
REWARDED = {
    "objective": "ppo",
    "ppo": {"maxNewTokens": 5, "epochs": 2, "miniBatches": 2},
    "rewards": [{"type": "regex", "pattern": "[aeiou]"}],
}
# Twelve steps each with dropout, evaluations, early stopping and a checkpoint every second step; answers that are drawn, with ppo.
METHODS: dict[str, dict[str, Any]] = {
    "sft, an adapter": {},
    "sft, every weight": {"tuner": "full"},
    "dpo": {"objective": "dpo"},
    "ppo": REWARDED,
}
KILLS_EACH = 13


def job(method: dict[str, Any] | None = None) -> PodConfig:
    return a_job(decided_model(), method=method or {}, **COURSE)


def fresh_store(work: Path, objective: str = "sft") -> None:
    shutil.rmtree(work / "store", ignore_errors=True)
    rows = {"dpo": pairs, "ppo": alone}.get(objective, packed_in_twos)
    publish_data(LocalStore(work / "store"), work, train=rows(12), validation=rows(3, seed=9))


def packed_in_twos(count: int, *, seed: int = 0) -> list[Row]:
    return packed(documents(2 * count, seed=seed), 2)


def alone(count: int, *, seed: int = 0) -> list[Row]:
    return packed(documents(count, seed=seed, longest=16), 1)


def published(attempts: Attempts) -> str:
    """Hash of the published weights, checked against the manifest's."""
    artifact = attempts.outcome().artifact
    assert artifact is not None
    folder = Path(artifact.uri)
    assert hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() == artifact.digest
    (weights,) = folder.glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_killed_run_ends_with_the_very_same_weights(attempts: Attempts, tmp_path: Path, method: dict[str, Any]) -> None:
    """Killed at a write of its own choosing (in a checkpoint, before its manifest, in the metrics, in the artefact), or asked to stop at any step; again and again."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the kills:", seed)
    chance, config = random.Random(seed), job(method)
    objective = config.spec.method.objective.value
    fresh_store(tmp_path, objective)
    assert attempts.run(config, attempt=1, digest=DIGEST) == ExitCode.DONE
    expected, ends = published(attempts), []
    while len(ends) - ends.count(ExitCode.DONE) < KILLS_EACH:
        fresh_store(tmp_path, objective)
        for attempt in range(1, MOST_ATTEMPTS):
            harm = chance.choice([{"kill_at_write": chance.randrange(2, 16)}, {"terminate_at_step": chance.randrange(1, 13)}])
            ends.append(attempts.run(config, attempt=attempt, digest=DIGEST, **harm))
            assert ends[-1] in (SIGKILLED, ExitCode.STOPPED, ExitCode.DONE)
            if ends[-1] == ExitCode.DONE:
                break
        assert ends[-1] == ExitCode.DONE
        assert published(attempts) == expected
    print("exit codes:", ends)


def test_a_run_that_is_asked_to_stop_loses_no_step(attempts: Attempts, tmp_path: Path) -> None:
    fresh_store(tmp_path)
    assert attempts.run(job(), attempt=1, digest=DIGEST) == ExitCode.DONE
    expected = published(attempts)
    fresh_store(tmp_path)
    reached = 0
    for attempt, step in enumerate((3, 4, 9), start=1):
        code = attempts.run(job(), attempt=attempt, digest=DIGEST, terminate_at_step=step)
        told = attempts.outcome()
        assert code == ExitCode.STOPPED
        assert (told.resumed_from_step, told.reached_step) == (reached, step)
        assert told.last_checkpoint is not None
        assert told.last_checkpoint.step == step
        reached = step
    assert attempts.run(job(), attempt=4, digest=DIGEST) == ExitCode.DONE
    assert attempts.outcome().resumed_from_step == reached
    assert published(attempts) == expected


def test_a_run_told_to_stop_while_it_starts_stops_at_once(tmp_path: Path) -> None:
    config, message = tmp_path / "config.json", tmp_path / "message"
    os.mkfifo(config)  # so that the start lasts until somebody writes, which nobody does
    command = [sys.executable, "-m", "tunewright_trainer", "train", "--attempt=1", "--dataset=none", f"--config={config}"]
    with subprocess.Popen(command, env=os.environ | {"TUNEWRIGHT_TERMINATION_MESSAGE": str(message)}) as run:
        try:
            writer: list[int] = []

            def it_reads() -> bool:
                with contextlib.suppress(OSError):  # nobody has opened the other end
                    writer.append(os.open(config, os.O_WRONLY | os.O_NONBLOCK))
                return bool(writer)

            def it_stops() -> bool:
                run.terminate()  # again and again: Python looks for signals between its own steps, not in a read that begins just then
                return run.poll() is not None

            _until(it_reads, "its config")
            _until(it_stops, "its end")
            assert run.returncode == ExitCode.STOPPED
            assert Outcome.model_validate_json(message.read_text(encoding="utf-8")) == Outcome()
        finally:
            run.kill()
            for end in writer:
                os.close(end)


def test_every_kind_of_write_is_a_safe_place_to_die(attempts: Attempts, tmp_path: Path) -> None:
    """Killed at every third write, in one run after another: whatever lies in storage then, the next attempt goes on from a whole checkpoint."""
    small = a_job(hyperparameters={"batchSize": 4, "maxSteps": 3, "learningRate": 0.01}, checkpointing={"everySteps": 1})
    fresh_store(tmp_path)
    assert attempts.run(small, attempt=1, digest=DIGEST) == ExitCode.DONE
    expected = published(attempts)
    kills = 0
    for write in range(1, 60, 3):
        fresh_store(tmp_path)
        if attempts.run(small, attempt=1, digest=DIGEST, kill_at_write=write) == ExitCode.DONE:
            break  # there was no such write any more
        kills += 1
        assert not list((tmp_path / "store").glob("team-a/models/*/*/*/manifest.json")), f"published before dying at write {write}"
        assert attempts.run(small, attempt=2, digest=DIGEST) == ExitCode.DONE, f"after dying at write {write}"
        assert published(attempts) == expected, f"after dying at write {write}"
    assert 5 < kills < 20


def test_an_outage_in_the_middle_costs_nothing(attempts: Attempts, tmp_path: Path) -> None:
    with S3Server(tmp_path) as server:
        server.client().create_bucket(Bucket=BUCKET)
        settings = StorageSettings(bucket=BUCKET, prefix="install", endpoint=server.endpoint, region=REGION)
        store = _opened(settings, server, tmp_path / "keys")
        publish_data(store, tmp_path, train=packed(documents(24), 2))
        job = a_job(
            storage=settings,
            hyperparameters={"batchSize": 4, "maxSteps": STEPS, "learningRate": 0.01},
            checkpointing={"everySteps": 4},
        )
        attempts.start(job, attempt=1, digest=DIGEST, s3=True, pause_at_step=10)
        _until(lambda: attempts.paused, "the tenth step")
        server.stop()
        attempts.go_on()
        _until(lambda: _steps(tmp_path) == STEPS, "the last step, without storage")
        assert not (tmp_path / "s3" / BUCKET / "install" / NAMESPACE / "models").exists()
        server.start()
        assert attempts.wait() == ExitCode.DONE
        outcome = attempts.outcome()
        assert outcome.artifact is not None
        assert outcome.artifact.uri.startswith(f"s3://{BUCKET}/install/{NAMESPACE}/models/tune/")
        key = outcome.artifact.uri.removeprefix(f"s3://{BUCKET}/install/")
        assert fetch_folder(store, key, tmp_path / "artifact") is not None  # every file is what the manifest says
        assert outcome.last_checkpoint is not None
        assert outcome.last_checkpoint.step == STEPS
        told = store.get_bytes(f"{NAMESPACE}/jobs/{UID}/metrics/train-1.jsonl").decode().splitlines()
        assert [json.loads(line)["step"] for line in told] == list(range(1, STEPS + 1))


def test_storage_that_stays_away_ends_the_attempt_with_that_reason(attempts: Attempts, tmp_path: Path) -> None:
    with S3Server(tmp_path) as server:
        server.client().create_bucket(Bucket=BUCKET)
        settings = StorageSettings(bucket=BUCKET, endpoint=server.endpoint, region=REGION)
        store = _opened(settings, server, tmp_path / "keys")
        publish_data(store, tmp_path, train=packed(documents(24), 2))
        job = a_job(storage=settings, hyperparameters={"batchSize": 4, "maxSteps": 6}, checkpointing={"everySteps": 2})
        impatient = {"TUNEWRIGHT_STORAGE_PATIENCE_SECONDS": "2"}
        attempts.start(job, attempt=1, digest=DIGEST, s3=True, pause_at_step=4, environment=impatient)
        _until(lambda: attempts.paused, "the fourth step")
        first = f"{checkpoints_key(NAMESPACE, UID)}/{step_name(2)}/{MANIFEST}"
        _until(lambda: store.exists(first), "the first checkpoint")
        server.stop()
        attempts.go_on()
        assert attempts.wait() == ExitCode.UNAVAILABLE
        error = attempts.outcome().error
        assert error is not None
        assert (error.code, "object storage did not answer" in error.message) == ("StorageUnavailable", True)
        server.start()
        assert attempts.run(job, attempt=2, digest=DIGEST, s3=True) == ExitCode.DONE
        assert attempts.outcome().resumed_from_step == 2


def _opened(settings: StorageSettings, server: S3Server, keys: Path) -> S3Store:
    """The store that the attempts open, with its keys as a Secret mounts them."""
    keys.mkdir()
    for name, value in server.keys.items():
        (keys / name).write_text(value)
    store = open_store(settings, keys)
    assert isinstance(store, S3Store)
    return store


def _steps(work: Path) -> int:
    """Steps that the running attempt has noted on its own disk."""
    history = work / "scratch-1" / "metrics" / "train-1.jsonl"
    return len(history.read_text().splitlines()) if history.exists() else 0


def _until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < deadline, f"never came to {what}"
        time.sleep(0.05)
