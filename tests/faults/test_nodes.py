"""Two nodes of one job, each the program itself with the variables that the operator gives a pod: one is killed, and the rest is as if nobody had been."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.models import tiny_model
from tests.support.s3 import REGION, S3Server
from tests.support.training import DIGEST, NAMESPACE, UID, a_job, documents, packed, publish_data, train_here
from tunewright_crds.errors import ExitCode, FailureCode
from tunewright_crds.pod import Outcome, PodConfig, StorageSettings
from tunewright_crds.storage import MANIFEST, checkpoints_key
from tunewright_trainer.storage import LocalStore, S3Store

SIGKILLED = 128 + signal.SIGKILL
BUCKET = "platform"
NEVER = 100_000  # steps
PATIENCE_SECONDS = 240


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[S3Server]:
    with S3Server(tmp_path) as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        for file in tiny_model().iterdir():
            client.upload_file(str(file), BUCKET, f"base/{file.name}")
        yield server


class Nodes:
    """Starts pods' programs, each with a scratch folder of its own, over one storage."""

    def __init__(self, work: Path, server: S3Server) -> None:
        self.settings = StorageSettings(bucket=BUCKET, prefix="install", endpoint=server.endpoint, region=REGION)
        self.store = S3Store(BUCKET, "install", endpoint=server.endpoint, region=REGION, keys=server.keys)
        self._work, self._keys = work, server.keys
        publish_data(self.store, work, train=ROWS)

    def start(self, config: PodConfig, *, attempt: int, nodes: int = 1) -> list[subprocess.Popen[bytes]]:
        """The programs of one attempt, by their rank."""
        (self._work / "config.json").write_text(config.model_dump_json(by_alias=True, exclude_none=True))
        command = [sys.executable, "-m", "tunewright_trainer", "train", f"--attempt={attempt}", f"--dataset={DIGEST}"]
        gang = {"NNODES": nodes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": a_free_port()} if nodes > 1 else {}
        return [
            subprocess.Popen(
                [*command, f"--config={self._work / 'config.json'}"],
                env=os.environ
                | self._keys
                | {name: str(value) for name, value in gang.items()}
                | {"NODE_RANK": str(rank), "TUNEWRIGHT_WORK": str(self._scratch(attempt, rank))}
                | {"TUNEWRIGHT_TERMINATION_MESSAGE": str(self._message(attempt, rank)), "OMP_NUM_THREADS": "1"},
            )
            for rank in range(nodes)
        ]

    def outcome(self, attempt: int, rank: int = 0) -> Outcome:
        """The last words of a node."""
        return Outcome.model_validate_json(self._message(attempt, rank).read_bytes())

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole."""
        keys = [info.key for info in self.store.list(f"{checkpoints_key(NAMESPACE, UID)}/") if info.key.endswith(f"/{MANIFEST}")]
        return sorted(int(key.split("/")[-2].removeprefix("step-")) for key in keys)

    def _scratch(self, attempt: int, rank: int) -> Path:
        folder = self._work / f"scratch-{attempt}-{rank}"
        folder.mkdir()
        return folder

    def _message(self, attempt: int, rank: int) -> Path:
        return self._work / f"message-{attempt}-{rank}"


ROWS = packed(documents(24), 2)


def job(steps: int, **fields: Any) -> PodConfig:
    numbers = {"batchSize": 4, "maxSteps": steps, "learningRate": 0.01, "scheduler": "constant", "warmupRatio": 0, "optimizer": "sgd"}
    return a_job(method={"lora": {"dropout": 0.0}}, hyperparameters=numbers, checkpointing={"everySteps": 1}, **fields)


def test_of_two_nodes_one_is_lost_and_one_goes_on_to_the_weights_of_one_process(tmp_path: Path, storage: S3Server) -> None:
    nodes = Nodes(tmp_path, storage)
    remote = {"storage": nodes.settings, "dataset": {"sources": [{"uri": "s3://never/read.jsonl"}]}}
    remote |= {"model": f"s3://{BUCKET}/base/"}

    with ended(nodes.start(job(NEVER, **remote), attempt=1, nodes=2)) as (leader, other):
        wait_for(lambda: gone(leader) or len(nodes.steps()) > 1, "two checkpoints")
        (child,) = children_of(other.pid)
        os.kill(child, signal.SIGKILL)
        assert (other.wait(PATIENCE_SECONDS), leader.wait(PATIENCE_SECONDS)) == (SIGKILLED, ExitCode.PEER_LOST)
    told = nodes.outcome(1)
    assert told.error is not None
    assert told.error.code is FailureCode.PEER_LOST
    assert told.last_checkpoint is not None, "the leader knows of checkpoints, whoever was lost"

    reached = nodes.steps()[-1]
    with ended(nodes.start(job(reached + 5, **remote), attempt=2)) as (alone,):
        assert alone.wait(PATIENCE_SECONDS) == ExitCode.DONE
    last = nodes.outcome(2)
    assert (last.resumed_from_step, last.reached_step) == (reached, reached + 5)
    assert last.artifact is not None
    key = last.artifact.uri.removeprefix(f"s3://{BUCKET}/install/")
    nodes.store.download(f"{key}/adapter_model.safetensors", tmp_path / "weights.safetensors")

    local = LocalStore(tmp_path / "local")
    publish_data(local, tmp_path, train=ROWS)
    straight = train_here(job(reached + 5), local, tmp_path)
    assert straight.artifact is not None
    expected, found = (
        load_file(path) for path in (Path(straight.artifact.uri) / "adapter_model.safetensors", tmp_path / "weights.safetensors")
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) < 1e-5, name


@contextmanager
def ended(programs: list[subprocess.Popen[bytes]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Whatever happens in the block, the programs and what they started are gone after it."""
    try:
        yield programs
    finally:
        for program in programs:
            for pid in [*children_of(program.pid), program.pid] if not gone(program) else []:
                os.kill(pid, signal.SIGKILL)
            program.wait()


def gone(program: subprocess.Popen[bytes]) -> bool:
    return program.poll() is not None


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(there: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not there():
        assert time.monotonic() < deadline, f"never came to {what}"
        time.sleep(0.05)
