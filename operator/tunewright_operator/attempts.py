"""Training attempts: started one at a time, heard when they end, and tried again as the budget of their failure allows."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from tunewright_crds import names
from tunewright_crds.errors import FailureClass, FailureCode
from tunewright_crds.names import Condition, Phase, Reason
from tunewright_crds.pod import Outcome, PodConfig
from tunewright_crds.status import MAX_ATTEMPTS_TOLD, AttemptStatus
from tunewright_operator import builders
from tunewright_operator.budgets import OBSTACLE_SECONDS, spend, waits_for_its_turn
from tunewright_operator.failures import Ending, cause, ending, heard, hindrance, stuck
from tunewright_operator.observed import Batch, Pod
from tunewright_operator.work import Work

# A pod that outlives its Job is looked at again after so many seconds.
_LOOK_AGAIN_SECONDS: Final = 5.0
_FREE_ENDS: Final = frozenset({Reason.PREEMPTED, Reason.NODE_LOST, Reason.STOPPED})


def hear_attempts(work: Work) -> bool:
    """Learns what became of the attempts that there are, in their order: a crash may keep an attempt's end and the next one's start out of the status."""
    while not _hear_the_last(work):
        if not _take_in_the_next(work):
            return False
    return True


def _hear_the_last(work: Work) -> bool:
    """Learns what became of the last attempt on record; True where the pass ends with that."""
    attempt = work.attempt
    if attempt is None or attempt.end_time is not None:
        _stop_the_ended(work)
        return False
    batch = next((batch for batch in work.seen.attempts if batch.attempt == attempt.number), None)
    if batch is None:
        if not work.seen.confirmed:
            work.doubt()
            return True
        _conclude(work, attempt, ending(None), ended=work.now)
        return work.status.phase.terminal
    gang = work.seen.gang_of(batch)
    if not batch.finished:
        _watch(work, attempt, batch, gang)
        return work.status.phase.terminal
    if len(gang) < work.wanted.resources.nodes or not all(pod.finished for pod in gang):
        if not work.seen.confirmed:
            work.doubt()
            return True
        if not all(pod.finished for pod in gang):
            work.wake_in(_LOOK_AGAIN_SECONDS)
            return True
    _hear_the_end(work, attempt, gang)
    return work.status.phase.terminal


def _take_in_the_next(work: Work) -> bool:
    """Records an attempt whose Job was made just before a crash; False where there is none."""
    last = work.attempt
    following = next((batch for batch in work.seen.attempts if batch.attempt > (last.number if last else 0)), None)
    if following is None or (last and last.end_time is None):
        return False
    _record(work, following.attempt, following.id.created)
    return True


def _record(work: Work, number: int, start: datetime) -> None:
    halvings = work.status.restarts.out_of_memory + (work.status.memory.micro_batch_halvings if work.status.memory else 0)
    work.status.attempts.append(AttemptStatus(number=number, start_time=start, reason=Reason.RUNNING, micro_batch_halvings=halvings))
    del work.status.attempts[:-MAX_ATTEMPTS_TOLD]
    work.status.requeue = None
    work.status.phase = Phase.TRAINING
    work.mark(Condition.TRAINING, "False", Reason.STARTING, f"attempt {number} is starting")


def _stop_the_ended(work: Work) -> None:
    """A Job whose attempt is over on record was given up; a crash may have left it there."""
    for batch in work.seen.attempts:
        if work.attempt and batch.attempt <= work.attempt.number and not batch.finished:
            work.stop(batch)


def _watch(work: Work, attempt: AttemptStatus, batch: Batch, gang: Sequence[Pod]) -> None:
    """Keeps the status of a running attempt, and gives up one that will never start or no longer moves."""
    if batch.id.deleting:
        return
    hopeless = next((found for pod in gang if (found := stuck(pod, now=work.now, patience=work.settings.pending_seconds))), None)
    verdict = hopeless or _stalled(work, attempt)
    if verdict:
        work.stop(batch)
        _conclude(work, attempt, verdict, gang=gang, ended=work.now)
        return
    work.status.phase = Phase.TRAINING
    late = [pod for pod in gang if pod.phase != "Running" or pod.waiting]
    if not late and len(gang) >= work.wanted.resources.nodes:
        attempt.node = gang[0].node
        work.mark(Condition.TRAINING, "True", Reason.RUNNING, f"attempt {attempt.number} runs")
        return
    if any(pod.finished for pod in late):
        return  # its Job will tell in a moment
    pod = next(iter(late), None)
    reason, message = hindrance(pod)
    if reason != Reason.STARTING or work.reason_of(Condition.TRAINING) != Reason.STARTING:  # a start's steps are not worth a write each
        work.mark(Condition.TRAINING, "False", reason, f"attempt {attempt.number}: {message}")
    if reason == Reason.IMAGE_PULL and pod:
        work.wake(pod.id.created + timedelta(seconds=work.settings.pending_seconds))


def _stalled(work: Work, attempt: AttemptStatus) -> Ending | None:
    """Only reports that did come, and then stopped, are evidence; a pod that never reported may simply not reach the front end."""
    limit, progress = work.settings.stall_seconds, work.status.progress
    if not limit or progress is None or progress.attempt != attempt.number:
        return None
    due = progress.last_updated + timedelta(seconds=limit)
    if work.now < due:
        work.wake(due)
        return None
    return Ending.failing(FailureCode.STALLED, f"no progress since step {progress.step}, for more than {limit:.0f} s")


def _hear_the_end(work: Work, attempt: AttemptStatus, gang: Sequence[Pod]) -> None:
    for pod in gang:
        outcome = heard(pod)
        if outcome and outcome.artifact and outcome.error is None and pod.exit_code in (0, None):
            _fill(work, attempt, pod, outcome, pod.ended or work.now)
            attempt.reason = Reason.SUCCEEDED
            work.take_the_artifact(outcome.artifact, step=attempt.reached_step or 0)
            return
    verdict, culprit = cause(gang, nodes=work.wanted.resources.nodes)
    _conclude(work, attempt, verdict, gang=gang, ended=(culprit and culprit.ended) or work.now)


def _conclude(work: Work, attempt: AttemptStatus, verdict: Ending, *, gang: Sequence[Pod] = (), ended: datetime) -> None:
    """Writes the end of an attempt that published nothing, and what follows from it."""
    _fill(work, attempt, cause(gang, nodes=work.wanted.resources.nodes)[1], _said_most(gang), ended)
    asked = _asked_to_stop(work)
    if asked and verdict.cls is not FailureClass.USER:
        attempt.reason = asked
        return
    attempt.reason = verdict.reason
    work.tell(
        Reason.ATTEMPT_ENDED,
        f"attempt {attempt.number} ended: {verdict.reason}. {verdict.message}",
        unique=f"attempt-{attempt.number}-ended",
        warning=verdict.cls is not FailureClass.FREE,
    )
    _spend(work, verdict)


def _asked_to_stop(work: Work) -> str:
    """Whether the job's owner, or its deadline, wanted the attempt to end."""
    if work.wanted.cancel:
        return Reason.CANCELLED
    if past_deadline(work):
        return FailureCode.DEADLINE_EXCEEDED
    return Reason.SUSPENDED if work.wanted.suspend else ""


