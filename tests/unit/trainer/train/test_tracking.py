"""Experiment trackers: MLflow's client against a stand-in of its server, that of Weights & Biases offline; and neither can hold up a run."""

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mlflow import Mlflow
from tests.support.training import UID, a_job, documents, history, packed, publish_data, stop_in_step, train_here
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.tracking import feed

NUMBERS: dict[str, Any] = {"batchSize": 2, "maxSteps": 4, "learningRate": 0.02}


def published(folder: Path) -> LocalStore:
    store = LocalStore(folder / "store")
    publish_data(store, folder, train=packed(documents(8, longest=16), 1), validation=packed(documents(2, seed=9, longest=16), 1))
    return store


def test_all_attempts_of_a_job_are_one_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "MLFLOW_TRACKING_TOKEN").write_text("secret\n")
    monkeypatch.setitem(feed._KEYS, "mlflow", (str(tmp_path), feed._KEYS["mlflow"][1]))
    monkeypatch.setattr(feed, "FAREWELL_SECONDS", 120.0)
    store = published(tmp_path)
    with Mlflow() as server:
        job = a_job(hyperparameters=NUMBERS, tracking={"mlflow": {"uri": server.address, "experiment": "tuning"}})
        with monkeypatch.context() as patch:
            stop_in_step(patch, 2)
            with pytest.raises(process.Stopped):
                train_here(job, store, tmp_path)
        (run,) = server.runs
        assert run.status == "RUNNING", "another attempt follows"
        train_here(job, store, tmp_path, attempt=2)
    assert (server.runs, server.experiments, server.asked) == ([run], ["tuning"], {"Bearer secret"})
    assert (run.name, run.status, run.tags["tunewright.uid"], run.tags["tunewright.attempt"]) == ("tune", "FINISHED", UID, "2")
    assert (run.params["hyperparameters.batchSize"], run.params["method.tuner"]) == ("2", "lora")
    for name in ("loss", "eval_loss"):
        told = {line["step"]: line[name] for attempt in (1, 2) for line in history(store, attempt) if name in line}
        assert run.metrics[name] == pytest.approx(told)
    assert sorted(run.metrics["loss"]) == [1, 2, 3, 4]


def records(file: Path) -> Iterator[bytes]:
    """What a file of W&B's client holds: a header of 7 bytes, then records in the manner of LevelDB's log, cut where a block of 32 KiB ends."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield whole
            whole = b""


def test_a_run_of_wandb_holds_the_spec_and_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(feed, "FAREWELL_SECONDS", 120.0)
    store = published(tmp_path)
    train_here(a_job(hyperparameters=NUMBERS, tracking={"wandb": {"project": "tuning", "entity": "team"}}), store, tmp_path)
    (file,) = (tmp_path / "scratch-1-0" / "tracking").glob(f"wandb/offline-run-*/run-{UID}.wandb")
    losses, told = {}, []
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            told.append((record.run.run_id, record.run.project, record.run.entity, record.run.display_name))
            config = {item.key: item.value_json for item in record.run.config.update}
        for row in [record.history] if record.HasField("history") else []:
            found = {item.key or item.nested_key[0]: item.value_json for item in row.item}
            losses[row.step.num] = float(found["loss"])
    assert told[0] == (UID, "tuning", "team", "tune")
    assert config["hyperparameters.batchSize"] == '"2"'
    assert losses == pytest.approx({line["step"]: line["loss"] for line in history(store) if "loss" in line})


def test_a_tracker_that_is_away_is_told_of_once_and_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(feed, "FAREWELL_SECONDS", 60.0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        outcome = train_here(a_job(hyperparameters=NUMBERS, tracking={"mlflow": {"uri": uri}}), published(tmp_path), tmp_path)
    assert outcome.artifact is not None
    assert capfd.readouterr().err.count("mlflow does not take metrics") == 1


def test_a_client_that_reads_nothing_holds_up_nobody(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        job = a_job(tracking={"mlflow": {"uri": f"http://127.0.0.1:{nobody.getsockname()[1]}"}})
        trackers = feed.open_trackers(job, attempt=1, work=tmp_path)
        (one,) = trackers._feeds
        os.kill(one._process.pid, signal.SIGSTOP)
        for step in range(4000):
            trackers.add(step, {f"metric-{number}": 1.0 for number in range(50)})
        assert len(one._waiting) < feed.MOST_WAITING + 4096
        one.close(until=time.monotonic() + 0.5)
    assert one._process.returncode == -signal.SIGKILL
