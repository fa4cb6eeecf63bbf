"""Batch Jobs that are done once, such as preparing data: made, watched, heard, and made anew where they broke, as the budgets allow."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tunewright_crds import names
from tunewright_crds.errors import FailureClass, FailureCode
from tunewright_crds.names import Condition, Reason
from tunewright_crds.pod import Outcome
from tunewright_operator.budgets import OBSTACLE_SECONDS, spend, waits_for_its_turn
from tunewright_operator.failures import Ending, ending, heard, hindrance, stuck
from tunewright_operator.observed import Batch
from tunewright_operator.plan import Pass


@dataclass(frozen=True, slots=True)
class Errand:
    """What is done, and how it is told. ``condition`` tells of it; ``doing`` and ``told`` while a pod is at work."""

    name: str
    condition: Condition
    doing: Reason
    told: str


def hear(work: Pass[Any, Any], errand: Errand, batch: Batch | None, take: Callable[[Outcome], bool]) -> bool:
    """Learns what became of the Job; True where the pass ends with that. ``take`` writes what it said, and tells whether it is done."""
    if batch is None:
        return False
    if not batch.finished:
        return watch(work, errand, batch)
    pod = work.seen.pod_of(batch)
    outcome = heard(pod)
    if outcome and take(outcome):
        work.status.requeue = None
        return False
    if batch.gone or batch.id.deleting:
        return False  # judged before, or taken away by somebody: made anew
    if (pod is None or not pod.finished) and not work.seen.confirmed:
        work.doubt()
        return True
    work.stop(batch)
    try_again(work, errand, ending(pod))
    return work.failed


def watch(work: Pass[Any, Any], errand: Errand, batch: Batch) -> bool:
    """Tells what its pods wait for, and gives up one that will never start; True where the pass ends with that."""
    if batch.id.deleting:
        return False
    reason, message = errand.doing, errand.told
    for pod in work.seen.pods_of(batch):
        verdict = stuck(pod, now=work.now, patience=work.settings.pending_seconds)
        if verdict:
            work.stop(batch)
            try_again(work, errand, verdict)
            return work.failed
        hindered, why = hindrance(pod) if pod.phase == "Pending" else (Reason.STARTING, "")
        if hindered != Reason.STARTING:
            reason, message = Reason(hindered), why
        if hindered == Reason.IMAGE_PULL:
            work.wake(pod.id.created + timedelta(seconds=work.settings.pending_seconds))
    work.mark(errand.condition, "False", reason, message)
    return False


def try_again(work: Pass[Any, Any], errand: Errand, verdict: Ending) -> None:
    """Takes a failure from its budget, or fails the owner where there is none left."""
    if verdict.cls is FailureClass.OUT_OF_MEMORY:  # there is no micro-batch to halve
        work.fail(FailureCode.OUT_OF_MEMORY, f"{errand.name}: {verdict.message}", verdict.param)
    else:
        spend(work, verdict, free_in_a_row=work.status.restarts.free + 1)
    if not work.failed:
        work.mark(errand.condition, "False", Reason.BACK_OFF, f"{verdict.reason}: {verdict.message}")
    else:
        work.mark(errand.condition, "False", verdict.reason, verdict.message)


def send(work: Pass[Any, Any], errand: Errand, batch: Batch | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The Job to make now; None where it is there, has to wait, or something stands in its way."""
    if batch and not batch.gone:
        return None  # at work, or about to go to make room for the next
    if waits_for_its_turn(work):
        return None
    if batch is None and work.reason_of(errand.condition) and not work.seen.confirmed:
        work.doubt()
        return None
    manifest, owner = make(), work.seen.owner.id
    name = manifest["metadata"]["name"]
    obstacle = work.seen.obstacles.get(name) or work.seen.obstacles.get(names.config_name(owner.name, owner.uid))
    if obstacle:
        work.mark(errand.condition, "False", Reason.STARTING, obstacle)
        work.wake_in(OBSTACLE_SECONDS)
        return None
    work.mark(errand.condition, "False", errand.doing, errand.told)
    return manifest