def _said_most(gang: Sequence[Pod]) -> Outcome | None:
    """The last words that tell most of the training: of the pod that had a checkpoint, and got furthest."""
    said = [outcome for pod in gang if (outcome := heard(pod))]
    return max(said, key=lambda outcome: (outcome.last_checkpoint is not None, outcome.reached_step or 0), default=None)


def _fill(work: Work, attempt: AttemptStatus, pod: Pod | None, outcome: Outcome | None, ended: datetime) -> None:
    """Numbers of an ended attempt: from its own last words, else from the last progress that it reported."""
    progress = work.status.progress if work.status.progress and work.status.progress.attempt == attempt.number else None
    attempt.end_time = ended
    if attempt.start_time:
        resources = work.wanted.resources
        lasted = max(0.0, (ended - attempt.start_time).total_seconds())
        work.status.gpu_seconds += round(resources.nodes * resources.gpus_per_node * lasted)
    if pod:
        attempt.exit_code, attempt.node = pod.exit_code, pod.node or attempt.node
    resumed = outcome.resumed_from_step if outcome else None
    reached = outcome.reached_step if outcome else None
    attempt.resumed_from_step = resumed if resumed is not None else (progress.resumed_from_step if progress else None)
    attempt.reached_step = reached if reached is not None else (progress.step if progress else None)
    attempt.rollbacks = outcome.rollbacks if outcome else 0
    _count_lost_steps(work, attempt)
    if outcome and outcome.last_checkpoint:
        work.status.last_checkpoint = outcome.last_checkpoint
    if outcome and outcome.best_checkpoint:
        work.status.best_checkpoint = outcome.best_checkpoint


