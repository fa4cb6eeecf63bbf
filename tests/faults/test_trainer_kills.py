"""Kill training anywhere, any number of times: the final adapter is the one of the run that nobody killed, bit for bit."""

import hashlib
import random
import shutil
from pathlib import Path

from tests.support.training import DIGEST, a_job, documents, packed, publish_data
from tests.support.trainer_runs import Attempts
from tunewright_crds.errors import ExitCode
from tunewright_crds.pod import PodConfig
from tunewright_trainer.storage import LocalStore

SIGKILLED = -9
MOST_ATTEMPTS = 40


def job() -> PodConfig:
    """Twelve steps with dropout, evaluations, early stopping and a checkpoint every second step."""
    return a_job(
        hyperparameters={
            "batchSize": 4,
            "epochs": 4,
            "learningRate": 0.01,
            "earlyStopping": {"enabled": True, "patience": 5},
            "evaluationsPerEpoch": 1.5,
        },
        checkpointing={"everySteps": 2},
    )


def fresh_store(work: Path) -> None:
    shutil.rmtree(work / "store", ignore_errors=True)
    publish_data(LocalStore(work / "store"), work, train=packed(documents(24), 2), validation=packed(documents(6, seed=9), 2))


def adapter(attempts: Attempts) -> str:
    """Hash of the published weights, checked against the manifest's."""
    artifact = attempts.outcome().artifact
    assert artifact is not None
    folder = Path(artifact.uri)
    assert hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() == artifact.digest
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_killed_run_ends_with_the_very_same_weights(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the kills:", seed)
    chance = random.Random(seed)
    with Attempts(tmp_path) as attempts:
        fresh_store(tmp_path)
        assert attempts.run(job(), attempt=1, digest=DIGEST) == ExitCode.DONE
        expected = adapter(attempts)

        # Killed at a write of its own choosing each time: in a checkpoint, before its manifest, in the metrics, in the artefact.
        fresh_store(tmp_path)
        codes = []
        for attempt in range(1, MOST_ATTEMPTS):
            codes.append(attempts.run(job(), attempt=attempt, digest=DIGEST, kill_at_write=chance.randrange(4, 16)))
            assert codes[-1] in (SIGKILLED, ExitCode.DONE)
            if codes[-1] == ExitCode.DONE:
                break
        print("exit codes:", codes)
        assert codes[-1] == ExitCode.DONE
        assert adapter(attempts) == expected

        # Asked to stop at steps of its own choosing, so that it loses nothing; then killed while it publishes.
        fresh_store(tmp_path)
        reached = 0
        for attempt, step in enumerate(sorted(chance.sample(range(1, 12), 3)), start=1):
            code = attempts.run(job(), attempt=attempt, digest=DIGEST, terminate_at_step=step)
            told = attempts.outcome()
            assert code == ExitCode.STOPPED
            assert (told.resumed_from_step, told.reached_step) == (reached, step)
            assert told.last_checkpoint is not None
            assert told.last_checkpoint.step == step
            reached = step
        assert attempts.run(job(), attempt=4, digest=DIGEST) == ExitCode.DONE
        assert attempts.outcome().resumed_from_step == reached
        assert adapter(attempts) == expected


def test_every_write_is_a_safe_place_to_die(tmp_path: Path) -> None:
    """Killed at each write once, in one run after another: whatever lies in storage then, the next attempt goes on from a whole checkpoint."""
    small = a_job(hyperparameters={"batchSize": 4, "maxSteps": 3, "learningRate": 0.01}, checkpointing={"everySteps": 1})
    with Attempts(tmp_path) as attempts:
        fresh_store(tmp_path)
        assert attempts.run(small, attempt=1, digest=DIGEST) == ExitCode.DONE
        expected = adapter(attempts)
        for write in range(1, 60):
            fresh_store(tmp_path)
            if attempts.run(small, attempt=1, digest=DIGEST, kill_at_write=write) == ExitCode.DONE:
                break  # there was no such write any more
            artifacts = list((tmp_path / "store").glob("team-a/models/*/*/*/manifest.json"))
            assert len(artifacts) <= 1
            assert attempts.run(small, attempt=2, digest=DIGEST) == ExitCode.DONE, f"after dying at write {write}"
            assert adapter(attempts) == expected, f"after dying at write {write}"
        else:
            raise AssertionError("the run never came to its end")
        assert write > 10
