"""The end of an InstructionDataset whose prepared data goes with it: held by our finalizer until storage is free of it."""

from datetime import timedelta
from typing import Final

from pydantic import ValidationError

from tunewright_crds import names
from tunewright_crds.instruction_dataset import DeletionPolicy, InstructionDatasetSpec
from tunewright_crds.names import Condition, Reason
from tunewright_operator import builders
from tunewright_operator.budgets import OBSTACLE_SECONDS
from tunewright_operator.conditions import condition
from tunewright_operator.observed import Batch
from tunewright_operator.work import DatasetWork

# Longer than a request to the API server may take: a job that took the data just before the deletion was seen is known by then.
GRACE_SECONDS: Final = 12.0
_LOOK_AGAIN_SECONDS: Final = 3.0
_TERMINATING: Final = "being terminated"  # what the API server says of a namespace in which nothing can be made any more


def hold(work: DatasetWork) -> bool:
    """Sees to our finalizer, as the owner wishes. It is there before any data is."""
    wanted = work.wanted.deletion_policy is DeletionPolicy.DELETE
    if wanted != work.seen.owner.id.held:
        work.plan.hold = wanted
    return work.plan.hold is True


def leave_the_deleted(work: DatasetWork) -> bool:
    """What is on its way out takes its children with it, and its data where it shall; nothing else is made for it any more."""
    if not work.seen.owner.id.deleting:
        return False
    if work.seen.owner.id.held and not work.stop_all():
        _let_go(work)
    return True


def _let_go(work: DatasetWork) -> None:
    kept = work.seen.owner.spec.get("deletionPolicy") != DeletionPolicy.DELETE
    digest = work.status.dataset.digest if work.status.dataset else ""
    if kept or not digest or work.seen.twins:
        work.plan.hold = False
        return
    if work.reason_of(Condition.READY) != Reason.DELETING:
        _tell(work, "its data is about to be removed from storage")
    marked = condition(work.status.conditions, Condition.READY)
    due = (marked.last_transition_time if marked else work.now) + timedelta(seconds=GRACE_SECONDS)
    if work.now < due:
        work.wake(due)
    elif work.seen.trainees:
        _tell(work, "its data stays until every unfinished job that trains on it has ended")
        work.wake_in(_LOOK_AGAIN_SECONDS)
    elif work.seen.discard:
        _hear(work, work.seen.discard)
    else:
        _discard(work, digest)


def _discard(work: DatasetWork, digest: str) -> None:
    owner = work.seen.owner.id
    obstacle = work.seen.obstacles.get(names.discard_name(owner.name, owner.uid), "")
    if _TERMINATING in obstacle:
        _leave_the_data(work, "the namespace is being deleted")
    elif obstacle:
        _tell(work, obstacle)
        work.wake_in(OBSTACLE_SECONDS)
    elif not _reads_the_spec(work):
        _leave_the_data(work, "its spec makes no sense")
    else:
        work.plan.create.append(builders.discard_job(work.config, owner, work.settings, digest=digest))
        _tell(work, "its data is being removed from storage")
        work.wake_in(_LOOK_AGAIN_SECONDS)


def _reads_the_spec(work: DatasetWork) -> bool:
    try:
        work.spec = InstructionDatasetSpec.model_validate(work.seen.owner.spec)
    except ValidationError:
        return False
    return True


def _hear(work: DatasetWork, batch: Batch) -> None:
    if batch.complete:
        work.tell(Reason.DATA_DISCARDED, "its data was removed from storage", unique="discarded")
        work.plan.hold = False
    elif batch.failed:
        _leave_the_data(work, f"the Job {batch.id.name} failed")
    else:
        work.wake_in(_LOOK_AGAIN_SECONDS)


def _leave_the_data(work: DatasetWork, why: str) -> None:
    where = f"{work.seen.owner.id.namespace}/datasets/{work.status.dataset.digest if work.status.dataset else ''}"
    work.tell(Reason.DATA_STAYS, f"{why}: its data stays in storage at {where}", unique="stays", warning=True)
    work.plan.hold = False


def _tell(work: DatasetWork, message: str) -> None:
    work.mark(Condition.READY, "False", Reason.DELETING, message)
