"""Which resources use which data and which tuned models: known at once, however many there are."""

from enum import StrEnum
from typing import Final

from tunewright_crds.names import DatasetPhase, Phase
from tunewright_crds.references import references
from tunewright_operator.observed import Identity, Job, Prepared

Key = tuple[str, str]

_ENDED: Final = frozenset({*(phase.value for phase in Phase if phase.terminal), DatasetPhase.READY.value, DatasetPhase.FAILED.value})


class Use(StrEnum):
    """How a resource uses something. All but the last until it has ended; TRAINS goes by the data's digest, the others by a name."""

    NAMES = "names"  # a job, an InstructionDataset
    WAITS = "waits"  # a job, for an InstructionDataset
    TRAINS = "trains"  # a job, on prepared data
    AWAITS = "awaits"  # a job or an InstructionDataset, a TunedModel
    MAKES = "makes"  # a job, a TunedModel


class Usage:
    """Jobs and InstructionDatasets by what they use. A key is a namespace and a name, or a namespace and a digest."""

    def __init__(self) -> None:
        self._uses: dict[str, list[tuple[Use, Key]]] = {}  # by the user's UID
        self._users: dict[tuple[Use, Key], dict[str, Identity]] = {}  # by their UID

    def put(self, view: Job | Prepared) -> None:
        """Takes a resource as it is now."""
        self.drop(view.id.uid)
        uses = _uses_of_job(view) if isinstance(view, Job) else _awaits(view)
        if uses:
            self._uses[view.id.uid] = uses
        for use in uses:
            self._users.setdefault(use, {})[view.id.uid] = view.id

    def drop(self, uid: str) -> None:
        """Forgets a resource."""
        for use in self._uses.pop(uid, ()):
            users = self._users[use]
            del users[uid]
            if not users:
                del self._users[use]

    def used_by(self, uid: str, use: Use) -> list[Key]:
        """What a resource uses so."""
        return [key for kind, key in self._uses.get(uid, ()) if kind is use]

    def users(self, use: Use, key: Key) -> list[Identity]:
        """Who uses something so."""
        return list(self._users.get((use, key), {}).values())


def _uses_of_job(job: Job) -> list[tuple[Use, Key]]:
    namespace, status = job.id.namespace, job.raw_status
    uses = [(Use.MAKES, (namespace, model_name(job))), *_awaits(job)]
    if status.get("phase") in _ENDED:
        return uses
    taken, name = status.get("dataset") or {}, named_dataset(job)
    if taken:
        uses.append((Use.TRAINS, (namespace, str(taken.get("digest", "")))))
    if name:
        uses.append((Use.NAMES, (namespace, name)))
    if name and not taken:
        uses.append((Use.WAITS, (namespace, name)))
    return uses


def _awaits(view: Job | Prepared) -> list[tuple[Use, Key]]:
    """The tuned models that it names and has not taken, each once."""
    named = references(view.spec)
    status = view.raw_status if named else {}
    if status.get("phase") in _ENDED:
        return []
    taken = {entry.get("field") for entry in status.get("takenModels") or () if isinstance(entry, dict)}
    return [(Use.AWAITS, key) for key in {(view.id.namespace, one.name): None for one in named if one.field.name not in taken}]


def named_dataset(job: Job) -> str:
    """The InstructionDataset that a job names; nothing where it names its sources, or the spec says nothing sensible."""
    dataset = job.spec.get("dataset")
    ref = dataset.get("ref") if isinstance(dataset, dict) else ""
    return ref if isinstance(ref, str) else ""


def model_name(job: Job) -> str:
    """Name of the TunedModel that a job publishes; its own where the spec says nothing sensible."""
    output = job.spec.get("output")
    wanted = output.get("modelName") if isinstance(output, dict) else ""
    return wanted if isinstance(wanted, str) and wanted else job.id.name
