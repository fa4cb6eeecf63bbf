"""The one function that decides what happens to a job. Pure: no I/O, no clock, no framework.

It is level-based: it looks at what is there, not at what changed, so a change of the job, a change of a child, a restart and a resync are
the same to it, and asking twice does no harm.
"""

import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from pydantic import ValidationError

from tunewright_crds.dataset import DatasetStatus
from tunewright_crds.errors import FailureCode
from tunewright_crds.fields import TUNED_MODEL
from tunewright_crds.instruction_dataset import InstructionDatasetStatus
from tunewright_crds.job import read_spec
from tunewright_crds.names import Condition, DatasetPhase, Phase, Reason
from tunewright_crds.pod import Published
from tunewright_crds.status import JobStatus
from tunewright_crds.tuned_model import Serving
from tunewright_operator import builders
from tunewright_operator.attempts import deadline, hear_attempts, past_deadline, train
from tunewright_operator.conditions import condition
from tunewright_operator.evaluation import check_test_rows, evaluate, hear_evaluation, leave_out
from tunewright_operator.observed import Observed, Prepared, read_dataset_status
from tunewright_operator.plan import Plan, decide, tell_invalid
from tunewright_operator.preparation import hear_preparation, prepare
from tunewright_operator.settings import Settings
from tunewright_operator.tuned_models import take_the_models
from tunewright_operator.work import Work


def reconcile(seen: Observed, settings: Settings) -> Plan[JobStatus]:
    """What to do about one job, now."""
    work = Work.on(seen, settings)
    decide(work, STEPS)
    return work.plan


def leave_the_deleted(work: Work) -> bool:
    """A job on its way out takes its children with it; nothing is made for it any more."""
    return work.seen.job.id.deleting


def keep_the_finished(work: Work) -> bool:
    """A finished job is never run again. Its stray children are stopped, its model's readiness is told, and it goes when its time is over."""
    if not work.status.phase.terminal:
        return False
    work.stop_all()
    _tell_deployment(work)
    ttl = work.seen.job.spec.get("ttlSecondsAfterFinished")
    if isinstance(ttl, int) and work.status.completion_time:
        due = work.status.completion_time + timedelta(seconds=ttl)
        work.plan.delete_owner = work.now >= due
        if not work.plan.delete_owner:
            work.wake(due)
    return True


def _tell_deployment(work: Work) -> None:
    if work.status.phase is not Phase.SUCCEEDED or not (work.seen.job.spec.get("deploy") or {}).get("enabled"):
        return
    told = work.seen.model.raw_status if work.seen.model else {}
    ready = any(entry.get("type") == Condition.READY and entry.get("status") == "True" for entry in told.get("conditions") or ())
    if ready and work.status.model and told.get("servedVersion") == work.status.model.version:
        work.mark(Condition.DEPLOYED, "True", Reason.READY, f"answers at {told.get('endpoint', '')}")
    elif work.reason_of(Condition.DEPLOYED) != Reason.READY:
        work.mark(Condition.DEPLOYED, "False", Reason.NOT_READY, "waiting for a serving pod to load the model")


def read_the_spec(work: Work) -> bool:
    """A spec that makes no sense fails the job with the field's name; the resource's schema should not have let it pass."""
    try:
        work.spec = read_spec(work.seen.job.spec)
    except ValidationError as invalid:
        tell_invalid(work, invalid)
        return True
    return False


def take_up(work: Work) -> bool:
    """Starts the job's clock, unless it was applied suspended."""
    if work.status.start_time is None and not work.wanted.suspend and not work.wanted.cancel:
        work.status.start_time = work.now
    return False


def tell_the_checkpoint(work: Work) -> bool:
    """Says by an event that a checkpoint was saved that the job's owner had asked for."""
    last = work.status.last_checkpoint
    if last and last.request and last.request != work.status.answered_request:
        work.status.answered_request = last.request
        unique = f"checkpoint-{hashlib.sha256(last.request.encode()).hexdigest()[:16]}"
        work.tell(Reason.CHECKPOINT_SAVED, f"request {last.request}: step {last.step} is saved at {last.uri}", unique=unique)
    return False


def cancel(work: Work) -> bool:
    """Ends the job at its owner's wish, once its pods have saved what they had."""
    if not work.wanted.cancel:
        return False
    if work.stop_all():
        work.mark(Condition.TRAINING, "False", Reason.CANCELLED, "stopping")
        return True
    work.end(Phase.CANCELLED)
    work.mark(Condition.COMPLETE, "False", Reason.CANCELLED, "cancelled by its owner")
    work.tell(Reason.CANCELLED, "cancelled; checkpoints are kept", unique="cancelled")
    return True


def publish(work: Work) -> bool:
    """Registers what the last attempt published, once it is measured. Only now is the job complete."""
    model = work.status.model
    if model is None or not (work.evaluated or leave_out(work)):
        return False
    config, told = work.config, model.model_dump(include=set(Published.model_fields))
    metrics = work.status.evaluation.metrics if work.status.evaluation else []
    dataset = work.status.dataset or DatasetStatus()
    made_from = [f"{TUNED_MODEL}{taken.name}@{taken.version}" for taken in work.status.taken_models]
    work.plan.publish = builders.tuned_model(
        config,
        Published.model_validate(told),
        step=model.step,
        dataset=dataset,
        made_from=made_from,
        metrics=metrics,
        serving=_serving(work),
    )
    work.end(Phase.SUCCEEDED)
    work.mark(Condition.ARTIFACT_PUBLISHED, "True", Reason.PUBLISHED, model.uri)
    work.mark(Condition.COMPLETE, "True", Reason.SUCCEEDED, f"published as {config.model_name}, version {config.version}")
    if work.wanted.deploy.enabled:
        work.mark(Condition.DEPLOYED, "False", Reason.NOT_READY, "waiting for a serving pod to load the model")
    work.tell(Reason.SUCCEEDED, f"published {model.uri}", unique="succeeded")
    return True


