"""What a pass over a job or an InstructionDataset decides, and what the steps of the pass share while they decide it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from tunewright_crds.errors import ADVICE, FailureCode
from tunewright_crds.instruction_dataset import InstructionDatasetSpec
from tunewright_crds.job import JobSpec
from tunewright_crds.names import Condition
from tunewright_crds.pod import Outcome, PodConfig, clean
from tunewright_crds.references import with_addresses
from tunewright_crds.status import ErrorStatus
from tunewright_operator import builders
from tunewright_operator.conditions import Truth, condition, set_condition
from tunewright_operator.observed import Batch, Family, S
from tunewright_operator.settings import Settings


@dataclass(frozen=True, slots=True)
class Told:
    """An Event for people. The same ``unique`` is told once, whatever crashes in between."""

    reason: str
    message: str
    unique: str
    warning: bool = False


@dataclass
class Plan(Generic[S]):
    """What is to be done, in this order: delete, create, publish, status, events."""

    status: S
    delete: list[Batch] = field(default_factory=list)
    on_gpus: bool = False  # makes a ConfigMap that tells the memory of GPUs: look at the nodes, and decide again
    needs: str = ""  # a ConfigMap that must be there before anything is made
    create: list[dict[str, Any]] = field(default_factory=list)
    publish: dict[str, Any] | None = None
    events: list[Told] = field(default_factory=list)
    wake_at: datetime | None = None
    delete_owner: bool = False
    hold: bool | None = None  # our finalizer: put it on, and decide again; or take it off when all is done
    doubtful: bool = False  # something is missing: look at the API server itself and decide again; nothing else of the plan counts


P = TypeVar("P", bound=JobSpec | InstructionDatasetSpec)


@dataclass
class Pass(ABC, Generic[S, P]):
    """One pass over a resource that has data prepared. Steps read ``seen`` and write ``plan``."""

    seen: Family
    settings: Settings
    plan: Plan[S]
    spec: P | None = None

    data_condition: ClassVar[Condition]  # tells of the data

    @property
    @abstractmethod
    def config(self) -> PodConfig:
        """What the pods are told."""

    @abstractmethod
    def wait(self) -> None:
        """Writes the phase of waiting for another resource."""

    @abstractmethod
    def begin(self) -> None:
        """Writes the phase of preparing."""

    @abstractmethod
    def give_up(self) -> None:
        """Writes the phase of failure, and what belongs to it."""

    def hear_of_memory(self, outcome: Outcome | None) -> None:
        """Takes what data preparation says of the memory that training will need."""

    def make_config(self) -> None:
        """Has the immutable ConfigMap made that all pods read."""
        config = self.config
        self.plan.on_gpus = config.spec.resources.gpus_per_node > 0
        self.plan.create.append(builders.config_map(config, self.seen.owner.id))

    @property
    def wanted(self) -> P:
        """The typed spec, once it is read."""
        if self.spec is None:
            raise RuntimeError("the spec is used before it is read")
        return self.spec

    def with_taken_models(self, spec: JobSpec) -> JobSpec:
        """What pods are told: of tuned models that the spec names, the addresses that were taken."""
        return with_addresses(spec, {taken.field: taken.uri for taken in self.status.taken_models})

    @property
    def now(self) -> datetime:
        """The moment that the pass is made for."""
        return self.seen.now

    @property
    def status(self) -> S:
        """The status as it shall be."""
        return self.plan.status

    @property
    def failed(self) -> bool:
        """Whether there is nothing more to try."""
        return self.status.error is not None

    def mark(self, type_: Condition, status: Truth, reason: str, message: str = "") -> None:
        """Writes a condition."""
        generation = self.seen.owner.id.generation
        set_condition(self.status.conditions, type_, status, reason=reason, message=message, generation=generation, now=self.now)

    def reason_of(self, type_: Condition) -> str:
        """The reason of a condition; empty where there is none."""
        found = condition(self.status.conditions, type_)
        return found.reason if found else ""

    def tell(self, reason: str, message: str, *, unique: str, warning: bool = False) -> None:
        """Adds an Event."""
        uid = self.seen.owner.id.uid[:8]
        self.plan.events.append(Told(str(reason), clean(message), f"{uid}-{unique}".lower(), warning))

    def wake(self, at: datetime) -> None:
        """Asks for another pass at a time; the earliest wish holds."""
        self.plan.wake_at = min(at, self.plan.wake_at or at)

    def wake_in(self, seconds: float) -> None:
        """Asks for another pass after some seconds."""
        self.wake(self.now + timedelta(seconds=seconds))

    def doubt(self) -> None:
        """Asks to decide again on what the API server says live."""
        self.plan.doubtful = True

    def stop(self, batch: Batch) -> None:
        """Deletes a batch Job with its pods; they get SIGTERM and time to save."""
        if not batch.gone and not batch.id.deleting and batch not in self.plan.delete:
            self.plan.delete.append(batch)

    def still_running(self) -> list[Batch]:
        """Batch Jobs that have, or may still start, a pod."""
        return [batch for batch in self.seen.batches if not batch.finished]

    def stop_all(self) -> bool:
        """Stops whatever runs; True while something still does."""
        running = self.still_running()
        for batch in running:
            self.stop(batch)
        return bool(running)

    def fail(self, code: FailureCode, message: str, param: str = "") -> None:
        """Ends it for good, with advice."""
        self.status.error = ErrorStatus(code=code.value, message=clean(message), param=clean(param), advice=ADVICE[code])
        self.give_up()
        self.mark(Condition.FAILED, "True", code.value, message)
        self.tell(code.value, message, unique="failed", warning=True)


W = TypeVar("W", bound=Pass[Any, Any])


def decide(work: W, steps: Iterable[Callable[[W], bool]]) -> None:
    """Takes the steps, of which each says whether the pass ends with it."""
    for step in steps:
        if step(work):
            break
    owner = work.seen.owner.id
    if not work.plan.doubtful and not owner.deleting:
        work.status.observed_generation = owner.generation


def tell_invalid(work: Pass[Any, Any], invalid: ValidationError) -> None:
    """Fails for a spec that makes no sense, with the field's name."""
    first = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(["spec", *(str(part) for part in first["loc"])])
    work.fail(FailureCode.CONFIG_INVALID, f"{place}: {first['msg']}", place)
