"""The training process's end: lines into pipes that are never waited for."""

import contextlib
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tunewright_crds import names
from tunewright_crds.pod import PodConfig

log = logging.getLogger(__name__)

FAREWELL_SECONDS: Final = 15.0  # how long the end of a run waits for a tracker
MOST_WAITING: Final = 2**20  # bytes for a client that does not read; what comes after is not told
_KEYS: Final = {
    "mlflow": (names.MLFLOW_CREDENTIALS, ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")),
    "wandb": (names.WANDB_CREDENTIALS, ("WANDB_API_KEY",)),
}
# Nothing but the job's own results goes out, and only to where its owner says.
_QUIET: Final = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}


class Trackers:
    """The trackers of an attempt; there may be none."""

    def __init__(self, feeds: list["Feed"]) -> None:
        self._feeds = feeds

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell metrics of a step; returns at once. What is no number is left out."""
        told = {"step": step, "at": round(time.time() * 1000), "metrics": {k: v for k, v in metrics.items() if math.isfinite(v)}}
        for feed in self._feeds:
            feed.put(told)

    def close(self, *, done: bool) -> None:
        """Say whether the job is ``done``, so that its run ends, and wait no longer than `FAREWELL_SECONDS` for what is still on its way."""
        until = time.monotonic() + FAREWELL_SECONDS
        for feed in self._feeds:
            feed.put({"done": done})
        for feed in self._feeds:
            feed.close(until=until)


def open_trackers(config: PodConfig, *, attempt: int, work: Path) -> Trackers:
    """Those that the job names. Every attempt of a job goes on with the same run, which is known by the job's uid."""
    tracking, job = config.spec.tracking, config.job
    about = {"name": job.name, "namespace": job.namespace, "uid": job.uid, "attempt": attempt, "work": str(work)}
    about |= {"spec": flat(config.spec.model_dump(mode="json", by_alias=True, exclude_none=True))}
    wanted: dict[str, dict[str, Any]] = {}
    work.mkdir(parents=True, exist_ok=True)
    if tracking.mlflow.uri:
        wanted["mlflow"] = {"uri": tracking.mlflow.uri, "experiment": tracking.mlflow.experiment or job.namespace}
    if tracking.wandb.project:
        wanted["wandb"] = {"project": tracking.wandb.project, "entity": tracking.wandb.entity, "base_url": tracking.wandb.base_url}
    return Trackers([Feed(kind, about | where) for kind, where in wanted.items()])


def flat(spec: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"hyperparameters.learningRate": "auto"}``: what trackers take for parameters; empty ones are left out, lists are JSON."""
    found: dict[str, str] = {}
    for name, value in spec.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif value not in ("", []):
            found[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return found


class Feed:
    """The pipe to one client."""

    def __init__(self, kind: str, about: dict[str, Any]) -> None:
        from tunewright_trainer.storage import read_files  # which the client does without

        folder, files = _KEYS[kind]
        environment = os.environ | _QUIET | read_files(folder, files)
        command = [sys.executable, "-m", "tunewright_trainer.tracking", kind]
        self._kind, self._waiting, self._full = kind, bytearray(), False
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self.put(about)

    def put(self, told: Mapping[str, Any]) -> None:
        """Send a line, or keep it until there is room in the pipe."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting += json.dumps(told).encode() + b"\n"
        elif not self._full:
            self._full = True
            log.warning("%s takes no more metrics; some are not told there", self._kind)
        self._push()

    def _push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                while self._waiting:
                    del self._waiting[: os.write(self._pipe, self._waiting)]
            except BrokenPipeError:  # the client ended, and has said why
                self._waiting.clear()

    def close(self, *, until: float) -> None:
        """Wait until the client has sent what it was told, or the time has come."""
        for left in _countdown(until):
            if not self._waiting:
                break
            select.select([], [self._pipe], [], left)
            self._push()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("%s is left behind: what it was told last may be missing there", self._kind)
            os.killpg(self._process.pid, signal.SIGKILL)  # with what it started itself
            self._process.wait()


def _countdown(until: float) -> Iterator[float]:
    while (left := until - time.monotonic()) > 0:
        yield left
