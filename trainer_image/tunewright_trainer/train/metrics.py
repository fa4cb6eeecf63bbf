"""What a run tells of itself: the history in storage, reports to the front end, and lines in the log. None of it can fail or delay a step."""

import json
import logging
import math
import threading
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tunewright_crds import names
from tunewright_crds.pod import MAX_PROGRESS_BYTES, JobIdentity, ProgressReport
from tunewright_crds.status import MAX_METRICS, MAX_REQUEST, LastCheckpoint, Metric, Progress

log = logging.getLogger(__name__)

REPORT_SECONDS: Final = 5.0  # least time between reports, and between lines
SEND_SECONDS: Final = 10.0  # patience with the front end
FAREWELL_SECONDS: Final = 5.0  # how long the end of a run waits for its last report

Clock = Callable[[], float]
Measured = dict[str, float]
"""Metrics by the field's names."""

_EXTREMES: Final = {"min_reward": min, "max_reward": max}  # the others are shares, whose sum is the whole


def added(one: Measured, other: Measured) -> Measured:
    """Metrics of the parts of a batch as those of both parts together."""
    both = {name: _EXTREMES[name](one[name], other[name]) if name in _EXTREMES else one[name] + other[name] for name in one.keys() & other}
    return one | other | both


class History:
    """The run's metrics as JSON lines in a local file, one a step, that is uploaded with each checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class Pace:
    """Tokens per second, and seconds per step, over the last half minute or so."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._marks: list[tuple[float, int, int, int]] = [(clock(), 0, 0, 0)]

    def step(self, tokens: int, trained_tokens: int) -> tuple[float, float]:
        """Note a step that is done; returns tokens and trained tokens per second."""
        _, steps, all_tokens, all_trained = self._marks[-1]
        self._marks.append((self._clock(), steps + 1, all_tokens + tokens, all_trained + trained_tokens))
        while len(self._marks) > 2 and self._marks[-1][0] - self._marks[1][0] > 30:
            del self._marks[0]
        first, last = self._marks[0], self._marks[-1]
        seconds = max(last[0] - first[0], 1e-9)
        return (last[2] - first[2]) / seconds, (last[3] - first[3]) / seconds

    def remaining(self, steps: int) -> int:
        """Seconds that ``steps`` more steps take."""
        first, last = self._marks[0], self._marks[-1]
        return round((last[0] - first[0]) / max(1, last[1] - first[1]) * steps)


class Reporter:
    """Sends the newest progress to the front end from a thread of its own: the first at once, then at most one every five seconds.

    An empty ``url`` sends nothing. What cannot be sent is dropped and said once in the log. ``asked`` is the last request for a checkpoint that came back.
    """

    def __init__(self, url: str, job: JobIdentity, *, token_file: str = names.PROGRESS_TOKEN, every: float = REPORT_SECONDS) -> None:
        self._url = url
        self._job = job
        self._token_file = token_file
        self._every = every
        self.asked = ""
        self._newest: ProgressReport | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        if url:
            self._thread.start()

    def report(self, progress: Progress, last_checkpoint: LastCheckpoint | None) -> None:
        """Take the newest state; returns at once."""
        with self._changed:
            self._newest = ProgressReport(job=self._job, progress=progress, last_checkpoint=last_checkpoint)
            self._changed.notify()

    def close(self) -> None:
        """Send the last report now, waiting no longer than `FAREWELL_SECONDS`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(FAREWELL_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._closing)
                report, self._newest = self._newest, None
            if report is not None:
                self._send(report)
            with self._changed:
                if self._closing and self._newest is None:
                    return
                self._changed.wait_for(lambda: self._closing, timeout=self._every)

    def _send(self, report: ProgressReport) -> None:
        headers = {"Content-Type": "application/json"}
        token = Path(self._token_file)
        try:
            if token.exists():  # read anew each time: the kubelet replaces it before it expires
                headers["Authorization"] = f"Bearer {token.read_text(encoding='utf-8').strip()}"
            body = report.model_dump_json(by_alias=True).encode()
            request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")  # noqa: S310 - the operator's own address
            with urllib.request.urlopen(request, timeout=SEND_SECONDS) as response:  # noqa: S310
                answer = json.loads(response.read(MAX_PROGRESS_BYTES) or b"{}")
            self.asked = str(answer.get("checkpoint") or "")[:MAX_REQUEST]
            self._failed = False
        except Exception as error:
            if not self._failed:
                log.warning("progress cannot be reported: %s", error)
            self._failed = True


def progress(
    *, step: int, max_steps: int, epoch: float, tokens: int, remaining: int, attempt: int, resumed_from: int, metrics: dict[str, float]
) -> Progress:
    """Progress as the job's status shows it, which has no room for all details: metrics of parts (a name with `/`) are left out first."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    shown = sorted(sorted(finite), key=lambda name: "/" in name)[:MAX_METRICS]
    return Progress(
        step=step,
        max_steps=max_steps,
        epoch=round(epoch, 4),
        percent=100 * step // max_steps,
        estimated_remaining_seconds=remaining,
        remaining=duration(remaining),
        tokens=tokens,
        tokens_per_second=round(finite.get("tokens_per_second", 0.0), 1),
        loss=f"{finite['loss']:.4f}" if "loss" in finite else "",
        attempt=attempt,
        resumed_from_step=resumed_from,
        metrics=[Metric(name=name, value=finite[name]) for name in sorted(shown)],
        last_updated=datetime.now(UTC),
    )


def duration(seconds: int) -> str:
    """``1h5m``, ``3m20s``, ``12s``: two units at most."""
    minutes, rest = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{count}{unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")) if count]
    return "".join(parts[:2]) or "0s"


def line(progress: Progress, rate: float) -> str:
    """One readable line."""
    reward = next((f"reward {metric.value:.4f}  " for metric in progress.metrics if metric.name == "reward"), "")
    return (
        f"step {progress.step}/{progress.max_steps}  loss {progress.loss}  {reward}lr {rate:.2e}  "
        f"{progress.tokens_per_second:,.0f} tokens/s  {progress.remaining} left"
    )


def peak_memory_bytes() -> int:
    """The most memory that this process held: of the GPU if it uses one, else of the machine."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    for text in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if text.startswith("VmHWM:"):
            return int(text.split()[1]) * 1024
    return 0
