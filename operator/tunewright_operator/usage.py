"""Which unfinished jobs use which data: known at once, however many jobs there are."""

from typing import Final

from tunewright_crds.names import Phase
from tunewright_operator.observed import Job

Key = tuple[str, str]

_ENDED: Final = frozenset(phase for phase in Phase if phase.terminal)


class Usage:
    """Unfinished jobs by the InstructionDataset that they name. A key is a namespace and a name."""

    def __init__(self) -> None:
        self._key_of: dict[str, Key] = {}  # by the job's UID
        self._naming: dict[Key, dict[str, Key]] = {}  # the jobs' keys by UID
        self._waiting: dict[Key, dict[str, Key]] = {}  # those of them that have no data yet

    def put(self, job: Job) -> None:
        """Takes a job as it is now."""
        self.drop(job.id.uid)
        name = named_dataset(job)
        status = job.raw_status if name else {}
        if name and status.get("phase") not in _ENDED:
            dataset, key = (job.id.namespace, name), (job.id.namespace, job.id.name)
            self._key_of[job.id.uid] = dataset
            self._naming.setdefault(dataset, {})[job.id.uid] = key
            if not status.get("dataset"):
                self._waiting.setdefault(dataset, {})[job.id.uid] = key

    def drop(self, uid: str) -> None:
        """Forgets a job."""
        dataset = self._key_of.pop(uid, None)
        for held in (self._naming, self._waiting):
            users = held.get(dataset, {}) if dataset else {}
            users.pop(uid, None)
            if dataset and not users:
                held.pop(dataset, None)

    def of(self, uid: str) -> Key | None:
        """The InstructionDataset that a job uses until it ends."""
        return self._key_of.get(uid)

    def naming(self, dataset: Key) -> list[Key]:
        """The unfinished jobs that name it."""
        return list(self._naming.get(dataset, {}).values())

    def waiting(self, dataset: Key) -> list[Key]:
        """Those of them that have not taken its data yet."""
        return list(self._waiting.get(dataset, {}).values())


def named_dataset(job: Job) -> str:
    """The InstructionDataset that a job names; nothing where it names its sources, or the spec says nothing sensible."""
    dataset = job.spec.get("dataset")
    ref = dataset.get("ref") if isinstance(dataset, dict) else ""
    return ref if isinstance(ref, str) else ""