def _serving(work: Work) -> Serving:
    """As the job wants it; a job that does not ask to serve leaves a model that is served already as it is."""
    deploy = work.wanted.deploy
    if deploy.enabled:
        return Serving(enabled=True, replicas=deploy.replicas, resources=deploy.resources)
    before = (work.seen.model.spec if work.seen.model else {}).get("serving") or {}
    try:
        return Serving.model_validate(before)
    except ValidationError:
        return Serving()


def keep_the_deadline(work: Work) -> bool:
    """Fails a job that takes too long, once its pods have saved."""
    due = deadline(work)
    if due is None or work.status.suspended_since is not None:
        return False
    if not past_deadline(work):
        work.wake(due)
        return False
    if work.stop_all():
        return True
    work.fail(FailureCode.DEADLINE_EXCEEDED, f"not done within {work.wanted.active_deadline_seconds} s", "spec.activeDeadlineSeconds")
    return True


def hold_or_resume(work: Work) -> bool:
    """Holds a suspended job; lets a resumed one go on."""
    if work.wanted.suspend:
        running = work.stop_all()
        if work.status.suspended_since is None:
            work.status.suspended_since = work.now
            work.tell(Reason.SUSPENDED, "suspended; goes on from its last checkpoint", unique=f"suspended-{work.seen.job.id.generation}")
        # While the pod saves it still holds its GPU.
        work.status.phase = work.status.phase if running else Phase.SUSPENDED
        work.mark(
            Condition.SUSPENDED, "False" if running else "True", Reason.SUSPENDED, "waiting for the pod to save" if running else "holding"
        )
        if work.reason_of(Condition.TRAINING):
            work.mark(Condition.TRAINING, "False", Reason.SUSPENDED)
        return True
    if work.status.suspended_since is not None:
        work.status.suspended_seconds += max(0, round((work.now - work.status.suspended_since).total_seconds()))
        work.status.suspended_since = None
        work.status.requeue = None
        work.status.phase = Phase.TRAINING if work.status.dataset else Phase.PREPARING
        work.mark(Condition.SUSPENDED, "False", Reason.RESUMED)
        work.tell(Reason.RESUMED, "resumed", unique=f"resumed-{work.seen.job.id.generation}")
    return False


def take_the_dataset(work: Work) -> bool:
    """A job that names an InstructionDataset takes what that one has prepared; True while it has to wait."""
    ref = work.wanted.dataset.ref
    if not ref or work.status.dataset:
        return False
    work.wait()
    named = work.seen.named
    status = read_dataset_status(named.raw_status) if named else None
    if named is None or status is None or named.id.deleting or status.phase in (DatasetPhase.PENDING, DatasetPhase.PREPARING):
        work.mark(Condition.DATA_READY, "False", Reason.WAITING_FOR_DATASET, _what_it_does(ref, named, status))
        return True
    if status.error:
        code = status.error.code if status.error.code in list(FailureCode) else FailureCode.INTERNAL
        work.fail(FailureCode(code), f"InstructionDataset {ref} failed: {status.error.message}", "spec.dataset.ref")
        work.mark(Condition.DATA_READY, "False", code, f"InstructionDataset {ref} failed")
        return True
    data = status.dataset or DatasetStatus()
    if work.wanted.hyperparameters.early_stopping.enabled and not data.validation_examples:
        message = f"early stopping needs validation rows, and InstructionDataset {ref} has none"
        work.fail(FailureCode.CONFIG_INVALID, message, "spec.hyperparameters.earlyStopping")
        return True
    work.status.dataset = data.model_copy(update={"reused": True})
    told = f"{data.train_examples} examples to train on, prepared by InstructionDataset {ref}"
    work.mark(Condition.DATA_READY, "True", Reason.DATA_PREPARED, told)
    work.tell(Reason.DATA_PREPARED, told, unique="prepared")
    return False


def _what_it_does(ref: str, named: Prepared | None, status: InstructionDatasetStatus | None) -> str:
    if named is None or status is None:
        return f"there is no InstructionDataset {ref} in this namespace: apply it"
    if named.id.deleting:
        return f"InstructionDataset {ref} is being deleted"
    found = (condition(status.conditions, type_) for type_ in (Condition.READY, Condition.MODEL_READY))
    told = next((entry.message for entry in found if entry and entry.message), "")
    return f"InstructionDataset {ref} is {status.phase.lower()}" + (f": {told}" if told else "")


STEPS: Final[tuple[Callable[[Work], bool], ...]] = (
    leave_the_deleted,
    keep_the_finished,
    read_the_spec,
    take_up,
    hear_preparation,
    hear_attempts,
    tell_the_checkpoint,
    hear_evaluation,
    cancel,
    publish,
    keep_the_deadline,
    hold_or_resume,
    take_the_models,
    take_the_dataset,
    prepare,
    check_test_rows,
    evaluate,
    train,
)