def _count_lost_steps(work: Work, attempt: AttemptStatus) -> None:
    """What this attempt had to do again is what those before it lost; one that never told of a step had none to lose."""
    if attempt.resumed_from_step is None:
        return
    for before in sorted(work.status.attempts, key=lambda entry: entry.number, reverse=True):
        if before.number >= attempt.number:
            continue
        if before.lost_steps is not None:
            return
        before.lost_steps = max(0, (before.reached_step or 0) - attempt.resumed_from_step)


def _spend(work: Work, verdict: Ending) -> None:
    restarts = work.status.restarts
    if verdict.cls is FailureClass.OUT_OF_MEMORY and restarts.out_of_memory < work.wanted.retries.out_of_memory:
        restarts.out_of_memory += 1
        work.status.requeue = None
    else:
        spend(work, verdict, free_in_a_row=_free_in_a_row(work))


def _free_in_a_row(work: Work) -> int:
    """Free ends of late without a step done in between."""
    in_a_row = 0
    for attempt in reversed(work.status.attempts):
        moved = (attempt.reached_step or 0) > (attempt.resumed_from_step or 0)
        if attempt.reason not in _FREE_ENDS or moved:
            break
        in_a_row += 1
    return in_a_row


def train(work: Work) -> bool:
    """Starts the next attempt, unless one is there."""
    attempt = work.attempt
    if (attempt and attempt.end_time is None) or work.still_running():
        return True
    number = attempt.number + 1 if attempt else 1
    if waits_for_its_turn(work):
        when = work.status.requeue and work.status.requeue.not_before
        work.mark(Condition.TRAINING, "False", Reason.BACK_OFF, f"attempt {number} starts after {when:%Y-%m-%dT%H:%M:%SZ}")
        return True
    job, dataset, config = work.seen.job.id, work.status.dataset, work.config
    manifest = builders.training_job(
        config,
        job,
        work.settings,
        attempt=number,
        dataset=dataset.digest if dataset else "",
        halvings=work.status.restarts.out_of_memory,
    )
    others = (names.config_name(job.name, job.uid), names.peers_name(job.uid))
    obstacle = next((found for name in (manifest["metadata"]["name"], *others) if (found := work.seen.obstacles.get(name))), "")
    if obstacle:
        work.mark(Condition.TRAINING, "False", Reason.STARTING, obstacle)
        work.wake_in(OBSTACLE_SECONDS)
        return True
    if number > 1 or work.wanted.dataset.ref:
        see_to_the_config(work, config)
    if config.spec.resources.nodes > 1:
        work.plan.create += builders.peers(job)
    work.plan.create.append(manifest)
    _record(work, number, work.now)
    if number > 1:  # the first starts with the event that the data is prepared
        work.tell(Reason.ATTEMPT_STARTED, f"attempt {number} started", unique=f"attempt-{number}-started")
    return True


def see_to_the_config(work: Work, config: PodConfig) -> None:
    """Makes the job's ConfigMap, or, where the InstructionDataset that it would be made of is gone, asks for the one that there was."""
    if not config.spec.dataset.ref:
        work.make_config()
    else:
        work.plan.needs = names.config_name(work.seen.job.id.name, work.seen.job.id.uid)


def deadline(work: Work) -> datetime | None:
    """When the job must be done; time spent suspended does not count."""
    limit, start = work.wanted.active_deadline_seconds, work.status.start_time
    if limit is None or start is None:
        return None
    return start + timedelta(seconds=limit + work.status.suspended_seconds)


def past_deadline(work: Work) -> bool:
    """Whether the job took longer than it may. A suspended job's clock stands still."""
    due = deadline(work)
    if due is None or work.status.suspended_since is not None:
        return False
    return work.now >= due
