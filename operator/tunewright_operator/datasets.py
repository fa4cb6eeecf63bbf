"""What happens to an InstructionDataset, decided as for a job: level-based, pure, in steps."""

from collections.abc import Callable
from datetime import timedelta
from typing import Final

from pydantic import ValidationError

from tunewright_crds.instruction_dataset import InstructionDatasetSpec, InstructionDatasetStatus
from tunewright_crds.names import DatasetPhase
from tunewright_operator.observed import ObservedDataset
from tunewright_operator.plan import Plan, decide, tell_invalid
from tunewright_operator.preparation import hear_preparation, prepare
from tunewright_operator.retention import hold, leave_the_deleted
from tunewright_operator.settings import Settings
from tunewright_operator.tuned_models import take_the_models
from tunewright_operator.work import DatasetWork

SETTLED: Final = (DatasetPhase.READY, DatasetPhase.FAILED)


def reconcile_dataset(seen: ObservedDataset, settings: Settings) -> Plan[InstructionDatasetStatus]:
    """What to do about one InstructionDataset, now."""
    work = DatasetWork.on(seen, settings)
    decide(work, STEPS)
    return work.plan


def read_the_spec(work: DatasetWork) -> bool:
    """A spec that makes no sense fails with the field's name."""
    try:
        work.spec = InstructionDatasetSpec.model_validate(work.seen.owner.spec)
    except ValidationError as invalid:
        if work.status.phase not in SETTLED:
            tell_invalid(work, invalid)
        return True
    return False


def count_users(work: DatasetWork) -> bool:
    """Tells how many unfinished jobs name it, and when one last came or ended."""
    if work.status.users != work.seen.users:
        work.status.users, work.status.last_used = work.seen.users, work.now
    return False


def keep_the_settled(work: DatasetWork) -> bool:
    """What is prepared, or failed, is not prepared again; it goes when nobody has used it for as long as its owner said."""
    if work.status.phase not in SETTLED:
        return False
    work.stop_all()
    ttl, since = work.wanted.ttl_seconds_after_last_use, work.status.last_used or work.status.completion_time
    if ttl is not None and since and not work.seen.users:
        due = since + timedelta(seconds=ttl)
        work.plan.delete_owner = work.now >= due
        if not work.plan.delete_owner:
            work.wake(due)
    return True


def take_up(work: DatasetWork) -> bool:
    """Starts its clock."""
    work.status.start_time = work.status.start_time or work.now
    return False


def become_ready(work: DatasetWork) -> bool:
    """The data is there: jobs may take it."""
    if work.status.dataset is None:
        return False
    work.status.phase = DatasetPhase.READY
    work.settle()
    return True


STEPS: Final[tuple[Callable[[DatasetWork], bool], ...]] = (
    leave_the_deleted,
    read_the_spec,
    hold,
    count_users,
    keep_the_settled,
    take_up,
    hear_preparation,
    become_ready,
    take_the_models,
    prepare,
)
