"""Waiting out an outage of object storage."""

import logging
import os
import random
import time
from collections.abc import Callable
from typing import Final, NoReturn, TypeVar

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.process import stop_requested

PATIENCE_SECONDS: Final = 600.0  # a storage server's upgrade or failover fits in
PATIENCE_WHEN_STOPPING_SECONDS: Final = 60.0  # of the pod's grace period of 120
FIRST_WAIT_SECONDS: Final = 0.5
LONGEST_WAIT_SECONDS: Final = 15.0

T = TypeVar("T")
log = logging.getLogger(__name__)


class Unavailable(Exception):
    """Storage did not answer, or said that it cannot now; worth another try."""


def patience_seconds() -> float:
    """How long an outage is waited out; set by TUNEWRIGHT_STORAGE_PATIENCE_SECONDS."""
    return float(os.environ.get("TUNEWRIGHT_STORAGE_PATIENCE_SECONDS") or PATIENCE_SECONDS)


def patiently(operation: Callable[[], T], *, what: str, translate: Callable[[Exception], NoReturn]) -> T:
    """The result of `operation`, tried again with growing, jittered waits while `translate`, which raises what an error of it means, raises `Unavailable`.

    Gives up with `Refusal(StorageUnavailable)` after `patience_seconds`, or a minute after the process was asked to stop.
    """
    start = time.monotonic()
    deadline = start + patience_seconds()
    stopping = False
    wait = FIRST_WAIT_SECONDS
    while True:
        try:
            try:
                return operation()
            except Exception as error:
                translate(error)
        except Unavailable as error:
            now = time.monotonic()
            if stop_requested.is_set() and not stopping:
                stopping = True
                deadline = min(deadline, now + PATIENCE_WHEN_STOPPING_SECONDS)
            pause = wait * random.uniform(0.5, 1.0)
            if now + pause > deadline:
                raise Refusal(
                    FailureCode.STORAGE_UNAVAILABLE, f"object storage did not answer for {now - start:.0f} s ({what}): {error}", param=what
                ) from error
            log.warning("object storage does not answer (%s): %s; trying again in %.1f s", what, error, pause)
            time.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
