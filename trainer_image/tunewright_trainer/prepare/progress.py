"""How far a step is whose length is known: a bar on a terminal, otherwise a line of the log every ten seconds."""

import logging
import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final

log = logging.getLogger(__name__)

TELL_SECONDS: Final = 10.0


class Progress:
    """Tells of one step while it is entered. `total` is its length in any unit; rows are counted beside that."""

    def __init__(self, what: str, total: float) -> None:
        self._what = what
        self._total = max(total, 1)
        self._began = self._told = time.monotonic()
        self._bar: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def at(self, done: float, rows: int) -> None:
        """So much of the total is done, with so many rows."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, rows=rows)
            return
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            log.info("%s: %.0f %%, %d rows, %.0f rows/s", self._what, 100 * min(done / self._total, 1), rows, rows / (now - self._began))

    def _draw(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rows]:,} rows"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._stack.enter_context(self._bar)
        self._bar.add_task(self._what, total=self._total, rows=0)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
                # Lines of the log are written above the bar, not into it.
                self._stack.callback(handler.setStream, handler.stream)
                handler.setStream(sys.stderr)
