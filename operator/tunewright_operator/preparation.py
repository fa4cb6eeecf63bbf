"""The preparation of data, for a job or for an InstructionDataset: made, heard, and tried again as its budget allows."""

from datetime import timedelta
from typing import Any

from tunewright_crds import names
from tunewright_crds.errors import FailureClass, FailureCode
from tunewright_crds.names import Reason
from tunewright_operator import builders
from tunewright_operator.budgets import OBSTACLE_SECONDS, spend, waits_for_its_turn
from tunewright_operator.failures import Ending, ending, gravest, heard, hindrance, stuck
from tunewright_operator.observed import Batch
from tunewright_operator.plan import Pass


def hear_preparation(work: Pass[Any, Any]) -> bool:
    """Learns what became of the data's preparation; True where the pass ends with that."""
    return not work.status.dataset and (_hear_shards(work) or _hear_prepared(work))


def _hear_shards(work: Pass[Any, Any]) -> bool:
    batch = work.seen.shards
    if batch is None or batch.complete:
        return False
    if not batch.finished:
        return _watch(work, batch)
    if batch.gone or batch.id.deleting:
        return False
    broke = [pod for pod in work.seen.pods_of(batch) if pod.finished and pod.exit_code != 0]
    if not broke and not work.seen.confirmed:
        work.doubt()
        return True
    work.stop(batch)
    _try_again(work, gravest(broke))
    return work.failed


def _hear_prepared(work: Pass[Any, Any]) -> bool:
    batch = work.seen.preparation
    if batch is None:
        return False
    pod = work.seen.pod_of(batch)
    if not batch.finished:
        return _watch(work, batch)
    outcome = heard(pod)
    work.hear_of_memory(outcome)
    if outcome and outcome.dataset and outcome.error is None:
        work.status.dataset = outcome.dataset
        work.status.requeue = None
        told = f"{outcome.dataset.train_examples} examples to train on, {outcome.dataset.rejected} rejected"
        work.mark(work.data_condition, "True", Reason.DATA_PREPARED, told)
        work.tell(Reason.DATA_PREPARED, told, unique="prepared")
        return False
    if batch.gone or batch.id.deleting:
        return False  # judged before, or taken away by somebody: prepared anew
    if (pod is None or not pod.finished) and not work.seen.confirmed:
        work.doubt()
        return True
    work.stop(batch)
    _try_again(work, ending(pod))
    return work.failed


def _watch(work: Pass[Any, Any], batch: Batch) -> bool:
    if batch.id.deleting:
        return False
    reason, message = (Reason.VALIDATING_DATA, "the data is being prepared")
    for pod in work.seen.pods_of(batch):
        verdict = stuck(pod, now=work.now, patience=work.settings.pending_seconds)
        if verdict:
            work.stop(batch)
            _try_again(work, verdict)
            return work.failed
        hindered, why = hindrance(pod) if pod.phase == "Pending" else (Reason.STARTING, "")
        if hindered != Reason.STARTING:
            reason, message = Reason(hindered), why
        if hindered == Reason.IMAGE_PULL:
            work.wake(pod.id.created + timedelta(seconds=work.settings.pending_seconds))
    work.mark(work.data_condition, "False", reason, message)
    return False


def _try_again(work: Pass[Any, Any], verdict: Ending) -> None:
    if verdict.cls is FailureClass.OUT_OF_MEMORY:  # there is no micro-batch to halve
        work.fail(FailureCode.OUT_OF_MEMORY, f"data preparation: {verdict.message}", verdict.param)
    else:
        spend(work, verdict, free_in_a_row=work.status.restarts.free + 1)
    if not work.failed:
        work.mark(work.data_condition, "False", Reason.BACK_OFF, f"{verdict.reason}: {verdict.message}")
    else:
        work.mark(work.data_condition, "False", verdict.reason, verdict.message)


def prepare(work: Pass[Any, Any]) -> bool:
    """Has the data prepared, once: read in parts if that is wanted, then prepared. True while that is not done. No GPU is asked for before."""
    if work.status.dataset:
        return False
    work.begin()
    owner, config, shards = work.seen.owner.id, work.config, work.seen.shards
    reads = config.spec.dataset.shards > 1 and not (shards and shards.complete)
    batch, make = (shards, builders.shards_job) if reads else (work.seen.preparation, builders.prepare_job)
    if batch and not batch.gone:
        return True  # at work, or about to go to make room for the next
    if waits_for_its_turn(work):
        return True
    if batch is None and work.reason_of(work.data_condition) and not work.seen.confirmed:
        work.doubt()
        return True
    manifest = make(config, owner, work.settings)
    name = manifest["metadata"]["name"]
    obstacle = work.seen.obstacles.get(name) or work.seen.obstacles.get(names.config_name(owner.name, owner.uid))
    if obstacle:
        work.mark(work.data_condition, "False", Reason.STARTING, obstacle)
        work.wake_in(OBSTACLE_SECONDS)
        return True
    work.plan.create += [builders.config_map(config, owner), manifest]
    work.mark(work.data_condition, "False", Reason.VALIDATING_DATA, "the data is being prepared")
    return True
