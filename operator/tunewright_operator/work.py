"""A pass over a job, and a pass over an InstructionDataset: their typed specs and statuses, and what their pods are told."""

from dataclasses import dataclass

from tunewright_crds.hyperparameters import Hyperparameters
from tunewright_crds.instruction_dataset import InstructionDatasetSpec, InstructionDatasetStatus
from tunewright_crds.job import JobSpec, Retries
from tunewright_crds.names import Condition, DatasetPhase, Phase, Reason
from tunewright_crds.pod import Outcome, PodConfig, Published
from tunewright_crds.resources import Resources
from tunewright_crds.status import AttemptStatus, JobStatus, ModelStatus
from tunewright_operator import builders
from tunewright_operator.nodes import gpu_memory
from tunewright_operator.observed import Observed, ObservedDataset, read_dataset_status, read_status
from tunewright_operator.plan import Pass, Plan
from tunewright_operator.settings import Settings


@dataclass
class Work(Pass[JobStatus, JobSpec]):
    """One pass over one job."""

    seen: Observed
    data_condition = Condition.DATA_READY

    @classmethod
    def on(cls, seen: Observed, settings: Settings) -> "Work":
        """The start of a pass: the status as it stands, nothing decided."""
        return cls(seen, settings, Plan(read_status(seen.job.raw_status)))

    @property
    def config(self) -> PodConfig:
        """What the job's pods are told: instead of the name of an InstructionDataset, how that one was prepared, unless it is gone."""
        wanted, named = self.wanted, self._named
        if named:
            template = wanted.model.chat_template or named.model.chat_template
            model = wanted.model.model_copy(update={"chat_template": template})
            wanted = wanted.model_copy(update={"model": model, "dataset": named.dataset})
        config = builders.pod_config(self.seen.job.id, self.with_taken_models(wanted), self.settings)
        return config.model_copy(update={"gpu_memory": gpu_memory(self.seen.nodes, wanted.resources)})

    @property
    def _named(self) -> InstructionDatasetSpec | None:
        """The InstructionDataset whose data the job has taken."""
        named, taken = self.seen.named, self.status.dataset
        if named is None or taken is None:
            return None
        theirs = read_dataset_status(named.raw_status).dataset
        same = theirs is not None and theirs.digest == taken.digest
        return InstructionDatasetSpec.model_validate(named.spec) if same else None

    @property
    def attempt(self) -> AttemptStatus | None:
        """The last attempt, ended or not."""
        return self.status.attempts[-1] if self.status.attempts else None

    def wait(self) -> None:
        self.status.phase = Phase.PENDING

    @property
    def evaluated(self) -> bool:
        """Whether the model was measured, and is as good as it shall be."""
        return self.reason_of(Condition.EVALUATED) == Reason.EVALUATED

    def take_the_artifact(self, artifact: Published, *, step: int) -> None:
        """Writes what the last attempt published: it lies in storage, and is registered once it is measured."""
        config = self.config
        self.status.model = ModelStatus(
            name=config.model_name,
            version=config.version,
            uri=artifact.uri,
            kind=artifact.kind,
            digest=artifact.digest,
            base=artifact.base,
            forms=artifact.forms,
            hub=artifact.hub,
            step=step,
        )
        self.mark(Condition.TRAINING, "False", Reason.SUCCEEDED)
        if artifact.hub and artifact.hub.error:
            self.tell(Reason.NOT_ON_THE_HUB, f"not copied to the hub: {artifact.hub.error}", unique="hub", warning=True)

    def begin(self) -> None:
        self.status.phase = Phase.PREPARING

    def hear_of_memory(self, outcome: Outcome | None) -> None:
        if outcome is None or outcome.memory is None or outcome.memory == self.status.memory:
            return
        self.status.memory = outcome.memory
        if outcome.memory.fits == "tight":
            self.tell(Reason.MEMORY_TIGHT, f"memory may not be enough: {outcome.memory.advice}", unique="memory", warning=True)

    def give_up(self) -> None:
        self.end(Phase.FAILED)

    def end(self, phase: Phase) -> None:
        """Makes a phase terminal."""
        self.status.phase = phase
        self.status.completion_time = self.now
        self.status.requeue = None
        if self.reason_of(Condition.TRAINING):
            self.mark(Condition.TRAINING, "False", Reason.SUCCEEDED if self.status.model else Reason.STOPPED)
        self.stop_all()


@dataclass
class DatasetWork(Pass[InstructionDatasetStatus, InstructionDatasetSpec]):
    """One pass over one InstructionDataset."""

    seen: ObservedDataset

    data_condition = Condition.READY

    @classmethod
    def on(cls, seen: ObservedDataset, settings: Settings) -> "DatasetWork":
        """The start of a pass: the status as it stands, nothing decided."""
        return cls(seen, settings, Plan(read_dataset_status(seen.owner.raw_status)))

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
        return builders.pod_config(self.seen.owner.id, self.with_taken_models(spec), self.settings).model_copy(update={"progress_url": ""})

    def wait(self) -> None:
        self.status.phase = DatasetPhase.PENDING

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
