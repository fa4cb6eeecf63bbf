"""The one function that decides what happens to a job. Pure: no I/O, no clock, no framework.

It is level-based: it looks at what is there, not at what changed, so a change of the job, a change of a child, a restart and a resync are
the same to it, and asking twice does no harm.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Final

from pydantic import ValidationError

from tunewright_crds import names
from tunewright_crds.dataset import DatasetStatus
from tunewright_crds.errors import FailureClass, FailureCode
from tunewright_crds.job import ModelStatus, read_spec
from tunewright_crds.names import Condition, Phase, Reason
from tunewright_crds.tuned_model import Serving
from tunewright_operator import builders
from tunewright_operator.attempts import OBSTACLE_SECONDS, deadline, hear_attempts, past_deadline, spend, train, waits_for_its_turn
from tunewright_operator.failures import Ending, ending, heard, hindrance, stuck
from tunewright_operator.observed import Batch, Observed
from tunewright_operator.plan import Plan, Work
from tunewright_operator.settings import Settings


def reconcile(seen: Observed, settings: Settings) -> Plan:
    """What to do about one job, now. Each step says whether the pass ends with it."""
    work = Work.on(seen, settings)
    for step in STEPS:
        if step(work):
            break
    if not work.plan.doubtful and not seen.job.id.deleting:
        work.status.observed_generation = seen.job.id.generation
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
        work.plan.delete_job = work.now >= due
        if not work.plan.delete_job:
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
        first = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(["spec", *(str(part) for part in first["loc"])])
        work.fail(FailureCode.CONFIG_INVALID, f"{place}: {first['msg']}", place)
        return True
    return False


def take_up(work: Work) -> bool:
    """Starts the job's clock, unless it was applied suspended."""
    if work.status.start_time is None and not work.wanted.suspend and not work.wanted.cancel:
        work.status.start_time = work.now
    return False


def hear_preparation(work: Work) -> bool:
    """Learns what became of the data's preparation."""
    batch = work.seen.preparation
    if work.status.dataset or batch is None:
        return False
    pod = work.seen.pod_of(batch)
    if not batch.finished:
        return _watch_preparation(work, batch)
    outcome = heard(pod)
    if outcome and outcome.dataset and outcome.error is None:
        work.status.dataset = outcome.dataset
        work.status.requeue = None
        told = f"{outcome.dataset.train_examples} examples to train on, {outcome.dataset.rejected} rejected"
        work.mark(Condition.DATA_READY, "True", Reason.DATA_PREPARED, told)
        work.tell(Reason.DATA_PREPARED, told, unique="prepared")
        return False
    if batch.gone or batch.id.deleting:
        return False  # judged before, or taken away by somebody: prepared anew
    if (pod is None or not pod.finished) and not work.seen.confirmed:
        work.doubt()
        return True
    work.stop(batch)
    _try_preparation_again(work, ending(pod))
    return work.status.phase.terminal


def _watch_preparation(work: Work, batch: Batch) -> bool:
    if batch.id.deleting:
        return False
    pod = work.seen.pod_of(batch)
    verdict = pod and stuck(pod, now=work.now, patience=work.settings.pending_seconds)
    if verdict:
        work.stop(batch)
        _try_preparation_again(work, verdict)
        return work.status.phase.terminal
    work.status.phase = Phase.PREPARING
    reason, message = (Reason.VALIDATING_DATA, "the data is being prepared")
    if pod and pod.phase == "Pending":
        hindered, why = hindrance(pod)
        if hindered != Reason.STARTING:
            reason, message = Reason(hindered), why
        if hindered == Reason.IMAGE_PULL:
            work.wake(pod.id.created + timedelta(seconds=work.settings.pending_seconds))
    work.mark(Condition.DATA_READY, "False", reason, message)
    return False


def _try_preparation_again(work: Work, verdict: Ending) -> None:
    if verdict.cls is FailureClass.OUT_OF_MEMORY:  # there is no micro-batch to halve
        work.fail(FailureCode.OUT_OF_MEMORY, f"data preparation: {verdict.message}", verdict.param)
    else:
        spend(work, verdict)
    if not work.status.phase.terminal:
        work.mark(Condition.DATA_READY, "False", Reason.BACK_OFF, f"{verdict.reason}: {verdict.message}")
    else:
        work.mark(Condition.DATA_READY, "False", verdict.reason, verdict.message)


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
    """Registers what the last attempt published. Only now is the job complete."""
    if work.artifact is None:
        return False
    config, artifact = work.config, work.artifact
    dataset = work.status.dataset or DatasetStatus()
    work.plan.publish = builders.tuned_model(config, artifact, step=work.reached, dataset=dataset, serving=_serving(work))
    work.status.model = ModelStatus(name=config.model_name, version=config.version, uri=artifact.uri)
    work.end(Phase.SUCCEEDED)
    work.mark(Condition.ARTIFACT_PUBLISHED, "True", Reason.PUBLISHED, artifact.uri)
    work.mark(Condition.COMPLETE, "True", Reason.SUCCEEDED, f"published as {config.model_name}, version {config.version}")
    if work.wanted.deploy.enabled:
        work.mark(Condition.DEPLOYED, "False", Reason.NOT_READY, "waiting for a serving pod to load the model")
    work.tell(Reason.SUCCEEDED, f"published {artifact.uri}", unique="succeeded")
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


def prepare(work: Work) -> bool:
    """Has the data prepared, once. No GPU is asked for before that is done."""
    if work.status.dataset:
        return False
    batch, job = work.seen.preparation, work.seen.job.id
    work.status.phase = Phase.PREPARING
    if batch and not batch.gone:
        return True  # at work, or about to go to make room for the next
    if waits_for_its_turn(work):
        return True
    if batch is None and work.reason_of(Condition.DATA_READY) and not work.seen.confirmed:
        work.doubt()
        return True
    manifest = builders.prepare_job(work.config, job, work.settings)
    name = manifest["metadata"]["name"]
    obstacle = work.seen.obstacles.get(name) or work.seen.obstacles.get(names.config_name(job.name, job.uid))
    if obstacle:
        work.mark(Condition.DATA_READY, "False", Reason.STARTING, obstacle)
        work.wake_in(OBSTACLE_SECONDS)
        return True
    work.plan.create += [builders.config_map(work.config, job), manifest]
    work.mark(Condition.DATA_READY, "False", Reason.VALIDATING_DATA, "the data is being prepared")
    return True


STEPS: Final[tuple[Callable[[Work], bool], ...]] = (
    leave_the_deleted,
    keep_the_finished,
    read_the_spec,
    take_up,
    hear_preparation,
    hear_attempts,
    cancel,
    publish,
    keep_the_deadline,
    hold_or_resume,
    prepare,
    train,
)
