"""Which unfinished jobs use which data: known at once, however many jobs there are."""

from enum import StrEnum
from typing import Final

from tunewright_crds.names import Phase
from tunewright_operator.observed import Job

Key = tuple[str, str]

_ENDED: Final = frozenset(phase for phase in Phase if phase.terminal)


class Use(StrEnum):
    """How an unfinished job uses data. The first two go by the InstructionDataset's name, the last by the digest."""

    NAMES = "names"
    WAITS = "waits"
    TRAINS = "trains"


class Usage:
    """Unfinished jobs by the data that they use. A key is a namespace and a name, or a namespace and a digest."""

    def __init__(self) -> None:
        self._uses: dict[str, list[tuple[Use, Key]]] = {}  # by the job's UID
        self._users: dict[tuple[Use, Key], dict[str, Key]] = {}  # the jobs' keys by UID

    def put(self, job: Job) -> None:
        """Takes a job as it is now."""
        self.drop(job.id.uid)
        uses = _uses(job)
        if uses:
            self._uses[job.id.uid] = uses
        for use in uses:
            self._users.setdefault(use, {})[job.id.uid] = (job.id.namespace, job.id.name)

    def drop(self, uid: str) -> None:
        """Forgets a job."""
        for use in self._uses.pop(uid, ()):
            users = self._users[use]
            del users[uid]
            if not users:
                del self._users[use]

    def named_by(self, uid: str) -> Key | None:
        """The InstructionDataset that a job names, until it ends."""
        return next((key for use, key in self._uses.get(uid, ()) if use is Use.NAMES), None)

    def users(self, use: Use, key: Key) -> list[Key]:
        """The jobs that use something so."""
        return list(self._users.get((use, key), {}).values())


def _uses(job: Job) -> list[tuple[Use, Key]]:
    status = job.raw_status
    if status.get("phase") in _ENDED:
        return []
    taken, name = status.get("dataset") or {}, named_dataset(job)
    uses = [(Use.TRAINS, (job.id.namespace, str(taken.get("digest", ""))))] if taken else []
    if name:
        uses.append((Use.NAMES, (job.id.namespace, name)))
    if name and not taken:
        uses.append((Use.WAITS, (job.id.namespace, name)))
    return uses


def named_dataset(job: Job) -> str:
    """The InstructionDataset that a job names; nothing where it names its sources, or the spec says nothing sensible."""
    dataset = job.spec.get("dataset")
    ref = dataset.get("ref") if isinstance(dataset, dict) else ""
    return ref if isinstance(ref, str) else ""
