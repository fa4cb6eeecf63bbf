"""Retry budgets, and the waits between tries."""

import hashlib
from datetime import timedelta
from typing import Any, Final

from tunewright_crds.errors import FailureClass, FailureCode
from tunewright_crds.status import Requeue
from tunewright_operator.failures import Ending
from tunewright_operator.plan import Pass

# What stands in the way of a child is tried again after so many seconds.
OBSTACLE_SECONDS: Final = 10.0


def spend(work: Pass[Any, Any], verdict: Ending, *, free_in_a_row: int) -> None:
    """Takes a failure from its budget and sets the time of the next try, or fails the owner where there is none left.

    ``free_in_a_row``: free ends without progress, this one included. The second and later ones wait, so that a pod that nobody can keep does not spin.
    """
    restarts = work.status.restarts
    delay = 0.0
    if verdict.cls is FailureClass.FREE:
        restarts.free += 1
        delay = _backoff(work, free_in_a_row - 1) if free_in_a_row > 1 else 0.0
    elif verdict.cls is FailureClass.INFRASTRUCTURE and restarts.infrastructure < work.wanted.retries.infrastructure:
        restarts.infrastructure += 1
        delay = _backoff(work, restarts.infrastructure)
    else:
        work.fail(verdict.code or FailureCode.INTERNAL, verdict.message, verdict.param)
        return
    work.status.requeue = Requeue(not_before=work.now + timedelta(seconds=delay)) if delay else None


def _backoff(work: Pass[Any, Any], nth: int) -> float:
    """Seconds before the nth retry: doubling, capped, and spread by ±25 % from owner to owner (by hash: the same question has one answer)."""
    settings = work.settings
    spread = hashlib.sha256(f"{work.seen.owner.id.uid}/{nth}".encode()).digest()[0] / 255
    return min(settings.backoff_cap_seconds, settings.backoff_base_seconds * 2.0 ** min(nth - 1, 32)) * (0.75 + spread / 2)


def waits_for_its_turn(work: Pass[Any, Any]) -> bool:
    """Whether a wait between tries is not over yet."""
    requeue = work.status.requeue
    if requeue is None or requeue.not_before is None or requeue.not_before <= work.now:
        return False
    work.wake(requeue.not_before)
    return True
