"""A client's process: lines of JSON come in, and go to a tracker. It ends with its input.

The first line is about the job, the last one says whether it is done. What cannot be sent is tried again, and said once.
"""

import json
import logging
import queue
import signal
import sys
import threading
from typing import Any, Final, Protocol

from tunewright_trainer.tracking.to_mlflow import MlflowRun
from tunewright_trainer.tracking.to_wandb import WandbRun

log = logging.getLogger("tunewright_trainer.tracking")

MOST_POINTS: Final = 100_000  # that wait for a tracker that is away
BATCH: Final = 50  # points that are sent at once
PAUSE_SECONDS: Final = 15.0  # between two tries

Point = dict[str, Any]


class Run(Protocol):
    """The run of a job at a tracker. Each call may raise anything, and is then made again."""

    def begin(self, about: dict[str, Any]) -> None:
        """Find the job's run, or make it."""
        ...

    def add(self, points: list[Point]) -> None:
        """Tell metrics: of each point ``step``, ``at`` (milliseconds) and ``metrics``."""
        ...

    def end(self, *, done: bool) -> None:
        """The attempt is over; with ``done`` the run is."""
        ...


class Lines:
    """What came in, until it is sent; beyond `MOST_POINTS` the latest are dropped."""

    def __init__(self) -> None:
        self.points: queue.Queue[Point | None] = queue.Queue()
        self.over = threading.Event()
        self.done = False

    def read(self) -> None:
        for line in sys.stdin:
            told = json.loads(line)
            if "done" in told:
                self.done = told["done"]
            elif self.points.qsize() < MOST_POINTS:
                self.points.put(told)
        self.over.set()
        self.points.put(None)

    def next(self) -> list[Point]:
        """The next points, when there are some; none at the end."""
        first = self.points.get()
        found = [] if first is None else [first]
        while found and len(found) < BATCH and not self.points.empty():
            point = self.points.get()
            if point is None:
                self.points.put(None)
                break
            found.append(point)
        return found


def serve(kind: str, run: Run) -> None:
    about = json.loads(sys.stdin.readline())
    lines, told = Lines(), False
    threading.Thread(target=lines.read, daemon=True).start()
    begun, points, sent = False, list[Point](), False
    while True:
        last = lines.over.is_set()  # a failure after this is the last
        try:
            if not begun:
                run.begin(about)
                begun = True
            while points := points or lines.next():
                run.add(points)
                points, told, sent = [], False, True
            run.end(done=lines.done)
            return
        except Exception as error:
            if not told:
                log.warning("%s does not take metrics%s: %s", kind, " any more" if sent else "", " ".join(str(error).split())[:300])
            told = True
            if last:
                return
            lines.over.wait(PAUSE_SECONDS)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # tells of every try
    for number in (signal.SIGTERM, signal.SIGINT):  # the training process decides when this is over
        signal.signal(number, signal.SIG_IGN)
    kind = sys.argv[1]
    serve(kind, MlflowRun() if kind == "mlflow" else WandbRun())


if __name__ == "__main__":
    main()
