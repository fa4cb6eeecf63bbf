"""What happens to an InstructionDataset, decided as for a job: level-based, pure, in steps."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from pydantic import ValidationError

from tunewright_crds.instruction_dataset import InstructionDatasetSpec, InstructionDatasetStatus
from tunewright_crds.job import Hyperparameters, JobSpec, PreparationRetries, Resources, Retries
from tunewright_crds.names import Condition, DatasetPhase
from tunewright_crds.pod import PodConfig
from tunewright_operator import builders
from tunewright_operator.observed import ObservedDataset, read_dataset_status
from tunewright_operator.plan import Pass, Plan, tell_invalid
from tunewright_operator.preparation import hear_preparation, prepare
from tunewright_operator.settings import Settings

SETTLED: Final = (DatasetPhase.READY, DatasetPhase.FAILED)


@dataclass
class DatasetWork(Pass[InstructionDatasetStatus]):
    """One pass over one InstructionDataset."""

    seen: ObservedDataset
    spec: InstructionDatasetSpec | None = None

    data_condition = Condition.READY

    @property
    def wanted(self) -> InstructionDatasetSpec:
        """The typed spec, once it is read."""
        if self.spec is None:
            raise RuntimeError("the spec is used before it is read")
        return self.spec

    @property
    def retries(self) -> PreparationRetries:
        return self.wanted.retries

    @property
    def config(self) -> PodConfig:
        """What the preparing pods are told: a job of nothing but data."""
        wanted = self.wanted
        spec = JobSpec(
            model=wanted.model,
            dataset=wanted.dataset,
            hyperparameters=Hyperparameters(seed=wanted.seed),
            resources=Resources.model_validate(wanted.resources.model_dump()),
            retries=Retries(infrastructure=wanted.retries.infrastructure),
        )
        return builders.pod_config(self.seen.owner.id, spec, self.settings).model_copy(update={"progress_url": ""})

    def begin(self) -> None:
        self.status.phase = DatasetPhase.PREPARING

    def give_up(self) -> None:
        self.status.phase = DatasetPhase.FAILED
        self.settle()
        if self.status.error:
            self.mark(Condition.READY, "False", self.status.error.code, self.status.error.message)

    def settle(self) -> None:
        """Nothing is prepared any more."""
        self.status.completion_time = self.now
        self.status.requeue = None
        self.stop_all()


def reconcile_dataset(seen: ObservedDataset, settings: Settings) -> Plan[InstructionDatasetStatus]:
    """What to do about one InstructionDataset, now. Each step says whether the pass ends with it."""
    work = DatasetWork(seen, settings, Plan(read_dataset_status(seen.owner.raw_status)))
    for step in STEPS:
        if step(work):
            break
    if not work.plan.doubtful and not seen.owner.id.deleting:
        work.status.observed_generation = seen.owner.id.generation
    return work.plan


def leave_the_deleted(work: DatasetWork) -> bool:
    """Its children go with it; nothing is made for it any more."""
    return work.seen.owner.id.deleting


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
    count_users,
    keep_the_settled,
    take_up,
    hear_preparation,
    become_ready,
    prepare,
)
